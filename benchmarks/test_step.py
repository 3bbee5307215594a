"""One training step of the whole model, forward and backward, against the published pipeline on the same weights."""

import copy
from contextlib import nullcontext

import pytest
import torch

from benchmarks.measure import DEVICE, OURS, REFERENCE, as_double, assert_accurate, clock, rotated
from benchmarks.shapes import Shape
from mae_kernels import reference, use_backend

mae = pytest.importorskip("mae")  # its requirements are more than those of the ops

pytestmark = pytest.mark.benchmark(timer=clock)


@pytest.mark.parametrize("backend", [REFERENCE, *OURS])
def test_step(race, step_shape, backend):
    s = step_shape
    model = getattr(mae, s.model)().to(DEVICE)

    def make():
        images = torch.randn(s.batch, s.channels, s.image, s.image, device=DEVICE)
        return {"images": images, "noise": torch.rand(s.batch, s.num_patches, device=DEVICE)}

    def run(name, model, images, noise):
        with nullcontext() if name == REFERENCE else use_backend(name):
            if name == REFERENCE:
                loss = reference.pretraining_loss(model, images, noise, s.mask_ratio)
            else:
                loss = model(images, s.mask_ratio, noise=noise).loss
            trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
            grads = torch.autograd.grad(loss, [*trained.values()])
        return {"the loss": loss} | {f"the gradient of {k}": g for k, g in zip(trained, grads, strict=True)}

    inputs = rotated(make)
    if backend != REFERENCE:
        one = next(inputs)
        gold = run(REFERENCE, copy.deepcopy(model).double(), **as_double(one))
        assert_accurate(run(backend, model, **one), run(REFERENCE, model, **one), gold)
    calls = {name: lambda name=name: run(name, model, **next(inputs)) for name in (REFERENCE, *OURS)}
    race(
        s, "training step", "forward+backward", backend, calls,
        dtype="float32", logical_bytes=_bytes(s, model), flops=_flops(s),
    )  # fmt: skip


def _bytes(s: Shape, model: torch.nn.Module) -> int:
    """Images and parameters in, gradients out."""
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return 4 * (s.batch * s.channels * s.image**2 + 2 * parameters)


def _flops(s: Shape) -> int:
    """A block of T tokens: 24 T D² for its linears and 4 T² D for attention. A backward costs two forwards."""
    d, decoder_dim, encoder_tokens, decoder_tokens = s.embed_dim, s.decoder_dim, 1 + s.num_keep, 1 + s.num_patches
    blocks = ((s.depth, encoder_tokens, d), (s.decoder_depth, decoder_tokens, decoder_dim))
    forward = sum(depth * (24 * t * dim**2 + 4 * t**2 * dim) for depth, t, dim in blocks)
    forward += 2 * encoder_tokens * d * decoder_dim  # decoder_embed
    ends = 2 * s.patch_values * (s.num_keep * d + s.num_masked * decoder_dim)  # patch embedding and head
    return s.batch * (3 * (forward + ends) - 2 * s.patch_values * s.num_keep * d)  # images have no gradient
