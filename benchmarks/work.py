"""What every op has to do at a shape: its arguments, and the bytes and operations that no implementation can avoid."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import mae_kernels
from benchmarks.shapes import Shape
from mae_kernels import reference

BF16, F32, U8 = torch.bfloat16, torch.float32, torch.uint8
STAGES = ("forward", "backward", "forward+backward")


@dataclass(frozen=True)
class Work:
    """One op at one shape: its arguments, and what a pass at least has to move and to compute.

    Bytes: a forward reads each input once and writes its output once. A backward reads the gradient of the output and
    the inputs that it needs once and writes each gradient once. Of images and predictions count the patches in use.
    What a forward keeps for the backward does not count.
    """

    op: str
    arguments: Callable[[torch.device], dict]
    bytes: tuple[int, int]  # forward, backward
    flops: tuple[int, int] = (0, 0)
    pixels: torch.dtype = F32  # of the images, where there are any
    compute: torch.dtype = F32  # of tokens, predictions and products; bfloat16 runs under autocast, weights in float32
    peer: Callable | None = None  # what stands for the reference; None: the published step
    passes_together: bool = False  # gradients are computed in the forward: only the sum of both passes means something

    @property
    def reference(self) -> Callable:
        return self.peer or getattr(reference, self.op)

    @property
    def differentiable(self) -> bool:
        return self.bytes[1] > 0

    @property
    def stages(self) -> tuple[str, ...]:
        if self.passes_together:
            return STAGES[2:]
        return STAGES if self.differentiable else STAGES[:1]

    @property
    def dtype(self) -> str:
        names = [str(dtype).removeprefix("torch.") for dtype in (self.pixels, self.compute)]
        return " ".join(dict.fromkeys(name for name in names if name != "float32")) or "float32"


def random_masking(s: Shape) -> Work:
    """Reads noise [N, L] float32; writes ids_keep, ids_mask and ids_restore, 8 bytes each, and mask, 1 byte."""

    def arguments(device):
        sizes = {"batch_size": s.batch, "num_patches": s.num_patches, "mask_ratio": s.mask_ratio}
        return {**sizes, "noise": torch.rand(s.batch, s.num_patches, device=device)}

    return Work("random_masking", arguments, bytes=(s.batch * s.num_patches * (4 + 8 + 8 + 1), 0))


def patch_embed(s: Shape, pixels: torch.dtype, compute: torch.dtype = F32) -> Work:
    """Visible pixels N K E, ids N K, weight D E, bias D, positions L D, prefix D in; N (1 + K) D out.

    Backward: gradient N (1 + K) D, visible pixels and ids in; weight, bias and prefix gradients out.
    FLOPs: 2 N K E D for the projection, as many for the weight gradient.
    """
    n, k, e, d = s.batch, s.num_keep, s.patch_values, s.embed_dim

    def arguments(device):
        return {
            **_images(s, pixels, device),
            "weight": _normal(device, d, s.channels, s.patch, s.patch, scale=e**-0.5).requires_grad_(),
            "bias": _normal(device, d).requires_grad_(),
            "pos_embed": _normal(device, 1, s.num_patches, d),  # fixed, as published
            "prefix": _normal(device, 1, 1, d).requires_grad_(),
            "ids_keep": _masking(s, device).ids_keep,
        }

    read = n * k * e * pixels.itemsize + n * k * 8
    parameters, positions, tokens = (d * e + 2 * d) * 4, s.num_patches * d * 4, n * (1 + k) * d * 4
    flops = 2 * n * k * e * d
    return Work(
        "patch_embed",
        arguments,
        bytes=(read + parameters + positions + tokens, read + tokens + parameters),
        flops=(flops, flops),
        pixels=pixels,
        compute=compute,
    )


def gather_tokens(s: Shape, compute: torch.dtype = F32) -> Work:
    """Selected tokens N K D and ids in, N K D out. Backward: N K D and ids in, N L D out."""
    n, k, d = s.batch, s.num_keep, s.embed_dim

    def arguments(device):
        tokens = _normal(device, n, s.num_patches, d, dtype=compute)
        return {"tokens": tokens.requires_grad_(), "ids": _masking(s, device).ids_keep}

    selected, ids = n * k * d * compute.itemsize, n * k * 8
    everything = n * s.num_patches * d * compute.itemsize
    return Work("gather_tokens", arguments, bytes=(2 * selected + ids, selected + ids + everything), compute=compute)


def scatter_mask_tokens(s: Shape, compute: torch.dtype = F32) -> Work:
    """Tokens N (1 + K) D, mask token D, ids N L, positions (1 + L) D in; N (1 + L) D out. D is the decoder's.

    Backward: N (1 + L) D and ids in; N (1 + K) D and D out. Everything but the tokens is float32.
    FLOPs: one addition per output value; backward one per masked value.
    """
    n, k, num_patches, d = s.batch, s.num_keep, s.num_patches, s.decoder_dim

    def arguments(device):
        return {
            "tokens": _normal(device, n, 1 + k, d, dtype=compute).requires_grad_(),
            "mask_token": _normal(device, 1, 1, d).requires_grad_(),
            "ids_restore": _masking(s, device).ids_restore,
            "pos_embed": _normal(device, 1, 1 + num_patches, d),  # fixed, as published
        }

    tokens, mask_token = n * (1 + k) * d * compute.itemsize, d * 4
    full, ids = n * (1 + num_patches) * d * 4, n * num_patches * 8
    return Work(
        "scatter_mask_tokens",
        arguments,
        bytes=(tokens + mask_token + ids + (1 + num_patches) * d * 4 + full, full + ids + tokens + mask_token),
        flops=(full // 4, n * s.num_masked * d),
        compute=compute,
    )


def masked_mse(s: Shape, rows: str, pixels: torch.dtype = F32, compute: torch.dtype = F32) -> Work:
    """Masked predictions and pixels, N M E each, and ids (or mask) in; the loss out.

    Backward: their residual in, N M E; the gradient of pred out, N M E, or N L E for full predictions.
    FLOPs: 10 per masked value (mean, centre, variance, scale, residual, square, sum), backward 1.
    """
    n, m, e = s.batch, s.num_masked, s.patch_values

    def arguments(device):
        masking = _masking(s, device)
        if rows == "masked":
            pred = {"pred": _normal(device, n, m, e, dtype=compute), "ids_mask": masking.ids_mask}
        else:
            # The head of the published model predicts the class token too; the loss sees a slice without it.
            pred = {"pred": _normal(device, n, 1 + s.num_patches, e, dtype=compute)[:, 1:], "mask": masking.mask}
        pred["pred"].requires_grad_()
        return {**pred, **_images(s, pixels, device), "patch_size": s.patch}

    read = n * m * e * (compute.itemsize + pixels.itemsize) + (n * m * 8 if rows == "masked" else n * s.num_patches)
    gradients = n * (m + (m if rows == "masked" else s.num_patches)) * e * compute.itemsize
    return Work(
        "masked_mse",
        arguments,
        bytes=(read + 4, gradients),
        flops=(10 * n * m * e, n * m * e),
        pixels=pixels,
        compute=compute,
        peer=published_loss if compute != F32 else None,
    )


def published_loss(pred, images, *, mean, std, **options):
    """Under autocast the published pipeline has its pixels in float32, whatever the predictions are in."""
    pixels = reference.normalize(images, mean, std, torch.promote_types(pred.dtype, F32))
    return reference.masked_mse(pred, pixels, **options)


def linear_masked_mse(s: Shape, compute: torch.dtype, peer: Callable | None = None) -> Work:
    """Hidden tokens N M D, weight E D, bias E, masked pixels N M E and ids in; the loss out.

    Backward: the gradients of hidden, weight and bias out. D is the decoder's.
    FLOPs: 2 N M E D for the projection, 10 N M E for the loss; backward twice the projection.
    """
    n, m, e, d = s.batch, s.num_masked, s.patch_values, s.decoder_dim

    def arguments(device):
        return {
            "hidden": _normal(device, n, m, d).requires_grad_(),
            "weight": _normal(device, e, d, scale=d**-0.5).requires_grad_(),
            "bias": _normal(device, e).requires_grad_(),
            "images": _normal(device, n, s.channels, s.image, s.image),
            "ids_mask": _masking(s, device).ids_mask,
            "patch_size": s.patch,
        }

    gradients = (n * m * d + e * d + e) * 4
    read = gradients + n * m * e * 4 + n * m * 8
    product = 2 * n * m * e * d
    return Work(
        "linear_masked_mse",
        arguments,
        bytes=(read + 4, gradients),
        flops=(product + 10 * n * m * e, 2 * product),
        compute=compute,
        peer=peer,
        passes_together=True,
    )


def two_ops(hidden, weight, bias, images, ids_mask, **options):
    """What linear_masked_mse replaces in a model that has these ops already."""
    return mae_kernels.masked_mse(F.linear(hidden, weight, bias), images, ids_mask=ids_mask, **options)


def random_resized_crop(s: Shape) -> Work:
    """Boxes h x w of larger uint8 images in, 60 % of their pixels, N C H W out: 290 x 390 of 375 x 500 to 224 x 224.

    FLOPs: h (4 w) products with taps along the rows of a box, then W (4 h) along the columns that are left.
    """
    n = s.batch
    height, width, h, w = (side * s.image // 224 for side in (375, 500, 290, 390))

    def arguments(device):
        # All of the mean area, so that bytes and operations are known, at random places.
        room = torch.tensor([height - h, width - w], device=device)
        corners = (torch.rand(n, 2, device=device) * (room + 1)).long()
        return {
            "images": torch.randint(256, (n, s.channels, height, width), dtype=U8, device=device),
            "boxes": torch.cat([corners, torch.tensor([[h, w]] * n, device=device)], dim=1),
            "flips": torch.rand(n, device=device) < 0.5,
            "size": (s.image, s.image),
        }

    moved = n * s.channels * (h * w + s.image**2) + n * (4 * 8 + 1)
    flops = 2 * n * s.channels * 4 * h * (w + s.image)
    return Work("random_resized_crop", arguments, bytes=(moved, 0), flops=(flops, 0), pixels=U8)


# The names say dtypes that are not float32: of pixels, then of tokens, predictions and products.
CASES: dict[str, Callable[[Shape], Work]] = {
    "random_resized_crop": random_resized_crop,
    "random_masking": random_masking,
    "patch_embed float32": lambda s: patch_embed(s, F32),
    "patch_embed uint8": lambda s: patch_embed(s, U8),
    "patch_embed bfloat16": lambda s: patch_embed(s, BF16, BF16),
    "patch_embed uint8 bfloat16": lambda s: patch_embed(s, U8, BF16),
    "gather_tokens": gather_tokens,
    "gather_tokens bfloat16": lambda s: gather_tokens(s, BF16),
    "scatter_mask_tokens": scatter_mask_tokens,
    "scatter_mask_tokens bfloat16": lambda s: scatter_mask_tokens(s, BF16),
    "masked_mse masked-only": lambda s: masked_mse(s, "masked"),
    "masked_mse full": lambda s: masked_mse(s, "full"),
    "masked_mse uint8 bfloat16": lambda s: masked_mse(s, "masked", U8, BF16),
    "linear_masked_mse float32": lambda s: linear_masked_mse(s, F32),
    "linear_masked_mse bfloat16": lambda s: linear_masked_mse(s, BF16),
    "linear_masked_mse float32 / two ops": lambda s: linear_masked_mse(s, F32, two_ops),
    "linear_masked_mse bfloat16 / two ops": lambda s: linear_masked_mse(s, BF16, two_ops),
}


def _images(s: Shape, dtype: torch.dtype, device: torch.device) -> dict:
    size = (s.batch, s.channels, s.image, s.image)
    if dtype != U8:
        return {"images": _normal(device, *size, dtype=dtype)}
    return {
        "images": torch.randint(256, size, dtype=dtype, device=device),
        "mean": torch.tensor([0.485, 0.456, 0.406], device=device),
        "std": torch.tensor([0.229, 0.224, 0.225], device=device),
    }


def _normal(device: torch.device, *size: int, scale: float = 1.0, dtype: torch.dtype = F32) -> Tensor:
    return (torch.randn(size, device=device) * scale).to(dtype)


def _masking(s: Shape, device: torch.device) -> mae_kernels.Masking:
    return mae_kernels.random_masking(s.batch, s.num_patches, s.mask_ratio, device=device)
