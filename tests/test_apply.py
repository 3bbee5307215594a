"""apply and unapply: the same numbers, random stream, parameters and habits, on the fused ops."""

import copy
import inspect
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import families
import pytest
import torch
import transformers
from conftest import DEVICE
from families import FAMILIES, SIZE, MaskedAutoencoderViT, hugging_face, outcome, published, timm_encoder
from peers import FOLDER
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mae_kernels import apply, unapply, use_backend
from mae_kernels.integrations.pieces import given


@pytest.fixture(params=FAMILIES)
def model(request) -> nn.Module:
    return FAMILIES[request.param]().to(DEVICE)


def images(n: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, 3, SIZE, SIZE, device=DEVICE).to(dtype)


def train(model: nn.Module, batch: Tensor, seed: int = 1) -> dict[str, Tensor]:
    """What the model returns, and the gradient of each parameter."""
    torch.manual_seed(seed)
    model.zero_grad()
    result = outcome(model, batch)
    result["loss"].backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**{name: x.detach() for name, x in result.items()}, **gradients}


def distance(x: Tensor, y: Tensor, scale: Tensor | None = None) -> float:
    return ((x.double() - y.double()).norm() / (y if scale is None else scale).double().norm()).item()


def is_a_key_bias(name: str) -> bool:
    # Softmax does not see it: its gradient is rounding and nothing else.
    return name.endswith(("key.bias", "k_proj.bias"))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_same_numbers(model, training):
    ours = copy.deepcopy(model).train(training)
    report = apply(ours)
    assert report.replaced
    assert not report.left
    batch = images()
    expected, result = train(model.train(training), batch), train(ours, batch)
    assert result.keys() == expected.keys()
    if "mask" in result:
        assert torch.equal(result["mask"], expected["mask"])
        assert result["mask"].dtype == expected["mask"].dtype
    for name, x in result.items():
        query = name.replace("key.bias", "query.bias").replace("k_proj.bias", "q_proj.bias")
        assert distance(x, expected[name], expected[query]) < 1e-5, name


def test_same_numbers_from_the_kernels(model):
    """Without a GPU in Triton's interpreter."""
    ours = copy.deepcopy(model)
    batch = images()
    expected = train(model, batch)
    with use_backend("triton"):
        assert not apply(ours).left
        result = train(ours, batch)
    for name, x in result.items():
        query = name.replace("key.bias", "query.bias").replace("k_proj.bias", "q_proj.bias")
        assert distance(x, expected[name], expected[query]) < 1e-5, name


def test_bfloat16_is_no_worse(model):
    batch = images()
    gold = train(copy.deepcopy(model).double(), batch.double())
    ours = copy.deepcopy(model)
    apply(ours)
    with torch.autocast(DEVICE, torch.bfloat16):
        same, result = train(model, batch), train(ours, batch)
    for name, x in result.items():
        assert x.dtype == same[name].dtype, name
        if not is_a_key_bias(name) and name != "mask":
            assert distance(x, gold[name]) < 2 * distance(same[name], gold[name]) + 2**-8, name


def test_a_bfloat16_model_is_no_worse(model):
    gold = train(copy.deepcopy(model).bfloat16().double(), images(dtype=torch.bfloat16).double())
    model, ours = model.bfloat16(), copy.deepcopy(model).bfloat16()
    apply(ours)
    torch.manual_seed(0)
    batch = images(dtype=torch.bfloat16)
    same, result = train(model, batch), train(ours, batch)
    for name, x in result.items():
        assert x.dtype == same[name].dtype, name
        if not is_a_key_bias(name) and name != "mask":
            assert distance(x, gold[name]) < 2 * distance(same[name], gold[name]) + 2**-6, name


def test_ten_steps_stay_together(model):
    batches = [images() for _ in range(10)]

    def losses(model: nn.Module, applied: bool) -> Tensor:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)  # made before, as scripts do
        if applied:
            apply(model)
        result = []
        torch.manual_seed(3)
        for batch in batches:
            loss = outcome(model, batch)["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            result.append(loss.detach())
        return torch.stack(result)

    ours = losses(copy.deepcopy(model), applied=True)
    expected = losses(model, applied=False)
    assert expected[-1] != expected[0]
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0)


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_the_ops_run(model):
    report = apply(model)
    with Calls() as calls:
        outcome(model, images())
    promised = {op for change in report.replaced for op in change.ops}
    kernels = {"random_masking": "masking"}
    assert {f"mae_kernels::{kernels.get(op, op)}" for op in promised} <= set(calls.names)
    assert "aten::convolution" not in calls.names
    unapply(model)
    with Calls() as calls:
        outcome(model, images())
    assert not any(name.startswith("mae_kernels") for name in calls.names)


