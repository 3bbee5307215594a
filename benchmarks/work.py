"""What is measured: shapes, each op's arguments there, and the bytes and operations that nobody can avoid."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode

import mae_kernels
from mae_kernels import reference
from mae_kernels.masked_mse import residual_is_less
from mae_kernels.patch_grid import PatchGrid

BF16, F32, U8 = torch.bfloat16, torch.float32, torch.uint8
PASSES = {"forward": slice(0, 1), "backward": slice(1, 2), "forward+backward": slice(0, 2)}  # of (forward, backward)
STAGES = (*PASSES,)


@dataclass(frozen=True)
class Shape:
    """A published model and a batch. Letters as everywhere in the package: N, K, M, D; L and E are the grid's."""

    name: str
    model: str  # factory in mae
    batch: int  # N
    embed_dim: int  # D
    image_size: tuple[int, ...] = (224, 224)  # pixels: height and width, of clips behind the number of frames
    patch_size: tuple[int, ...] = (16, 16)
    channels: int = 3
    decoder_dim: int = 512
    mask_ratio: float = 0.75

    @property
    def id(self) -> str:
        size = "" if self.image_size == (224, 224) else f" {'x'.join(map(str, self.image_size))}"
        return f"{self.name}{size} N={self.batch}"

    @property
    def grid(self) -> PatchGrid:
        return PatchGrid.of_sizes("Shape", self.image_size, self.patch_size, self.channels)

    @property
    def num_keep(self) -> int:  # K
        return int(self.grid.num_patches * (1 - self.mask_ratio))

    @property
    def num_masked(self) -> int:  # M
        return self.grid.num_patches - self.num_keep

    @property
    def visible(self) -> Fraction:
        return Fraction(self.num_keep, self.grid.num_patches)


TINY = Shape("ViT-Ti/16", "mae_vit_tiny_patch16", 1, embed_dim=192)
SMALL = Shape("ViT-S/16", "mae_vit_small_patch16", 1, embed_dim=384)
BASE = Shape("ViT-B/16", "mae_vit_base_patch16", 1, embed_dim=768)
LARGE = Shape("ViT-L/16", "mae_vit_large_patch16", 1, embed_dim=1024)
HUGE = Shape("ViT-H/14", "mae_vit_huge_patch14", 1, embed_dim=1280, patch_size=(14, 14))
VIDEO = Shape(
    "ViT-B/16 video", "mae_vit_base_video", 1, embed_dim=768, image_size=(16, 224, 224), patch_size=(2, 16, 16),
    decoder_dim=384, mask_ratio=0.9,
)  # fmt: skip

OP_SHAPES = {
    # For Triton's interpreter, half a millisecond a program.
    "tiny": [replace(TINY, batch=2, image_size=(64, 64), embed_dim=64, decoder_dim=64)],
    "small": [replace(BASE, batch=32)],
    "cpu": [replace(BASE, batch=32)],
    "video": [replace(VIDEO, batch=2)],
    "full": [
        *(replace(BASE, batch=n) for n in (64, 256, 1024)),
        *(replace(model, batch=256) for model in (SMALL, LARGE, HUGE)),
        replace(BASE, batch=64, image_size=(448, 448)),  # L = 784
        replace(BASE, batch=16, image_size=(896, 896)),  # L = 3136
    ],
}
STEP_SHAPES = {
    "tiny": [replace(TINY, batch=2)],
    "small": [replace(TINY, batch=8)],
    "cpu": [replace(TINY, batch=16), replace(BASE, batch=16)],
    "video": [replace(VIDEO, batch=2)],
    "full": [replace(SMALL, batch=256), replace(BASE, batch=256), replace(LARGE, batch=128), replace(HUGE, batch=64)],
}


