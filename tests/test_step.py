"""The training step: the published pipeline's numbers, whatever is fused, left out, compiled or cut into parts."""

import copy
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch.utils._python_dispatch import TorchDispatchMode

import mae_kernels
from mae import MAEConfig, MaskedAutoencoder
from mae.training.optimizers import adamw
from mae.training.profile import LaunchCounter, saved_bytes
from mae.training.step import MaskStrategy, TrainingStep
from mae_kernels import Masking, products, random_masking, reference

SMALL = MAEConfig(
    image_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4, decoder_embed_dim=32, decoder_depth=1,
    decoder_num_heads=2,
)  # fmt: skip
STEPS, BATCH, LR = 200, 16, 1e-3
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EXECUTIONS = ["eager", "compile", "graph"] if DEVICE.type == "cuda" else ["eager", "compile"]


@pytest.fixture
def model() -> MaskedAutoencoder:
    return MaskedAutoencoder(SMALL).to(DEVICE)


def batches(steps: int = STEPS):
    """Smooth random pictures ``[N, 3, 32, 32]`` uint8, and noise ``[N, L]``: always the same ones."""
    generator = torch.Generator().manual_seed(1)
    pictures = F.interpolate(torch.rand(64, 3, 4, 4, generator=generator), 32, mode="bicubic")
    pictures = pictures.clamp(0, 1).mul(255).byte()
    for _ in range(steps):
        chosen = torch.randint(64, (BATCH,), generator=generator)
        yield pictures[chosen].to(DEVICE), torch.rand(BATCH, SMALL.num_patches, generator=generator).to(DEVICE)


def masking(noise: torch.Tensor) -> Masking:
    return random_masking(*noise.shape, noise=noise)


def published_losses(model: MaskedAutoencoder, bfloat16: bool = False) -> torch.Tensor:
    """Normalised float32 images, every token through every layer, explicit attention, an optimizer parameter by one."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), foreach=False)
    mean, std = (x[:, None, None] for x in (model.patch_embed.pixel_mean, model.patch_embed.pixel_std))
    losses = []
    for images, noise in batches():
        floats = (images / 255 - mean) / std
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bfloat16):
            loss = reference.pretraining_loss(model, floats, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses)


def our_losses(model: MaskedAutoencoder, steps: int = STEPS, **options) -> torch.Tensor:
    step = TrainingStep(model, adamw(model, LR), **options)
    return torch.stack([step(images, masking(noise)) for images, noise in batches(steps)]).cpu()


@pytest.fixture(scope="module")
def published() -> tuple[MaskedAutoencoder, torch.Tensor]:
    """A model before its training, and the losses of the published pipeline."""
    torch.manual_seed(0)
    model = MaskedAutoencoder(SMALL).to(DEVICE)
    losses = published_losses(copy.deepcopy(model))
    assert losses[-20:].mean() < 0.9 * losses[:5].mean()  # it does train
    return model, losses


@pytest.mark.parametrize(
    "options",
    [
        {"execution": "eager"},
        *(pytest.param({"execution": x}, marks=pytest.mark.slow) for x in EXECUTIONS[1:]),
        pytest.param({"micro_batches": 4}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_two_hundred_steps_are_those_of_the_published_pipeline(published, options):
    model, expected = published
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        losses = our_losses(copy.deepcopy(model), **options)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=0)


@pytest.mark.slow
def test_two_hundred_steps_in_bfloat16_are_as_close_as_two_published_runs(model):
    """The published run in bfloat16, and again from weights that differ by float32 rounding, mark the band."""
    disturbed = copy.deepcopy(model)
    with torch.no_grad():
        for p in disturbed.parameters():
            if p.requires_grad:
                p.mul_(1 + 1e-6 * torch.randn_like(p))
    one, other = published_losses(copy.deepcopy(model), bfloat16=True), published_losses(disturbed, bfloat16=True)
    band = (one - other).abs()
    for residual in (None, torch.bfloat16):
        ours = MaskedAutoencoder(SMALL, residual).to(DEVICE)
        ours.load_state_dict(model.state_dict())
        ours = our_losses(ours, bfloat16=True)
        distance = torch.minimum((ours - one).abs(), (ours - other).abs())
        assert distance.mean() <= 1.5 * band.mean(), residual
        assert distance.max() <= 1.5 * band.max(), residual


def test_micro_batches_update_like_the_whole_batch(model):
    model.double()
    whole = copy.deepcopy(model)
    images, noise = next(batches())
    for m, parts in ((whole, 1), (model, 4)):
        TrainingStep(m, torch.optim.SGD(m.parameters(), lr=0.1), micro_batches=parts)(images, masking(noise))
    for (name, a), b in zip(model.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=name)


def test_a_batch_that_cannot_be_cut_is_refused(model):
    with pytest.raises(ValueError) as error:
        TrainingStep(model, adamw(model, LR), micro_batches=3)(next(batches())[0])
    assert str(error.value) == "TrainingStep: 16 images cannot be cut into 3 equal micro-batches"


def test_graphs_are_refused_without_cuda(model):
    model.cpu()
    with pytest.raises(ValueError) as error:
        TrainingStep(model, adamw(model, LR), execution="graph")
    assert str(error.value) == "TrainingStep: execution 'graph' replays CUDA graphs, but the model is on cpu"


def test_clipping(model):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    images, noise = next(batches())
    TrainingStep(model, torch.optim.SGD(model.parameters(), lr=1.0), clip_grad=0.01)(images, masking(noise))
    change = torch.stack([(p.detach() - before[name]).norm() for name, p in model.named_parameters()]).norm()
    assert change.item() == pytest.approx(0.01, rel=1e-3)


def test_the_gradient_norm_is_only_computed_for_clipping(model, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: pytest.fail("not asked for"))
    TrainingStep(model, adamw(model, LR))(next(batches())[0])


def test_random_masks_are_the_published_draw(model):
    """One ``torch.rand(N, L)`` a step and no other, so a seed gives the published masks."""
    other = copy.deepcopy(model)
    images, _ = next(batches())
    torch.manual_seed(3)
    loss = TrainingStep(model, adamw(model, LR))(images)
    following = torch.rand(4, device=DEVICE)
    torch.manual_seed(3)
    noise = torch.rand(BATCH, SMALL.num_patches, device=DEVICE)
    assert torch.equal(loss, TrainingStep(other, adamw(other, LR))(images, masking(noise)))
    assert torch.equal(following, torch.rand(4, device=DEVICE))


@pytest.mark.parametrize("name", ["block", "grid", "tube", "axis"])
def test_a_strategy_makes_the_masks(model, name):
    """Those of the op of its name, one after the other, whatever the parts in which a batch is computed."""
    other, op = copy.deepcopy(model), getattr(mae_kernels, f"{name}_masking")
    step = TrainingStep(model, adamw(model, LR), strategy=MaskStrategy(name, 0.5), micro_batches=2)
    given = TrainingStep(other, adamw(other, LR))
    for seed, (images, _) in enumerate(batches(2)):
        torch.manual_seed(seed)
        loss = step(images)
        torch.manual_seed(seed)
        torch.testing.assert_close(loss, given(images, op(BATCH, (1, 4, 4), 0.5, device=DEVICE)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_nothing_is_read_back_from_the_device(model, bfloat16):
    step = TrainingStep(model, adamw(model, LR), bfloat16=bfloat16, clip_grad=1.0, micro_batches=2)
    with LaunchCounter() as counter:
        loss = step(next(batches())[0])
    assert counter.syncs == 0
    assert loss.shape == ()
    assert not loss.requires_grad


def test_it_saves_less_than_half_of_the_published_pipeline_and_launches_fewer_ops():
    """ViT-B's proportions at a sixteenth of its parameters: float32, bytes kept for the backward, ops of a step."""
    model = MaskedAutoencoder(MAEConfig(embed_dim=192, depth=12, num_heads=12, decoder_embed_dim=128))
    images, noise = torch.randn(2, 3, 224, 224), torch.rand(2, 196)
    known = [*model.parameters(), *model.buffers(), images, noise]
    costs = []
    for loss in (
        lambda: model(images, noise=noise).loss,
        lambda: reference.pretraining_loss(model, images, noise, attention=F.scaled_dot_product_attention),
        lambda: reference.pretraining_loss(model, images, noise),
    ):
        with LaunchCounter() as counter, saved_bytes(*known) as kept:
            loss().backward()
        costs.append((kept(), counter.launches))
    (ours, our_ops), (fused, fused_ops), (published, published_ops) = costs
    assert ours <= 0.5 * published
    assert ours <= 0.8 * fused
    assert our_ops < fused_ops < published_ops