def test_unapply_restores_the_very_same_objects(model):
    def things() -> list:
        found = [type(m) for m in model.modules()] + [id(m) for m in model.modules()]
        found += [(name, id(x)) for name, x in model.state_dict(keep_vars=True).items()]
        return found + [{key: id(value) for key, value in vars(m).items() if key[0] != "_"} for m in model.modules()]

    before = things()
    apply(model)
    assert things() != before
    apply(model)  # once more changes nothing
    unapply(model)
    assert things() == before
    unapply(model)
    assert things() == before


def test_parameters_keys_modes_and_class_stay(model):
    parameters = {name: id(p) for name, p in model.named_parameters()}
    keys, cls = list(model.state_dict()), type(model)
    modes = [i % 2 == 0 for i, _ in enumerate(model.modules())]
    for part, mode in zip(model.modules(), modes, strict=True):
        part.training = mode
    apply(model)
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert list(model.state_dict()) == keys
    assert [part.training for part in model.modules()] == modes
    assert isinstance(model, cls)
    assert type(model).__name__ == cls.__name__
    assert repr(model) == repr(unapplied(model))
    assert inspect.signature(model.forward) == inspect.signature(cls.forward.__get__(model))


def unapplied(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    unapply(model)
    return model


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("clone", [copied, pickled, saved])
def test_copies_are_applied_too(model, clone):
    apply(model)
    twin = clone(model)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    batch = images()
    expected, result = train(model, batch), train(twin, batch)
    assert all(torch.equal(result[name], expected[name]) for name in expected)
    with torch.no_grad():  # no parameter is shared, and the copy uses its own
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(train(model, batch)["loss"], expected["loss"])
    assert train(twin, batch)["loss"] != expected["loss"]
    unapply(twin)
    assert [type(m) for m in twin.modules()] == [type(m) for m in unapplied(model).modules()]


def test_apply_disturbs_nothing(model):
    model.register_buffer("calls", torch.zeros((), device=DEVICE))
    seen = []
    handles = [part.register_forward_hook(lambda *_: seen.append(1)) for part in model.modules()]
    torch.manual_seed(7)
    state = torch.get_rng_state()
    apply(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert not seen
    outcome(model, images())
    assert seen
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        ((1, 2), {}, (1, 2, None)),
        ((1,), {"ratio": 2, "noise": 3}, (1, 2, 3)),
        ((), {"x": 1, "ratio": 2}, (1, 2, None)),
        ((1,), {}, None),
        ((1,), {"imgs": 2}, None),
        ((1, 2), {"imgs": 2}, None),
        ((1, 2, 3, 4), {}, None),
    ],
)
def test_calls_are_told_apart(args, kwargs, expected):
    assert given(args, kwargs, "x", "ratio", noise=None) == expected


@pytest.mark.parametrize("wrap", ["inside", "compiled"])
def test_inside_other_modules(wrap):
    model = published().to(DEVICE)
    expected = train(copy.deepcopy(model), batch := images())
    outer = nn.ModuleDict({"mae": model}) if wrap == "inside" else torch.compile(model, backend="eager")
    report = apply(outer)
    assert report.replaced[0].module == ("mae" if wrap == "inside" else "_orig_mod")
    assert distance(train(model, batch)["pred"], expected["pred"]) < 1e-5


@pytest.mark.parametrize("build", [published, hugging_face], ids=["published", "Hugging Face"])
def test_compiles_to_one_graph(build):
    model = build().to(DEVICE)
    apply(model)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=1):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
        for n in (5, 7, 11):  # not 3: it would share the symbol of the channels
            batch = images(n)
            expected, result = train(model, batch), train(compiled, batch)
            assert distance(result["loss"], expected["loss"]) < 1e-6


class ShiftedMasking(MaskedAutoencoderViT):
    """A strategy of its own: a run of patches that starts anywhere."""

    def random_masking(self, x, mask_ratio):
        n, length, dim = x.shape
        keep = int(length * (1 - mask_ratio))
        start = torch.randint(length, (n, 1), device=x.device)
        ids_shuffle = (torch.arange(length, device=x.device) + start) % length
        ids_restore = ids_shuffle.argsort(dim=1)
        kept = x.gather(1, ids_shuffle[:, :keep, None].expand(-1, -1, dim))
        return kept, (ids_restore >= keep).float(), ids_restore


