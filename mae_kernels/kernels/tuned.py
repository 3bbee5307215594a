"""The tiles of launches: those that ``python -m benchmarks.tune`` chose, and the rules' for every other shape.

A launcher asks with a key: its kernel, the chip, and the class of its shape, that is what changes the best tiles.

========================  ============================================================================================
gather_tokens, _backward  D, bytes of a value, size of N K; backward of N L
position_gradient         D, bytes of a value, size of N K
scatter_mask_tokens       D, bytes of a token and of a result, size of N (R + L)
..._backward              D, bytes of a gradient and of a token, whether positions are learned, size of N (R + L)
masked_mse                C, PH, PW, dtypes of pixels and pred, layout, what picks patches, has mean, size of its rows
masked_mse_backward       bytes of a residual and of a gradient, size of its rows
masking, _of_order        L, rounded up to a power of two
patch_embed               D, C, PH, PW, dtype of pixels, has mean, dtypes of products and out, size of N (R + K)
weight_, image_gradient   D, C, PH, PW, dtype of pixels, has mean, dtypes of products and gradient, size of N K
random_resized_crop       height and width, whether packed, size of N C
========================  ============================================================================================

The name before an underscore is the row's. Sizes are those of :func:`size`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

BF16, F16, F32, U8 = torch.bfloat16, torch.float16, torch.float32, torch.uint8


@dataclass(frozen=True)
class BlockTiles:
    """A program takes ``values`` values in a row."""

    values: int
    num_warps: int


@dataclass(frozen=True)
class RowTiles:
    """A program moves ``rows`` rows of D values, ``width`` values of each at a time."""

    rows: int
    width: int
    num_warps: int = 4


@dataclass(frozen=True)
class LossTiles:
    """A program turns ``turns`` times to ``patches`` patches, of which it holds ``rows`` rows of ``cols`` pixels."""

    patches: int
    rows: int
    cols: int
    turns: int
    num_warps: int


@dataclass(frozen=True)
class GemmTiles:
    """A program multiplies ``tokens`` rows with ``width`` columns of the weight, ``rows`` rows of pixels at a time.

    For the gradient of the weight ``tokens`` is the depth of the product, for that of the images ``width`` is.
    """

    tokens: int
    width: int
    rows: int
    cols: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class CropTiles:
    rows: int  # of the output
    cols: int
    lines: int  # of the input, resized at a time
    num_warps: int


Tiles = BlockTiles | RowTiles | LossTiles | GemmTiles | CropTiles

_forced: dict[str, Tiles] = {}


def size(rows: int) -> int:
    """Class of a count: its number of bits, and one class from 8192 on, where every chip has several rounds of work."""
    return min(rows.bit_length(), 14)


def tiles(key: tuple, rule: Callable[..., Tiles], *args) -> Tiles:
    """The table's tiles for a key, ``rule(*args)`` where it has none."""
    found = TABLE.get(key)
    if _forced:
        found = _forced.get(key[0], found)
    return rule(*args) if found is None else found


@contextmanager
def forced(kernel: str, chosen: Tiles) -> Iterator[None]:
    """Launch a kernel with these tiles, whatever its shape."""
    previous = _forced.get(kernel)
    _forced[kernel] = chosen
    try:
        yield
    finally:
        _forced.pop(kernel)
        if previous is not None:
            _forced[kernel] = previous


