"""Adapters, hooks, parametrisations and other people's layers inside our model: they are called, and train."""

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.utils.prune
from torch import Tensor
from torch.nn.utils import parametrizations
from torch.testing import assert_close

from mae import MAEConfig, MaskedAutoencoder
from mae_kernels import random_masking
from mae_kernels.nn import MaskedPatchEmbed

CONFIG = MAEConfig(
    image_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, decoder_embed_dim=16, decoder_depth=2,
    decoder_num_heads=2,
)  # fmt: skip
LAYERS = ["patch_embed.proj", "blocks.1.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2",
          "decoder_embed", "decoder_blocks.1.attn.qkv", "decoder_blocks.1.mlp.fc2", "decoder_pred"]  # fmt: skip
NORMS = ["blocks.0.norm1", "blocks.0.norm2", "norm", "decoder_blocks.1.norm1", "decoder_norm"]
CONTAINERS = ["patch_embed", "blocks.0", "blocks.0.attn", "blocks.0.mlp", "decoder_blocks.1.attn"]


@pytest.fixture
def model() -> MaskedAutoencoder:
    torch.manual_seed(0)
    return MaskedAutoencoder(CONFIG)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return images, torch.rand(3, 16, generator=generator)


def train(model: nn.Module, autocast: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and every gradient by its name; each trained parameter must have one."""
    images, noise = batch()
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(images, noise=noise).loss
    loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None] == []
    return loss.detach(), {name: p.grad.clone() for name, p in trained.items()}


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "own forward"])
@pytest.mark.parametrize("name", [*LAYERS, *NORMS, *CONTAINERS])
def test_whatever_waits_for_a_call_gets_it(model, name, kind):
    expected, ran = train(model), []
    layer = model.get_submodule(name)
    if kind == "own forward":
        layer.forward = lambda *args, run=layer.forward, **options: (ran.append(name), run(*args, **options))[1]
    else:
        getattr(layer, f"register_{kind}_hook")(lambda *_: ran.append(name))
    assert_close(train(model), expected, rtol=1e-5, atol=1e-6)
    assert ran == [name]


def test_hooks_of_every_module(model):
    expected, ran = train(model), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: ran.append(module))
    try:
        assert_close(train(model), expected, rtol=1e-5, atol=1e-6)
    finally:
        handle.remove()
    passed_over = {name for name, module in model.named_modules() if module not in ran}
    assert passed_over == {"blocks", "decoder_blocks"}  # lists, which are never called


@pytest.mark.parametrize("full", [False, True], ids=["pre", "after"])
def test_gradients_changed_by_hooks_of_every_module(model, full):
    called = copy.deepcopy(model)
    for module in called.modules():
        module.register_forward_hook(lambda *_: None)

    def double(module, grads, *_):
        return tuple(None if g is None else 2 * g for g in grads) if isinstance(module, nn.LayerNorm) else None

    register = nn.modules.module.register_module_full_backward_hook
    if not full:
        register = nn.modules.module.register_module_full_backward_pre_hook
    handle = register(double)
    try:
        assert_close(train(model), train(called), rtol=1e-4, atol=1e-5)
    finally:
        handle.remove()


@pytest.mark.parametrize("name", [*LAYERS, "blocks.0.norm1"])
def test_the_same_under_autocast(model, name):
    expected = train(model, autocast=True)
    model.get_submodule(name).register_forward_hook(lambda *_: None)
    assert_close(train(model, autocast=True), expected, rtol=0.05, atol=5e-3)


def test_features_and_pictures_see_the_hook(model):
    ran = []
    images, noise = batch()
    expected = model.forward_features(images)
    model.patch_embed.proj.register_forward_hook(lambda *_: ran.append(1))
    assert_close(model.forward_features(images), expected, rtol=1e-5, atol=1e-6)
    model.reconstruct(images, noise=noise)
    assert ran == [1, 1]


@pytest.mark.parametrize("name", LAYERS)
def test_lora_of_peft(model, name):
    """Adapters that are not zero act as the weights that they stand for, and alone are trained."""
    peft = pytest.importorskip("peft")
    merged = copy.deepcopy(model)
    config = peft.LoraConfig(r=4, lora_alpha=64, target_modules=[name], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    loss, gradients = train(adapted)
    assert len(gradients) == 2
    assert all(g.abs().sum() > 0 for g in gradients.values())
    layer = adapted.get_submodule(f"base_model.model.{name}")
    with torch.no_grad():
        merged.get_submodule(name).weight += layer.get_delta_weight("default")
    assert_close(loss, train(merged)[0], rtol=1e-5, atol=1e-6)
    images, noise = batch()
    assert (loss - adapted.unload()(images, noise=noise).loss).abs() > 1e-4


@pytest.mark.parametrize("name", LAYERS)
def test_parametrised_weights(model, name):
    value, gradients = train(model)
    parametrizations.weight_norm(model.get_submodule(name))
    ours, others = train(model)
    assert_close(ours, value, rtol=1e-5, atol=1e-6)
    assert {f"{name}.parametrizations.weight.original{i}" for i in (0, 1)} <= others.keys()
    shared = gradients.keys() & others.keys()
    assert_close({k: others[k] for k in shared}, {k: gradients[k] for k in shared}, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_pruned_weights_stay_pruned(model, name):
    """Three steps, as of a model whose weights are masked by hand before each."""
    layer, by_hand = model.get_submodule(name), copy.deepcopy(model)
    torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.5)
    same = by_hand.get_submodule(name)
    steps = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, by_hand)]
    for _ in range(3):
        with torch.no_grad():
            same.weight *= layer.weight_mask
        assert_close(train(model)[0], train(by_hand)[0], rtol=1e-5, atol=1e-6)
        for optimizer in steps:
            optimizer.step()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_layers(model):
    images, noise = batch()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    expected, ours = model.forward_features(images), quantised.forward_features(images)
    assert 0 < (ours - expected).norm() < 0.05 * expected.norm()
    loss = model(images, noise=noise).loss
    assert 0 < (quantised(images, noise=noise).loss - loss).abs() < 0.05 * loss


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "patch_embed.proj"])
def test_a_subclass_with_a_forward_of_its_own(model, name):
    by_hand = copy.deepcopy(model)
    layer, same = model.get_submodule(name), by_hand.get_submodule(name)
    layer.__class__ = Doubled
    with torch.no_grad():
        same.weight *= 2
        same.bias *= 2
    assert_close(train(model)[0], train(by_hand)[0], rtol=1e-5, atol=1e-6)


class Scaled(nn.Conv2d):
    """As Whisper's convolution."""

    def _conv_forward(self, x, weight, bias):
        return 2 * super()._conv_forward(x, weight, bias)


@pytest.mark.parametrize("where", ["class", "instance"])
def test_what_a_convolution_calls_is_its_own(model, where):
    images, _ = batch()
    by_hand, proj = copy.deepcopy(model), model.patch_embed.proj
    if where == "class":
        proj.__class__ = Scaled
    else:
        proj._conv_forward = lambda *args, run=proj._conv_forward: 2 * run(*args)
    with torch.no_grad():
        by_hand.patch_embed.proj.weight *= 2
        by_hand.patch_embed.proj.bias *= 2
        assert_close(model.forward_features(images), by_hand.forward_features(images), rtol=1e-4, atol=1e-5)


def test_blocks_and_parts_that_take_one_argument(model):
    """In the last block of the decoder too, of which some tokens are enough."""
    images, noise = batch()
    expected = model(images, noise=noise).loss
    last = model.decoder_blocks[1]
    last.attn = nn.Sequential(last.attn, nn.Identity())
    assert_close(model(images, noise=noise).loss, expected)
    model.decoder_blocks[1] = nn.Sequential(last)
    model.blocks[0] = nn.Sequential(model.blocks[0])
    assert_close(model(images, noise=noise).loss, expected)
    last.norm1 = nn.Linear(16, 16)
    model.decoder_blocks[1] = nn.Identity()
    model.blocks[1].norm2 = nn.Linear(32, 32)
    assert model(images, noise=noise).loss.isfinite()


def test_layers_exchanged_for_others(model):
    """RMS norms, a head without a bias and one of two layers, a stem that halves twice."""
    model.blocks[0].norm1, model.decoder_blocks[1].norm2 = nn.RMSNorm(32), nn.RMSNorm(16)
    model.blocks[1].norm1 = nn.LayerNorm(32, elementwise_affine=False)
    model.blocks[0].attn.qkv, model.blocks[1].mlp.fc2 = nn.Linear(32, 96, bias=False), nn.Linear(128, 32, bias=False)
    model.decoder_blocks[1].attn.qkv = nn.Linear(16, 48, bias=False)
    model.decoder_pred = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 192))
    stem = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.GELU(), nn.Conv2d(8, 32, 2, 2), nn.Flatten(2))
    model.patch_embed.proj = nn.Sequential(stem, nn.Unflatten(2, (4, 4)))
    loss, gradients = train(model)
    assert loss.isfinite()
    assert all(g.abs().sum() > 0 for g in gradients.values())