@dataclass(frozen=True)
class Work:
    """One op at one shape: its arguments, and what a pass at least has to move and to compute."""

    op: str
    arguments: Callable[[torch.device], dict]
    flops: tuple[int, int] = (0, 0)  # forward, backward
    pixels: torch.dtype = F32  # of the images, where there are any
    compute: torch.dtype = F32  # of tokens, predictions and products; bfloat16 runs under autocast, weights in float32
    used: dict[str, Fraction] = field(default_factory=dict)  # of arguments that the op needs in part
    again: tuple[str, ...] = ()  # arguments that the backward reads once more
    keeps: str = ""  # the argument of whose size, as used, is what the forward writes for the backward
    peer: Callable | None = None  # what stands for the reference; None: the published step
    loops: bool = False  # the reference loops over images, which a compiler unrolls for minutes
    passes_together: bool = False  # gradients are computed in the forward: only the sum of both passes means something

    @cached_property
    def bytes(self) -> tuple[int, int]:
        """Of a forward, which reads each argument and writes each result once, and of a backward.

        That reads the gradient of the result and what it needs again, and writes the gradient of each parameter.
        """
        with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=self.is_autocast):
            arguments = self.arguments(torch.device("cpu"))
            out = getattr(mae_kernels, self.op)(**arguments)
        tensors = {name: x for name, x in arguments.items() if isinstance(x, Tensor) and name not in ("mean", "std")}
        read = {name: int(x.nbytes * self.used.get(name, 1)) for name, x in tensors.items()}
        written = sum(x.nbytes for x in ((out,) if isinstance(out, Tensor) else out))
        kept = read[self.keeps] if self.keeps else 0
        gradients = sum(x.nbytes for x in tensors.values() if x.requires_grad)
        backward = written + kept + sum(read[name] for name in self.again) + gradients if gradients else 0
        return sum(read.values()) + written + kept, backward

    @property
    def reference(self) -> Callable:
        return self.peer or getattr(reference, self.op)

    @property
    def differentiable(self) -> bool:
        return self.bytes[1] > 0

    @property
    def is_autocast(self) -> bool:
        return self.compute == BF16

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
    def arguments(device):
        sizes = {"batch_size": s.batch, "num_patches": s.grid.num_patches, "mask_ratio": s.mask_ratio}
        return {**sizes, "noise": torch.rand(s.batch, s.grid.num_patches, device=device)}

    return Work("random_masking", arguments)


def patch_embed(s: Shape, pixels: torch.dtype, compute: torch.dtype = F32) -> Work:
    """FLOPs: 2 N K E D for the projection, as many for the weight gradient."""
    e, d = s.grid.patch_values, s.embed_dim

    def arguments(device):
        return {
            **_images(s, pixels, device),
            "weight": _normal(device, d, s.channels, *s.patch_size, scale=e**-0.5).requires_grad_(),
            "bias": _normal(device, d).requires_grad_(),
            "pos_embed": _normal(device, 1, s.grid.num_patches, d),  # fixed, as published
            "prefix": _normal(device, 1, 1, d).requires_grad_(),
            "ids_keep": _masking(s, device).ids_keep,
        }

    flops = 2 * s.batch * s.num_keep * e * d
    return Work(
        "patch_embed",
        arguments,
        flops=(flops, flops),
        pixels=pixels,
        compute=compute,
        used={"images": s.visible},
        again=("images", "ids_keep"),
    )


def gather_tokens(s: Shape, compute: torch.dtype = F32) -> Work:
    def arguments(device):
        tokens = _normal(device, s.batch, s.grid.num_patches, s.embed_dim, dtype=compute)
        return {"tokens": tokens.requires_grad_(), "ids": _masking(s, device).ids_keep}

    return Work("gather_tokens", arguments, compute=compute, used={"tokens": s.visible}, again=("ids",))


def scatter_mask_tokens(s: Shape, compute: torch.dtype = F32) -> Work:
    """FLOPs: one addition per output value; backward one per masked value. All but the tokens is float32."""
    n, k, num_patches, d = s.batch, s.num_keep, s.grid.num_patches, s.decoder_dim

    def arguments(device):
        return {
            "tokens": _normal(device, n, 1 + k, d, dtype=compute).requires_grad_(),
            "mask_token": _normal(device, 1, 1, d).requires_grad_(),
            "ids_restore": _masking(s, device).ids_restore,
            "pos_embed": _normal(device, 1, 1 + num_patches, d),  # fixed, as published
        }

    flops = n * (1 + num_patches) * d, n * s.num_masked * d
    return Work("scatter_mask_tokens", arguments, flops=flops, compute=compute, again=("ids_restore",))