# Written by `python -m benchmarks.tune`. Above each entry: what was tuned, its time, that of the rule's tiles, the time
# that the bytes or the FLOPs take at the chip's ceilings; the device it was measured on, or "predicted"; the date.
TABLE: dict[tuple, Tiles] = {
    # ViT-L/16 bf16: 13.9 µs, rule 13.9, floor 10.7; predicted, 2026-11-27
    ("gather_tokens", "sm_90", 1024, 2, 14): RowTiles(2, 1024, 4),
    # ViT-L/16 fp32: 25.8 µs, rule 25.8, floor 21.4; predicted, 2026-11-27
    ("gather_tokens", "sm_90", 1024, 4, 14): RowTiles(2, 1024, 4),
    # ViT-S/16 bf16: 6.5 µs, rule 6.5, floor 4.0; predicted, 2026-11-27
    ("gather_tokens", "sm_90", 384, 2, 14): RowTiles(16, 128, 4),
    # ViT-S/16 fp32: 10.9 µs, rule 10.9, floor 8.0; predicted, 2026-11-27
    ("gather_tokens", "sm_90", 384, 4, 14): RowTiles(16, 128, 4),
    # bf16: 10.9 µs, rule 10.9, floor 8.0; predicted, 2026-11-27
    ("gather_tokens", "sm_90", 768, 2, 14): RowTiles(8, 256, 4),
    # fp32: 19.9 µs, rule 19.9, floor 16.1; predicted, 2026-11-27
    ("gather_tokens", "sm_90", 768, 4, 14): RowTiles(8, 256, 4),
    # ViT-L/16 bf16: 31.8 µs, rule 31.8, floor 26.8; predicted, 2026-11-27
    ("gather_tokens_backward", "sm_90", 1024, 2, 14): RowTiles(2, 1024, 4),
    # ViT-L/16 fp32: 61.5 µs, rule 61.5, floor 53.5; predicted, 2026-11-27
    ("gather_tokens_backward", "sm_90", 1024, 4, 14): RowTiles(2, 1024, 4),
    # ViT-S/16 bf16: 13.2 µs, rule 13.2, floor 10.1; predicted, 2026-11-27
    ("gather_tokens_backward", "sm_90", 384, 2, 14): RowTiles(16, 128, 4),
    # ViT-S/16 fp32: 24.3 µs, rule 24.3, floor 20.1; predicted, 2026-11-27
    ("gather_tokens_backward", "sm_90", 384, 4, 14): RowTiles(16, 128, 4),
    # bf16: 24.3 µs, rule 24.3, floor 20.1; predicted, 2026-11-27
    ("gather_tokens_backward", "sm_90", 768, 2, 14): RowTiles(8, 256, 4),
    # fp32: 46.6 µs, rule 46.6, floor 40.2; predicted, 2026-11-27
    ("gather_tokens_backward", "sm_90", 768, 4, 14): RowTiles(8, 256, 4),
    # bf16 of bf16 and bf16: 31.9 µs, rule 46.9, floor 15.0; predicted, 2026-11-27
    ("image_gradient", "sm_90", 768, 3, 16, 16, BF16, False, BF16, BF16, 14): GemmTiles(128, 64, 8, 16, 8, 3),
    # fp32 of fp32 and fp32: 137.3 µs, rule 137.3, floor 16.6; predicted, 2026-11-27
    ("image_gradient", "sm_90", 768, 3, 16, 16, F32, False, F32, F32, 14): GemmTiles(64, 16, 4, 16, 4, 2),
    # ViT-H/14 fp32 of fp32 pqc ids_mask: 82.4 µs, rule 82.4, floor 72.3; predicted, 2026-11-27
    ("masked_mse", "sm_90", 3, 14, 14, F32, F32, "pqc", "ids_mask", False, 14): LossTiles(1, 64, 16, 3, 1),
    # ViT-H/14 bf16 of uint8 pqc ids_mask: 118.9 µs, rule 118.9, floor 30.2; predicted, 2026-11-27
    ("masked_mse", "sm_90", 3, 14, 14, U8, BF16, "pqc", "ids_mask", True, 14): LossTiles(1, 64, 16, 3, 1),
    # bf16 of bf16 cpq ids_mask: 42.2 µs, rule 42.2, floor 36.2; predicted, 2026-11-27
    ("masked_mse", "sm_90", 3, 16, 16, BF16, BF16, "cpq", "ids_mask", False, 14): LossTiles(1, 64, 16, 2, 1),
    # bf16 of bf16 pqc mask: 46.6 µs, rule 46.6, floor 40.2; predicted, 2026-11-27
    ("masked_mse", "sm_90", 3, 16, 16, BF16, BF16, "pqc", "mask", False, 14): LossTiles(1, 64, 16, 3, 1),
    # fp32 of fp32 cpq mask: 91.2 µs, rule 91.2, floor 80.3; predicted, 2026-11-27
    ("masked_mse", "sm_90", 3, 16, 16, F32, F32, "cpq", "mask", False, 14): LossTiles(1, 64, 16, 3, 1),
    # fp32 of fp32 pqc ids_mask: 82.4 µs, rule 82.4, floor 72.3; predicted, 2026-11-27
    ("masked_mse", "sm_90", 3, 16, 16, F32, F32, "pqc", "ids_mask", False, 14): LossTiles(1, 64, 16, 2, 1),
    # bf16 of uint8 cpq ids_mask: 37.8 µs, rule 37.8, floor 30.2; predicted, 2026-11-27
    ("masked_mse", "sm_90", 3, 16, 16, U8, BF16, "cpq", "ids_mask", True, 14): LossTiles(1, 64, 16, 2, 1),
    # bf16 of uint8 pqc ids_mask: 50.4 µs, rule 50.4, floor 30.2; predicted, 2026-11-27
    ("masked_mse", "sm_90", 3, 16, 16, U8, BF16, "pqc", "ids_mask", True, 14): LossTiles(1, 64, 16, 2, 1),
    # bf16: 28.8 µs, rule 28.8, floor 24.1; predicted, 2026-11-27
    ("masked_mse_backward", "sm_90", 2, 2, 14): BlockTiles(4096, 8),
    # fp32: 55.5 µs, rule 55.5, floor 48.2; predicted, 2026-11-27
    ("masked_mse_backward", "sm_90", 4, 4, 14): BlockTiles(4096, 8),
    # fp32 L=1568: 11.9 µs, rule 11.9, floor 1.8; predicted, 2026-11-27
    ("masking", "sm_90", 2048): BlockTiles(2048, 8),
    # fp32 L=196: 3.6 µs, rule 3.6, floor 0.2; predicted, 2026-11-27
    ("masking", "sm_90", 256): BlockTiles(256, 4),
    # fp32 L=6272: 11.3 µs, rule 11.3, floor 8.4; predicted, 2026-11-27
    ("masking_of_order", "sm_90", 8192): BlockTiles(1024, 4),
    # ViT-L/16 bf16 of bf16 to bf16: 44.7 µs, rule 44.7, floor 19.9; predicted, 2026-11-27
    ("patch_embed", "sm_90", 1024, 3, 16, 16, BF16, False, BF16, BF16, 14): GemmTiles(128, 128, 4, 16, 8, 3),
    # ViT-L/16 bf16 of fp32 to fp32: 63.0 µs, rule 63.0, floor 19.9; predicted, 2026-11-27
    ("patch_embed", "sm_90", 1024, 3, 16, 16, F32, False, BF16, F32, 14): GemmTiles(128, 128, 4, 16, 8, 3),
    # ViT-L/16 bf16 of uint8 to fp32: 44.7 µs, rule 44.7, floor 19.9; predicted, 2026-11-27
    ("patch_embed", "sm_90", 1024, 3, 16, 16, U8, True, BF16, F32, 14): GemmTiles(128, 128, 4, 16, 8, 3),
    # ViT-H/14 bf16 of bf16 to bf16: 71.7 µs, rule 71.7, floor 24.9; predicted, 2026-11-27
    ("patch_embed", "sm_90", 1280, 3, 14, 14, BF16, False, BF16, BF16, 14): GemmTiles(128, 128, 2, 16, 8, 3),
    # ViT-H/14 bf16 of uint8 to fp32: 78.5 µs, rule 78.5, floor 24.9; predicted, 2026-11-27
    ("patch_embed", "sm_90", 1280, 3, 14, 14, U8, True, BF16, F32, 14): GemmTiles(128, 128, 2, 16, 8, 3),
    # ViT-S/16 bf16 of bf16 to bf16: 20.3 µs, rule 20.3, floor 7.5; predicted, 2026-11-27
    ("patch_embed", "sm_90", 384, 3, 16, 16, BF16, False, BF16, BF16, 14): GemmTiles(128, 128, 4, 16, 8, 3),
    # ViT-S/16 bf16 of fp32 to fp32: 24.9 µs, rule 24.9, floor 12.3; predicted, 2026-11-27
    ("patch_embed", "sm_90", 384, 3, 16, 16, F32, False, BF16, F32, 14): GemmTiles(128, 128, 4, 16, 8, 3),
    # ViT-S/16 bf16 of uint8 to fp32: 20.3 µs, rule 20.3, floor 7.5; predicted, 2026-11-27
    ("patch_embed", "sm_90", 384, 3, 16, 16, U8, True, BF16, F32, 14): GemmTiles(128, 128, 4, 16, 8, 3),
    # bf16 of bf16 to bf16: 32.5 µs, rule 32.5, floor 15.0; predicted, 2026-11-27
    ("patch_embed", "sm_90", 768, 3, 16, 16, BF16, False, BF16, BF16, 14): GemmTiles(128, 128, 4, 16, 8, 3),
    # bf16 of fp32 to fp32: 47.8 µs, rule 47.8, floor 16.6; predicted, 2026-11-27
    ("patch_embed", "sm_90", 768, 3, 16, 16, F32, False, BF16, F32, 14): GemmTiles(128, 128, 4, 16, 8, 3),
    # fp32 of fp32 to fp32: 143.9 µs, rule 156.7, floor 16.9; predicted, 2026-11-27
    ("patch_embed", "sm_90", 768, 3, 16, 16, F32, False, F32, F32, 14): GemmTiles(64, 64, 2, 16, 4, 3),
    # bf16 of uint8 to fp32: 32.5 µs, rule 32.5, floor 15.0; predicted, 2026-11-27
    ("patch_embed", "sm_90", 768, 3, 16, 16, U8, True, BF16, F32, 14): GemmTiles(128, 128, 4, 16, 8, 3),
    # bf16 of uint8 and fp32: 20.2 µs, rule 36.1, floor 8.2; predicted, 2026-11-27
    ("position_gradient", "sm_90", 768, 4, 14): RowTiles(8, 256, 2),
    # uint8 batch: 326.3 µs, rule 412.6, floor 26.1; predicted, 2026-11-27
    ("random_resized_crop", "sm_90", 224, 224, False, 10): CropTiles(32, 32, 16, 2),
    # uint8 packed: 326.3 µs, rule 412.6, floor 26.1; predicted, 2026-11-27
    ("random_resized_crop", "sm_90", 224, 224, True, 10): CropTiles(32, 32, 16, 2),
    # bf16: 29.1 µs, rule 29.1, floor 24.4; predicted, 2026-11-27
    ("scatter_mask_tokens", "sm_90", 512, 2, 4, 14): RowTiles(4, 512, 4),
    # fp32: 32.2 µs, rule 32.2, floor 27.1; predicted, 2026-11-27
    ("scatter_mask_tokens", "sm_90", 512, 4, 4, 14): RowTiles(4, 512, 4),
    # bf16: 30.8 µs, rule 30.8, floor 24.3; predicted, 2026-11-27
    ("scatter_mask_tokens_backward", "sm_90", 512, 4, 2, False, 14): RowTiles(4, 512, 4),
    # bf16 learned positions: 34.7 µs, rule 41.1, floor 24.4; predicted, 2026-11-27
    ("scatter_mask_tokens_backward", "sm_90", 512, 4, 2, True, 14): RowTiles(2, 512, 1),
    # fp32: 32.5 µs, rule 39.1, floor 27.1; predicted, 2026-11-27
    ("scatter_mask_tokens_backward", "sm_90", 512, 4, 4, False, 14): RowTiles(8, 128, 1),
    # ViT-L/16 bf16 of bf16 and bf16: 42.7 µs, rule 42.7, floor 20.0; predicted, 2026-11-27
    ("weight_gradient", "sm_90", 1024, 3, 16, 16, BF16, False, BF16, BF16, 14): GemmTiles(64, 128, 8, 16, 8, 3),
    # ViT-L/16 bf16 of fp32 and fp32: 82.4 µs, rule 82.4, floor 20.0; predicted, 2026-11-27
    ("weight_gradient", "sm_90", 1024, 3, 16, 16, F32, False, BF16, F32, 14): GemmTiles(32, 128, 8, 16, 8, 3),
    # ViT-L/16 bf16 of uint8 and fp32: 43.6 µs, rule 69.9, floor 20.0; predicted, 2026-11-27
    ("weight_gradient", "sm_90", 1024, 3, 16, 16, U8, True, BF16, F32, 14): GemmTiles(64, 64, 16, 16, 8, 4),
    # ViT-H/14 bf16 of bf16 and bf16: 63.0 µs, rule 63.0, floor 25.0; predicted, 2026-11-27
    ("weight_gradient", "sm_90", 1280, 3, 14, 14, BF16, False, BF16, BF16, 14): GemmTiles(64, 128, 8, 16, 8, 3),
    # ViT-H/14 bf16 of uint8 and fp32: 109.4 µs, rule 109.4, floor 25.0; predicted, 2026-11-27
    ("weight_gradient", "sm_90", 1280, 3, 14, 14, U8, True, BF16, F32, 14): GemmTiles(32, 128, 8, 16, 8, 3),
    # ViT-S/16 bf16 of bf16 and bf16: 17.5 µs, rule 17.5, floor 7.5; predicted, 2026-11-27
    ("weight_gradient", "sm_90", 384, 3, 16, 16, BF16, False, BF16, BF16, 14): GemmTiles(64, 128, 8, 16, 8, 3),
    # ViT-S/16 bf16 of fp32 and fp32: 31.9 µs, rule 31.9, floor 12.3; predicted, 2026-11-27
    ("weight_gradient", "sm_90", 384, 3, 16, 16, F32, False, BF16, F32, 14): GemmTiles(32, 128, 8, 16, 8, 3),
    # ViT-S/16 bf16 of uint8 and fp32: 20.7 µs, rule 29.1, floor 7.5; predicted, 2026-11-27
    ("weight_gradient", "sm_90", 384, 3, 16, 16, U8, True, BF16, F32, 14): GemmTiles(32, 128, 8, 16, 8, 5),
    # bf16 of bf16 and bf16: 31.9 µs, rule 31.9, floor 15.0; predicted, 2026-11-27
    ("weight_gradient", "sm_90", 768, 3, 16, 16, BF16, False, BF16, BF16, 14): GemmTiles(64, 128, 8, 16, 8, 3),
    # bf16 of fp32 and fp32: 61.8 µs, rule 61.8, floor 16.6; predicted, 2026-11-27
    ("weight_gradient", "sm_90", 768, 3, 16, 16, F32, False, BF16, F32, 14): GemmTiles(32, 128, 8, 16, 8, 3),
    # fp32 of fp32 and fp32: 317.8 µs, rule 317.8, floor 16.6; predicted, 2026-11-27
    ("weight_gradient", "sm_90", 768, 3, 16, 16, F32, False, F32, F32, 14): GemmTiles(32, 64, 4, 16, 4, 2),
    # bf16 of uint8 and fp32: 31.9 µs, rule 51.5, floor 15.0; predicted, 2026-11-27
    ("weight_gradient", "sm_90", 768, 3, 16, 16, U8, True, BF16, F32, 14): GemmTiles(64, 64, 16, 16, 8, 4),
}