@pytest.mark.parametrize("options", [{"kernel_size": 12, "padding": 2}, {"kernel_size": 4}], ids=["overlap", "gaps"])
def test_patches_that_do_not_lie_side_by_side(model, options):
    """A convolution of another shape is not the product that the op computes."""
    model.patch_embed.proj = nn.Conv2d(3, 32, stride=8, **options)
    images, _ = batch()
    features = model.forward_features(images)
    with torch.no_grad():
        model.patch_embed.proj.register_forward_hook(lambda *_: None)
        assert_close(features, model.forward_features(images))


def test_parameters_that_are_there_only_while_their_module_runs(model):
    """As of ZeRO-3: before a call a module's own parameters are gathered, behind it they are emptied again."""
    expected, store = model.forward_features(batch()[0]), {}

    def gather(module, _):
        for name, p in module.named_parameters(recurse=False):
            p.data = store[module, name]

    def empty(module, *_):
        for name, p in module.named_parameters(recurse=False):
            store[module, name], p.data = p.data, torch.empty(0)

    for module in model.modules():
        empty(module)
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(empty)
    images, noise = batch()
    with torch.no_grad():
        model(images, noise=noise)
        gather(model, None)  # what is called here is not the model itself
        assert_close(model.forward_features(images), expected, rtol=1e-5, atol=1e-6)