class OwnOps(TorchDispatchMode):
    """Counts calls of the ops of this project inside a ``with`` block."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.update([str(func)] if func.namespace.startswith("mae") else [])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bfloat16", [pytest.param(False, marks=pytest.mark.slow), True], ids=["float32", "bfloat16"])
def test_compiled_steps_run_and_keep_what_eager_ones_do(monkeypatch, bfloat16):
    """What the backward computes again is cheap, and never an op of ours."""
    monkeypatch.setattr(products, "_AMD_FAMILY", 0)  # whose ops are PyTorch's own while OwnOps watches
    model = MaskedAutoencoder(replace(SMALL, embed_dim=192, depth=1, decoder_embed_dim=128)).to(DEVICE)
    images, noise = next(batches())
    masks = masking(noise)
    calls = []

    def count(graph, inputs, **kwargs):  # in place of a compiler: the graphs themselves are run
        targets = [str(node.target) for node in graph.graph.nodes]
        calls.append(Counter(target for target in targets if target.startswith("mae")))
        return make_boxed_func(graph)

    def bytes_kept(execution):
        step = TrainingStep(model, adamw(model, LR), bfloat16=bfloat16, execution=execution)
        step.loss(images, *masks).backward()  # compiles
        with saved_bytes(*model.parameters(), *model.buffers(), images, *masks) as saved:
            step.loss(images, *masks)
        return saved()

    kept = bytes_kept("eager")
    with OwnOps() as forward:
        loss = TrainingStep(model, adamw(model, LR), bfloat16=bfloat16).loss(images, *masks)
    with OwnOps() as backward:
        loss.backward()
    from torch._inductor.compile_fx import compile_fx

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=partial(compile_fx, inner_compile=count)))
    compiled = bytes_kept("compile")
    assert calls == [forward.calls, backward.calls]
    assert compiled <= 1.1 * kept


def test_weight_decay_is_for_matrices_alone(model):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    adamw(model, lr=0.1, weight_decay=0.5).step()
    for name, p in model.named_parameters():
        factor = 0.95 if p.requires_grad and p.ndim > 1 else 1.0
        torch.testing.assert_close(p.detach(), factor * before[name], msg=name)


def test_no_gradient_is_left_for_the_next_step(model):
    TrainingStep(model, adamw(model, LR))(next(batches())[0])
    assert all(p.grad is None for p in model.parameters())