def masked_mse(s: Shape, rows: str, pixels: torch.dtype = F32, compute: torch.dtype = F32) -> Work:
    """FLOPs: 10 per masked value (mean, centre, variance, scale, residual, square, sum), backward 1."""
    n, m, e, which = s.batch, s.num_masked, s.grid.patch_values, "ids_mask" if rows == "masked" else "mask"

    def arguments(device):
        masking = _masking(s, device)
        if rows == "masked":
            pred = _normal(device, n, m, e, dtype=compute)
        else:  # the head of the published model predicts the class token too; the loss sees a slice without it
            pred = _normal(device, n, 1 + s.grid.num_patches, e, dtype=compute)[:, 1:]
        given = {"pred": pred.requires_grad_(), which: getattr(masking, which)}
        return {**given, **_images(s, pixels, device), "patch_size": s.patch_size}

    keeps = residual_is_less(compute, pixels)
    return Work(
        "masked_mse",
        arguments,
        flops=(10 * n * m * e, n * m * e),
        pixels=pixels,
        compute=compute,
        used={"images": 1 - s.visible, **({} if rows == "masked" else {"pred": 1 - s.visible})},
        keeps="pred" if keeps else "",
        again=() if keeps else ("pred", "images", which),
        peer=published_loss if compute != F32 else None,
    )


def published_loss(pred, images, *, mean, std, **options):
    """Under autocast the published pipeline has its pixels in float32, whatever the predictions are in."""
    pixels = reference.normalize(images, mean, std, torch.promote_types(pred.dtype, F32))
    return reference.masked_mse(pred, pixels, **options)


def linear_masked_mse(s: Shape, compute: torch.dtype, peer: Callable | None = None) -> Work:
    """FLOPs: 2 N M E D for the projection, 10 N M E for the loss; backward twice the projection."""
    n, m, e, d = s.batch, s.num_masked, s.grid.patch_values, s.decoder_dim

    def arguments(device):
        return {
            "hidden": _normal(device, n, m, d).requires_grad_(),
            "weight": _normal(device, e, d, scale=d**-0.5).requires_grad_(),
            "bias": _normal(device, e).requires_grad_(),
            "images": _normal(device, n, s.channels, *s.image_size),
            "ids_mask": _masking(s, device).ids_mask,
            "patch_size": s.patch_size,
        }

    product = 2 * n * m * e * d
    return Work(
        "linear_masked_mse",
        arguments,
        flops=(product + 10 * n * m * e, 2 * product),
        compute=compute,
        used={"images": 1 - s.visible},
        peer=peer,
        passes_together=True,
    )


def two_ops(hidden, weight, bias, images, ids_mask, **options):
    """What linear_masked_mse replaces in a model that has these ops already."""
    return mae_kernels.masked_mse(F.linear(hidden, weight, bias), images, ids_mask=ids_mask, **options)


def random_resized_crop(s: Shape) -> Work:
    """Boxes of 60 % of larger images, frame by frame: 290 x 390 of 375 x 500 to 224 x 224.

    FLOPs: h (4 w) products with taps along the rows of a box, then W (4 h) along the columns that are left.
    """
    *frames, rows, columns = s.image_size
    n = s.batch * prod(frames)
    height, h = (side * rows // 224 for side in (375, 290))
    width, w = (side * columns // 224 for side in (500, 390))

    def arguments(device):
        # All of the mean area, so that bytes and operations are known, at random places.
        room = torch.tensor([height - h, width - w], device=device)
        corners = (torch.rand(n, 2, device=device) * (room + 1)).long()
        return {
            "images": torch.randint(256, (n, s.channels, height, width), dtype=U8, device=device),
            "boxes": torch.cat([corners, torch.tensor([[h, w]] * n, device=device)], dim=1),
            "flips": torch.rand(n, device=device) < 0.5,
            "size": (rows, columns),
        }

    flops = 2 * n * s.channels * 4 * h * (w + columns)
    return Work(
        "random_resized_crop", arguments, flops=(flops, 0), pixels=U8, loops=True,
        used={"images": Fraction(h * w, height * width)},
    )  # fmt: skip


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
    size = (s.batch, s.channels, *s.image_size)
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
    return mae_kernels.random_masking(s.batch, s.grid.num_patches, s.mask_ratio, device=device)