def test_compiles_with_and_without_an_adapter(model):
    """One graph; the plain model's has the op, that of an adapted one calls the convolution."""
    graphs = []

    def look(graph, _):
        graphs.append(str(graph.code))
        return graph

    images, noise = batch()
    for hooked in (False, True):
        if hooked:
            parametrizations.weight_norm(model.patch_embed.proj)
            model.blocks[0].mlp.fc1 = Doubled(32, 128)
        torch._dynamo.reset()
        expected = model(images, noise=noise).loss
        compiled = torch.compile(model, backend=look, fullgraph=True)
        assert_close(compiled(images, noise=noise).loss, expected)
    assert ["patch_embed" in graph and "conv2d" not in graph for graph in graphs] == [True, False]
    assert "conv2d" in graphs[1]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_projection_of_ones_own_module(dtype):
    torch.manual_seed(0)
    embed = MaskedPatchEmbed(8, 3, 32, pixel_mean=(0.4, 0.5, 0.6), pixel_std=(0.2, 0.3, 0.4))
    images = torch.randint(256, (2, 3, 32, 16), dtype=torch.uint8) if dtype == torch.uint8 else torch.rand(2, 3, 32, 16)
    table, prefix = torch.randn(1, 8 + 2, 32), torch.randn(2, 32)
    call = {"ids_keep": random_masking(2, 8, 0.5).ids_keep, "prefix": prefix, "pos_embed": table}
    expected, every = embed(images, **call), embed(images)
    parametrizations.weight_norm(embed.proj)
    assert_close(embed(images, **call), expected, rtol=1e-5, atol=1e-5)
    assert_close(embed(images), every, rtol=1e-5, atol=1e-5)
