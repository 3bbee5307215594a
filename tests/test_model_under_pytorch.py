"""The whole model under what PyTorch does to models: compilers, autocast, checkpointing, torch.func, frozen parts."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mae import MAEConfig, MaskedAutoencoder

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = MAEConfig(
    image_size=(16, 32), patch_size=8, embed_dim=16, depth=2, num_heads=2, decoder_embed_dim=8, decoder_depth=2,
    decoder_num_heads=2,
)  # fmt: skip
ONE_BLOCK = replace(SMALL, depth=1, decoder_depth=1)  # of either kind: a compiler unrolls them all
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.mm.out, torch.ops.aten.addmm.default}


@pytest.fixture
def model() -> MaskedAutoencoder:
    return MaskedAutoencoder(SMALL).to(DEVICE)


def batch(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images ``[N, 3, 16, 32]`` uint8, and noise ``[N, L]``."""
    images = torch.randint(256, (n, 3, 16, 32), dtype=torch.uint8, device=DEVICE)
    return images, torch.rand(n, SMALL.num_patches, device=DEVICE)


class Loss(nn.Module):
    """The model as a function of tensors alone."""

    def __init__(self, model: MaskedAutoencoder):
        super().__init__()
        self.model = model

    def forward(self, images, noise):
        return self.model(images, noise=noise).loss


def trained(model) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def loss_and_gradients(loss, model, images, noise):
    value = loss(images, noise)
    parameters = trained(model)
    grads = torch.autograd.grad(value, list(parameters.values()))
    return value.detach(), dict(zip(parameters, grads, strict=True))


def assert_equal(ours, expected, **tolerances):
    torch.testing.assert_close(ours, expected, **(tolerances or {"rtol": 0, "atol": 0}))


