"""Each op against the same step of the published pipeline; head and loss in one also against the two ops."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mae_kernels
from benchmarks.measure import DEVICE, OURS, REFERENCE, as_double, assert_accurate, clock, rotated
from benchmarks.shapes import Shape
from mae_kernels import reference, use_backend

pytestmark = pytest.mark.benchmark(timer=clock)


@dataclass(frozen=True)
class Work:
    """One op at one shape: its arguments, and what a pass at least has to move and to compute.

    Bytes: a forward reads each input once and writes its output once. A backward reads the gradient of the output and
    the inputs that it needs once and writes each gradient once. Of images and predictions count the patches in use.
    """

    op: str
    arguments: Callable[[], dict]
    bytes: tuple[int, int]  # forward, backward
    flops: tuple[int, int] = (0, 0)
    dtype: str = "float32"  # of the images, where there are any; of the products under autocast
    peer: Callable | None = None  # what stands for the reference; None: the published step

    @property
    def reference(self) -> Callable:
        return self.peer or getattr(reference, self.op)


def random_masking(s: Shape) -> Work:
    """Reads noise [N, L] float32; writes ids_keep, ids_mask and ids_restore, 8 bytes each, and mask, 1 byte."""

    def arguments():
        sizes = {"batch_size": s.batch, "num_patches": s.num_patches, "mask_ratio": s.mask_ratio}
        return {**sizes, "noise": torch.rand(s.batch, s.num_patches, device=DEVICE)}

    return Work("random_masking", arguments, bytes=(s.batch * s.num_patches * (4 + 8 + 8 + 1), 0))


def patch_embed(s: Shape, dtype: torch.dtype) -> Work:
    """Visible pixels N K E, weight D E, bias D, positions N K D, ids N K, prefix D in; N (1 + K) D out.

    Backward: gradient N (1 + K) D, visible pixels and ids in; weight, bias and prefix gradients out.
    FLOPs: 2 N K E D for the projection, as many for the weight gradient.
    """
    n, k, e, d = s.batch, s.num_keep, s.patch_values, s.embed_dim

    def arguments():
        size = (n, s.channels, s.image, s.image)
        if dtype == torch.uint8:
            images = {
                "images": torch.randint(256, size, dtype=dtype, device=DEVICE),
                "mean": torch.tensor([0.485, 0.456, 0.406], device=DEVICE),
                "std": torch.tensor([0.229, 0.224, 0.225], device=DEVICE),
            }
        else:
            images = {"images": _normal(*size)}
        return {
            **images,
            "weight": _normal(d, s.channels, s.patch, s.patch, scale=e**-0.5).requires_grad_(),
            "bias": _normal(d).requires_grad_(),
            "pos_embed": _normal(1, s.num_patches, d),  # fixed, as published
            "prefix": _normal(1, 1, d).requires_grad_(),
            "ids_keep": _masking(s).ids_keep,
        }

    pixels, tokens, parameters = n * k * e * dtype.itemsize, n * (1 + k) * d * 4, (d * e + 2 * d) * 4
    read = pixels + n * k * 8
    flops = 2 * n * k * e * d
    return Work(
        "patch_embed",
        arguments,
        bytes=(read + parameters + n * k * d * 4 + tokens, read + tokens + parameters),
        flops=(flops, flops),
        dtype=str(dtype).removeprefix("torch."),
    )


def gather_tokens(s: Shape) -> Work:
    """Selected tokens N K D and ids in, N K D out. Backward: N K D and ids in, N L D out."""
    n, k, d = s.batch, s.num_keep, s.embed_dim

    def arguments():
        return {"tokens": _normal(n, s.num_patches, d).requires_grad_(), "ids": _masking(s).ids_keep}

    selected, ids = n * k * d * 4, n * k * 8
    return Work("gather_tokens", arguments, bytes=(2 * selected + ids, selected + ids + n * s.num_patches * d * 4))


def scatter_mask_tokens(s: Shape) -> Work:
    """Tokens N (1 + K) D, mask token D, ids N L, positions (1 + L) D in; N (1 + L) D out. D is the decoder's.

    Backward: N (1 + L) D and ids in; N (1 + K) D and D out.
    FLOPs: one addition per output value; backward one per masked value.
    """
    n, k, num_patches, d = s.batch, s.num_keep, s.num_patches, s.decoder_dim

    def arguments():
        return {
            "tokens": _normal(n, 1 + k, d).requires_grad_(),
            "mask_token": _normal(1, 1, d).requires_grad_(),
            "ids_restore": _masking(s).ids_restore,
            "pos_embed": _normal(1, 1 + num_patches, d),  # fixed, as published
        }

    tokens, full, ids = (n * (1 + k) + 1) * d * 4, n * (1 + num_patches) * d * 4, n * num_patches * 8
    return Work(
        "scatter_mask_tokens",
        arguments,
        bytes=(tokens + ids + (1 + num_patches) * d * 4 + full, full + ids + tokens),
        flops=(full // 4, n * s.num_masked * d),
    )


def masked_mse(s: Shape, rows: str) -> Work:
    """Masked predictions and pixels, N M E each, and ids (or mask) in; the loss out.

    Backward: the same in; the gradient of pred out, N M E, or N L E for full predictions.
    FLOPs: 10 per masked value (mean, centre, variance, scale, residual, square, sum), backward 1.
    """
    n, m, e = s.batch, s.num_masked, s.patch_values

    def arguments():
        masking = _masking(s)
        if rows == "masked":
            pred = {"pred": _normal(n, m, e), "ids_mask": masking.ids_mask}
        else:
            # The head of the published model predicts the class token too; the loss sees a slice without it.
            pred = {"pred": _normal(n, 1 + s.num_patches, e)[:, 1:], "mask": masking.mask}
        pred["pred"].requires_grad_()
        return {**pred, "images": _normal(n, s.channels, s.image, s.image), "patch_size": s.patch}

    read = 2 * n * m * e * 4 + (n * m * 8 if rows == "masked" else n * s.num_patches)
    gradient = n * (m if rows == "masked" else s.num_patches) * e * 4
    return Work("masked_mse", arguments, bytes=(read + 4, read + gradient), flops=(10 * n * m * e, n * m * e))


def linear_masked_mse(s: Shape, dtype: torch.dtype, peer: Callable | None = None) -> Work:
    """Hidden tokens N M D, weight E D, bias E, masked pixels N M E and ids in; the loss out.

    Backward: the same in; the gradients of hidden, weight and bias out. bfloat16 is that of autocast.
    FLOPs: 2 N M E D for the projection, 10 N M E for the loss; backward twice the projection. D is the decoder's.
    """
    n, m, e, d = s.batch, s.num_masked, s.patch_values, s.decoder_dim

    def arguments():
        return {
            "hidden": _normal(n, m, d).requires_grad_(),
            "weight": _normal(e, d, scale=d**-0.5).requires_grad_(),
            "bias": _normal(e).requires_grad_(),
            "images": _normal(n, s.channels, s.image, s.image),
            "ids_mask": _masking(s).ids_mask,
            "patch_size": s.patch,
        }

    gradients = (n * m * d + e * d + e) * 4
    read = gradients + n * m * e * 4 + n * m * 8
    product = 2 * n * m * e * d
    return Work(
        "linear_masked_mse",
        arguments,
        bytes=(read + 4, read + gradients),
        flops=(product + 10 * n * m * e, 2 * product),
        dtype=str(dtype).removeprefix("torch."),
        peer=peer,
    )


def two_ops(hidden, weight, bias, images, ids_mask, **options):
    """What linear_masked_mse replaces in a model that has these ops already."""
    return mae_kernels.masked_mse(F.linear(hidden, weight, bias), images, ids_mask=ids_mask, **options)


def random_resized_crop(s: Shape) -> Work:
    """Boxes h x w of 375 x 500 uint8 images in, 60 % of their pixels, N C 224 224 out.

    FLOPs: h (4 w) products with taps along the rows of a box, then 224 (4 h) along the columns that are left.
    """
    n, height, width, h, w = s.batch, 375, 500, 290, 390

    def arguments():
        # All of the mean area, so that bytes and operations are known, at random places.
        room = torch.tensor([height - h, width - w], device=DEVICE)
        corners = (torch.rand(n, 2, device=DEVICE) * (room + 1)).long()
        return {
            "images": torch.randint(256, (n, s.channels, height, width), dtype=torch.uint8, device=DEVICE),
            "boxes": torch.cat([corners, torch.tensor([[h, w]] * n, device=DEVICE)], dim=1),
            "flips": torch.rand(n, device=DEVICE) < 0.5,
            "size": (s.image, s.image),
        }

    moved = n * s.channels * (h * w + s.image**2) + n * (4 * 8 + 1)
    flops = 2 * n * s.channels * 4 * h * (w + s.image)
    return Work("random_resized_crop", arguments, bytes=(moved, 0), flops=(flops, 0), dtype="uint8")


CASES = {
    "random_resized_crop": random_resized_crop,
    "random_masking": random_masking,
    "patch_embed float32": lambda s: patch_embed(s, torch.float32),
    "patch_embed uint8": lambda s: patch_embed(s, torch.uint8),
    "gather_tokens": gather_tokens,
    "scatter_mask_tokens": scatter_mask_tokens,
    "masked_mse masked-only": lambda s: masked_mse(s, "masked"),
    "masked_mse full": lambda s: masked_mse(s, "full"),
    "linear_masked_mse float32": lambda s: linear_masked_mse(s, torch.float32),
    "linear_masked_mse bfloat16": lambda s: linear_masked_mse(s, torch.bfloat16),
    "linear_masked_mse float32 / two ops": lambda s: linear_masked_mse(s, torch.float32, two_ops),
    "linear_masked_mse bfloat16 / two ops": lambda s: linear_masked_mse(s, torch.bfloat16, two_ops),
}
ROWS = [
    (case, stage)
    for case in CASES
    for stage in ("forward", "forward+backward")
    if case not in ("random_resized_crop", "random_masking") or stage == "forward"
]


@pytest.mark.parametrize("backend", [REFERENCE, *OURS])
@pytest.mark.parametrize(("case", "stage"), ROWS)
def test_op(race, op_shape, case, stage, backend):
    work = CASES[case](op_shape)
    backward = stage == "forward+backward"

    def make():
        arguments = work.arguments()
        if not backward:
            return arguments
        with torch.no_grad():
            return {**arguments, "grad": torch.randn_like(work.reference(**arguments))}

    def run(name, *, grad=None, **arguments):
        with nullcontext() if name == REFERENCE else use_backend(name):
            op = work.reference if name == REFERENCE else getattr(mae_kernels, work.op)
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=work.dtype == "bfloat16"):
                out = op(**arguments)
            outputs = {"the result": out} if isinstance(out, Tensor) else out._asdict()
            if backward:
                leaves = {k: x for k, x in arguments.items() if isinstance(x, Tensor) and x.requires_grad}
                grads = torch.autograd.grad(out, [*leaves.values()], grad)
                outputs |= {f"the gradient of {k}": g for k, g in zip(leaves, grads, strict=True)}
        return outputs

    inputs = rotated(make)
    if backend != REFERENCE:
        one = next(inputs)
        assert_accurate(run(backend, **one), run(REFERENCE, **one), run(REFERENCE, **as_double(one)))
    calls = {name: lambda name=name: run(name, **next(inputs)) for name in (REFERENCE, *OURS)}
    last = 2 if backward else 1
    race(
        op_shape, case, stage, backend, calls,
        dtype=work.dtype, logical_bytes=sum(work.bytes[:last]), flops=sum(work.flops[:last]),
    )  # fmt: skip


def _normal(*size: int, scale: float = 1.0) -> Tensor:
    return torch.randn(size, device=DEVICE) * scale


def _masking(s: Shape) -> mae_kernels.Masking:
    return mae_kernels.random_masking(s.batch, s.num_patches, s.mask_ratio, device=DEVICE)