class BrightestPatches(MaskedAutoencoderViT):
    """Chooses by the embeddings themselves, which the fused encoder does not compute."""

    def random_masking(self, x, mask_ratio):
        _, length, dim = x.shape
        keep = int(length * (1 - mask_ratio))
        ids_shuffle = x.mean(2).argsort(dim=1)
        ids_restore = ids_shuffle.argsort(dim=1)
        kept = x.gather(1, ids_shuffle[:, :keep, None].expand(-1, -1, dim))
        return kept, (ids_restore >= keep).float(), ids_restore


class BiasedVariance(MaskedAutoencoderViT):
    def forward_loss(self, imgs, pred, mask):
        target = self.patchify(imgs)
        target = (target - target.mean(2, keepdim=True)) / (target.var(2, keepdim=True, correction=0) + 1e-6).sqrt()
        return ((pred - target).square().mean(2) * mask).sum() / mask.sum()


class EpsilonOutside(MaskedAutoencoderViT):
    def forward_loss(self, imgs, pred, mask):
        target = self.patchify(imgs)
        target = (target - target.mean(2, keepdim=True)) / (target.std(2, keepdim=True) + 1e-6)
        return ((pred - target).square().mean(2) * mask).sum() / mask.sum()


class Dropout(MaskedAutoencoderViT):
    """Not seen in evaluation mode."""

    def forward_encoder(self, x, mask_ratio):
        x = torch.dropout(self.patch_embed(x) + self.pos_embed[:, 1:], 0.1, self.training)
        x, mask, ids_restore = self.random_masking(x, mask_ratio)
        cls_token = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([cls_token.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x), mask, ids_restore


class AnotherDraw(MaskedAutoencoderViT):
    """The same result, one random number later."""

    def forward_decoder(self, x, ids_restore):
        torch.rand(1)
        return super().forward_decoder(x, ids_restore)


class Counting(MaskedAutoencoderViT):
    """Keeps a statistic."""

    def __init__(self, **options):
        super().__init__(**options)
        self.register_buffer("seen", torch.zeros(()))

    def forward_encoder(self, x, mask_ratio):
        self.seen += len(x)
        return super().forward_encoder(x, mask_ratio)


class CountingAnew(Counting):
    def forward_encoder(self, x, mask_ratio):
        self.seen = self.seen + len(x)
        return MaskedAutoencoderViT.forward_encoder(self, x, mask_ratio)


class Remembering(MaskedAutoencoderViT):
    """Leaves what it did on the model, for pictures."""

    def forward_decoder(self, x, ids_restore):
        self.last_ids, self.norm.last = ids_restore, x
        return super().forward_decoder(x, ids_restore)


class Weighted(MaskedAutoencoderViT):
    """Hidden patches that count for more, or less."""

    def random_masking(self, x, mask_ratio):
        kept, mask, ids_restore = super().random_masking(x, mask_ratio)
        return kept, mask * torch.linspace(0.5, 1.5, mask.shape[1], device=x.device), ids_restore


class AnotherSignature(MaskedAutoencoderViT):
    def forward_loss(self, imgs, pred, mask, weight):
        return super().forward_loss(imgs, pred, mask) * weight

    def forward(self, imgs, mask_ratio=0.75):
        latent, mask, ids_restore = self.forward_encoder(imgs, mask_ratio)
        pred = self.forward_decoder(latent, ids_restore)
        return self.forward_loss(imgs, pred, mask, 2.0), pred, mask


@pytest.mark.parametrize(
    ("cls", "method", "reason"),
    [
        (ShiftedMasking, "random_masking", "its result is"),
        (BrightestPatches, "random_masking", "its result is"),
        (BrightestPatches, "forward_encoder", "its result is"),
        (BiasedVariance, "forward_loss", "its result is"),
        (EpsilonOutside, "forward_loss", "its result is"),
        (Dropout, "forward_encoder", "its result is"),
        (AnotherDraw, "forward_decoder", "it draws other random numbers"),
        (Weighted, "forward_loss", ""),
        (Counting, "forward_encoder", "it changes buffers"),
        (CountingAnew, "forward_encoder", "it changes buffers"),
        (Remembering, "forward_decoder", "it sets last, last_ids"),
        (AnotherSignature, "forward_loss", "the original fails on random input: TypeError: "),
    ],
)
def test_a_subclass_that_does_something_else_keeps_doing_it(cls, method, reason):
    model = published(cls=cls).to(DEVICE)
    expected = train(copy.deepcopy(model), batch := images())
    report = apply(model)
    assert method in [change.method for change in report.left]
    assert next(change for change in report.left if change.method == method).why_not.startswith(reason)
    assert f"left      {method}: {reason}" in str(report)
    assert len(report.replaced) > 1
    assert not hasattr(model, "seen") or model.seen == 0  # the trial left no trace
    assert not hasattr(model, "last_ids")
    result = train(model, batch)
    assert not hasattr(model, "seen") or model.seen == 3
    assert hasattr(model, "last_ids") == (cls is Remembering)
    assert all(distance(result[name], expected[name]) < 1e-5 for name in expected)


def test_a_strategy_of_their_own_keeps_the_fused_encoder():
    report = apply(published(cls=ShiftedMasking))
    assert [change.method for change in report.replaced] == ["forward_encoder", "forward_decoder", "forward_loss"]


def test_a_method_of_the_instance_is_left():
    model = published()
    model.forward_loss = lambda imgs, pred, mask: pred.mean()
    (left,) = apply(model).left
    assert str(left) == "forward_loss: the method forward_loss was set on the instance"


def test_hooks_on_a_part_that_the_ops_would_pass_over():
    """Whoever asks for the projection's result gets it; without the hook the ops are back."""
    model = published().to(DEVICE)
    expected = train(copy.deepcopy(model), batch := images())
    apply(model)
    seen = []
    handle = model.patch_embed.proj.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    with Calls() as calls:
        result = train(model, batch)
    assert seen == [(3, 64, 6, 6)]
    assert "mae_kernels::patch_embed" not in calls.names
    assert all(distance(result[name], expected[name]) < 1e-5 for name in expected)
    handle.remove()
    with Calls() as calls:
        train(model, batch)
    assert "mae_kernels::patch_embed" in calls.names


def test_a_replaced_projection_is_used():
    class Doubled(nn.Conv2d):  # as adapters do
        def forward(self, x):
            return 2 * super().forward(x)

    model = published()
    apply(model)
    doubled = Doubled(3, 64, 8, stride=8)
    doubled.load_state_dict(model.patch_embed.proj.state_dict())
    model.patch_embed.proj = doubled
    plain = unapplied(model)
    batch = images().cpu()
    assert distance(train(model, batch)["loss"], train(plain, batch)["loss"]) < 1e-6


@pytest.mark.parametrize("build", [published, hugging_face], ids=["published", "Hugging Face"])
def test_images_that_require_grad(build):
    model = build().to(DEVICE)
    plain = copy.deepcopy(model)
    apply(model)
    batch = images()
    leaves = [batch.clone().requires_grad_() for _ in range(2)]
    for network, leaf in zip((model, plain), leaves, strict=True):
        train(network, leaf)
    assert distance(leaves[0].grad, leaves[1].grad) < 1e-5


def test_nothing_hidden():
    model = published().to(DEVICE)
    plain = copy.deepcopy(model)
    apply(model)
    batch = images()
    results = []
    for network in (model, plain):
        torch.manual_seed(2)
        results.append(network.forward_encoder(batch, 0.0))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_wrong_sizes_meet_the_original_error():
    model = hugging_face()
    apply(model)
    with pytest.raises(ValueError, match="Input image size"):
        model(torch.randn(2, 3, 24, 96))


def test_as_many_patches_in_another_rectangle():
    """The published model has no positions for them, and its patch embedding says so."""

    class Strict(type(published().patch_embed)):
        def forward(self, x):
            assert x.shape[2:] == self.img_size, "Input image size doesn't match model"
            return super().forward(x)

    model = published()
    model.patch_embed.__class__ = Strict
    apply(model)
    with pytest.raises(AssertionError, match="Input image size doesn't match model"):
        model(torch.randn(2, 3, 24, 96))


def test_interpolated_positions_of_hugging_face():
    model = hugging_face()
    plain = copy.deepcopy(model)
    apply(model)
    batch = torch.randn(2, 3, 64, 64)
    results = []
    for network in (model, plain):
        torch.manual_seed(2)
        results.append(network(batch, interpolate_pos_encoding=True))
    assert torch.equal(results[0].loss, results[1].loss)


@pytest.mark.parametrize("options", [{"output_hidden_states": True, "output_attentions": True}, {"return_dict": False}])
def test_outputs_of_hugging_face(options):
    model = hugging_face(attn_implementation="eager")
    plain = copy.deepcopy(model)
    apply(model)
    batch, noise = torch.randn(2, 3, SIZE, SIZE), torch.rand(2, 36)
    ours, theirs = (network(pixel_values=batch, noise=noise, **options) for network in (model, plain))
    assert type(ours) is type(theirs)
    assert len(ours) == len(theirs)
    for x, y in zip(*(torch.utils._pytree.tree_leaves(out) for out in (ours, theirs)), strict=True):
        assert distance(x, y) < 1e-5


def test_gradient_checkpointing_of_hugging_face():
    model = hugging_face().to(DEVICE)
    apply(model)
    expected = train(model, batch := images())
    model.gradient_checkpointing_enable()
    result = train(model, batch)
    assert all(distance(result[name], expected[name]) < 1e-6 for name in expected if not is_a_key_bias(name))


def test_saving_as_hugging_face_does(tmp_path):
    model = hugging_face()
    apply(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path)
    assert loaded.config.architectures == ["ViTMAEForPreTraining"]
    batch = torch.randn(2, 3, SIZE, SIZE)
    assert distance(train(loaded.train(), batch)["loss"], train(model, batch)["loss"]) < 1e-6


@pytest.mark.parametrize(
    "options", [{"reg_tokens": 4}, {"no_embed_class": True}, {"class_token": False, "global_pool": "avg"}]
)
def test_prefix_tokens_of_timm(options):
    model = timm_encoder(**options)
    plain = copy.deepcopy(model)
    assert apply(model).replaced
    batch = images().cpu()
    expected, result = train(plain, batch), train(model, batch)
    assert all(distance(result[name], expected[name]) < 1e-5 for name in expected)


def test_patch_dropout_in_order():
    model = timm_encoder()
    model.patch_drop.ordered = True
    plain = copy.deepcopy(model)
    apply(model)
    batch = images().cpu()
    results = []
    for network in (model, plain):
        torch.manual_seed(2)
        results.append(network.forward_features(batch))
    assert distance(*results) < 1e-5


def test_dropout_of_timm_is_left():
    with pytest.raises(
        ValueError, match=r"apply: nothing was replaced:\n  forward_features: the ops do not cover its options$"
    ):
        apply(timm_encoder(pos_drop_rate=0.1, dynamic_img_size=True))


def test_lightly_refuses_a_missing_class_token():
    model = families.lightly()
    apply(model)
    with pytest.raises(RuntimeError, match="the class token, number 0, must come first in idx_keep"):
        model.backbone.encode(images().cpu(), idx_keep=torch.tensor([[1, 2, 3]] * 3))


def test_unknown_models_are_refused():
    with pytest.raises(ValueError) as error:
        apply(nn.Sequential(nn.Linear(2, 2)))
    lines = str(error.value).splitlines()
    assert lines[0] == "apply: nothing in Sequential is known. Looked for:"
    assert lines[1] == "  ViTMAEForPreTraining or ViTMAEModel of transformers"
    assert lines[2].startswith("  a model with the published parts patch_embed.proj, pos_embed, ")
    assert lines[3] == "  VisionTransformer of timm with patch_drop_rate above 0"
    assert lines[4] == "  MaskedVisionTransformerTIMM of lightly"
    assert lines[5].startswith("Of a published-style model it lacks: patch_embed.proj, pos_embed, ")


def test_what_a_model_lacks_is_named():
    model = published()
    del model.mask_token, model.decoder_pred
    with pytest.raises(ValueError, match=r"it lacks: mask_token, decoder_pred$"):
        apply(model)


def test_weights_without_memory_are_refused():
    with pytest.raises(ValueError, match="cls_token is on the meta device; apply once the weights have their memory"):
        apply(published().to("meta"))


def test_importing_mae_kernels_imports_no_model_package():
    code = "import sys, mae_kernels; print(*{'transformers', 'timm', 'lightly'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="this is the run with transformers 4")
def test_transformers_4():
    """This file once more, what concerns Hugging Face, with the last transformers 4."""
    folder = FOLDER / "transformers-4"
    if not folder.is_dir():
        pytest.skip("transformers 4 is not installed; make test does it")
    here = Path(__file__)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "Hugging or hugging", here.name],
        cwd=here.parent, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(here.parent.parent)])},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:]
    assert "failed" not in result.stdout