@pytest.mark.slow  # each op is compiled for batches of any size in test_dispatch.py, the model for one in test_model.py
@pytest.mark.parametrize(("dynamic", "limit"), [(True, 1), (None, 2)], ids=["dynamic", "found out"])
def test_compiled_for_batches_of_any_size(dynamic, limit):
    """Once, or twice where PyTorch has to see a second size to expect others; with a default device set."""
    model = MaskedAutoencoder(ONE_BLOCK).to(DEVICE)
    torch._dynamo.reset()
    with torch.device(DEVICE), torch._dynamo.config.patch(recompile_limit=limit, fail_on_recompile_limit_hit=True):
        compiled = torch.compile(Loss(model), fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for n in (5, 7, 11):
            inputs = batch(n)
            ours, expected = (loss_and_gradients(f, model, *inputs) for f in (compiled, Loss(model)))
            assert_equal(ours, expected, rtol=1e-5, atol=1e-6)


def test_exported_for_batches_of_any_size(model):
    any_size = {0: torch.export.Dim("n", min=2, max=64)}
    program = torch.export.export(Loss(model), batch(5), dynamic_shapes=(any_size, any_size))
    assert any("patch_embed" in str(node.target) for node in program.graph.nodes)
    exported = program.module()
    for n in (5, 9):
        inputs = batch(n)
        value, grads = loss_and_gradients(exported, exported, *inputs)
        expected = loss_and_gradients(Loss(model), model, *inputs)
        assert_equal(value, expected[0], rtol=1e-5, atol=1e-6)
        assert_equal({name.removeprefix("model."): g for name, g in grads.items()}, expected[1], rtol=1e-5, atol=1e-6)


class CountProducts(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in PRODUCTS
        return func(*args, **(kwargs or {}))


def save_products(ctx, op, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if op in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint_blocks(model, **options):
    for block in (*model.blocks, *model.decoder_blocks):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, **options)


@pytest.mark.parametrize("selective", [False, True], ids=["all", "but products"])
def test_checkpointed_blocks(model, selective):
    inputs = batch(3)
    with CountProducts() as plain:
        expected = loss_and_gradients(Loss(model), model, *inputs)
    checkpointed = copy.deepcopy(model)
    options = {"context_fn": partial(create_selective_checkpoint_contexts, save_products)} if selective else {}
    checkpoint_blocks(checkpointed, **options)
    with CountProducts() as counter:
        ours = loss_and_gradients(Loss(checkpointed), checkpointed, *inputs)
    assert_equal(ours, expected)
    # Again: qkv, proj, fc1 and fc2 of each block; the last one has a product for queries, one for keys and values.
    assert counter.count - plain.count == (0 if selective else 4 * 4 + 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """Loss and gradients are float32, and as far from float32's as a few products in dtype are."""
    torch.manual_seed(1)  # of ten models, one has a gradient that all but cancels
    model, inputs = MaskedAutoencoder(SMALL).to(DEVICE), batch(3)
    loss, grads = loss_and_gradients(Loss(model), model, *inputs)
    with torch.autocast(DEVICE, dtype):
        ours = Loss(model)(*inputs)
    assert ours.dtype == torch.float32
    parameters = trained(model)
    eps = torch.finfo(dtype).eps
    assert_equal(ours.detach(), loss, rtol=4 * eps, atol=0)
    # Ten layers, each rounding its input, its weight and its output: the errors add up like random ones at most to
    # eps * sqrt(30), relative to the norm of a gradient.
    for (name, g), expected in zip(
        zip(parameters, torch.autograd.grad(ours, list(parameters.values())), strict=True), grads.values(), strict=True
    ):
        assert g.dtype == torch.float32
        assert (g - expected).norm() <= 6 * eps * max(expected.norm(), 1e-2 * loss), name


def functional_loss(model):
    frozen = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}

    def loss(parameters, images, noise):
        return functional_call(model, {**parameters, **frozen}, (images,), {"noise": noise}).loss

    return loss, {name: p.detach() for name, p in trained(model).items()}


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_functional_gradient(model, autocast):
    inputs = batch(3)
    loss, parameters = functional_loss(model)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        expected = loss_and_gradients(Loss(model), model, *inputs)[1]
        ours = grad(loss)(parameters, *inputs)
    assert_equal(ours, expected, rtol=2e-2 if autocast else 1e-5, atol=1e-3 if autocast else 1e-6)


@pytest.mark.parametrize(
    ("decoder", "autocast"),
    [("self", False), *(pytest.param(x, True, marks=pytest.mark.slow) for x in ("self", "cross"))],
    ids=lambda x: x if isinstance(x, str) else "bfloat16" if x else "float32",
)
def test_compiled_functional_gradient(decoder, autocast):
    """torch.compile takes the parameters of torch.func.grad for constants, unless it is made to look again."""
    model, inputs = MaskedAutoencoder(replace(ONE_BLOCK, decoder=decoder)).to(DEVICE), batch(3)
    loss, parameters = functional_loss(model)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        expected = grad(loss)(parameters, *inputs)
        torch._dynamo.reset()
        ours = torch.compile(grad(loss), fullgraph=True, backend="aot_eager")(parameters, *inputs)
    assert_equal(ours, expected, rtol=2e-2 if autocast else 1e-5, atol=1e-3 if autocast else 1e-6)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_gradient_of_each_sample(model, autocast):
    images, noise = batch(3)
    loss, parameters = functional_loss(model)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        ours = vmap(grad(loss), (None, 0, 0))(parameters, images[:, None], noise[:, None])
        each = [loss_and_gradients(Loss(model), model, x[None], y[None])[1] for x, y in zip(images, noise, strict=True)]
    expected = {name: torch.stack([g[name] for g in each]) for name in parameters}
    assert_equal(ours, expected, rtol=2e-2 if autocast else 1e-4, atol=1e-3 if autocast else 1e-6)


def test_second_derivatives_are_refused(model):
    loss = Loss(model)(*batch(2))
    grads = torch.autograd.grad(loss, list(trained(model).values()), create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated: second derivatives are not supported"):
        sum(g.square().sum() for g in grads).backward()


def test_inference_mode(model):
    images, noise = batch(3)
    with torch.inference_mode():
        output, features = model(images, noise=noise), model.forward_features(images)
    assert output.loss.is_inference()
    assert_equal(output.loss, model(images, noise=noise).loss.detach())
    assert_equal(features, model.forward_features(images).detach())


FROZEN = {
    "encoder": lambda name: not name.startswith(("decoder", "mask_token")),
    "decoder": lambda name: name.startswith(("decoder", "mask_token")),
    "all but biases": lambda name: not name.endswith("bias"),
    "all but norms": lambda name: "norm" not in name,
    "weights of products": lambda name: name.endswith(("fc1.weight", "fc2.weight", "qkv.weight", "proj.weight")),
    "all but the mask token": lambda name: name != "mask_token",
}


@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN)
def test_frozen_parameters(model, frozen):
    inputs = batch(3)
    _, expected = loss_and_gradients(Loss(model), model, *inputs)
    for name, p in trained(model).items():
        p.requires_grad_(not frozen(name))
    assert 0 < len(trained(model)) < len(expected)
    Loss(model)(*inputs).backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert_equal(p.grad, expected[name], rtol=1e-5, atol=1e-7)
        else:
            assert p.grad is None


def test_a_frozen_encoder_has_no_products_in_its_backward(model):
    inputs = batch(3)
    counts = []
    for frozen in (False, True):
        for p in (*model.blocks.parameters(), *model.patch_embed.parameters(), *model.norm.parameters()):
            p.requires_grad_(not frozen)
        model.cls_token.requires_grad_(not frozen)
        loss = Loss(model)(*inputs)
        with CountProducts() as counter:
            loss.backward()
        counts.append(counter.count)
    # Two each for qkv, proj, fc1 and fc2 of both blocks, and that for the input of decoder_embed.
    assert counts[0] - counts[1] == 2 * 4 * 2 + 1


def test_gradients_accumulate(model):
    first, second = batch(3), batch(3)
    expected = [loss_and_gradients(Loss(model), model, *inputs)[1] for inputs in (first, second)]
    for inputs in (first, second):
        Loss(model)(*inputs).backward()
    for name, p in trained(model).items():
        assert torch.equal(p.grad, expected[0][name] + expected[1][name])


def test_shared_parameters(model):
    """A block used twice has the sum of the gradients that two blocks have."""
    model.blocks[1].load_state_dict(model.blocks[0].state_dict())
    inputs = batch(3)
    value, expected = loss_and_gradients(Loss(model), model, *inputs)
    model.blocks[1] = model.blocks[0]
    shared, grads = loss_and_gradients(Loss(model), model, *inputs)
    assert_equal(shared, value)
    for name in grads:
        both = expected[name]
        if name.startswith("blocks.0"):
            both = both + expected[name.replace("blocks.0", "blocks.1")]
        assert_equal(grads[name], both, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_empty_batch(model, autocast, monkeypatch):
    monkeypatch.delattr(F, "scaled_dot_product_attention")  # returns None for an empty batch in cuDNN's implementation
    images, noise = batch(0)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        loss, grads = loss_and_gradients(Loss(model), model, images, noise)
        output = model(images, noise=noise, return_pred=True)
        features = model.forward_features(images)
    assert loss.item() == output.loss.item() == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads.values())
    assert output.pred.shape == (0, 8, 192)
    assert output.mask.shape == (0, 8)
    assert features.shape == (0, 9, 16)
