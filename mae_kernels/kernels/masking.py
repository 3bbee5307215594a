"""Random masking: a stable argsort of the noise and its inverse in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .host import cdiv, next_power_of_2
from .tiles import BlockTiles

# Larger rows are sorted by PyTorch: the sort of 4096 keys takes seconds to compile already.
MAX_PATCHES = 4096


@triton.jit
def _write_ids(
    p_ids_keep, p_ids_mask, p_ids_restore, p_mask,
    p_counts, n, i, patch, num_patches, num_keep, num_mask,
):  # fmt: skip
    # Patch number ``patch`` of sample n stands at place i of the shuffled order, whose first ``visible`` are visible.
    visible = num_keep
    if p_counts is not None:
        visible = tl.minimum(tl.maximum(tl.load(p_counts + n), 1), num_keep).to(tl.int32)
    m_i = i < num_patches
    is_hidden = i >= visible
    tl.store(p_ids_keep + n * num_keep + i, tl.where(is_hidden, -1, patch), mask=i < num_keep)
    tl.store(p_ids_mask + n * num_mask + (i - visible), patch, mask=m_i & is_hidden)
    # The places of ids_mask that are left lie at its end.
    tl.store(p_ids_mask + (n + 1) * num_mask - 1 - i, -1, mask=i < num_mask - num_patches + visible)
    place = tl.where(is_hidden, i + num_keep - visible, i)
    tl.store(p_ids_restore + n * num_patches + patch, place.to(tl.int64), mask=m_i)
    tl.store(p_mask + n * num_patches + patch, is_hidden, mask=m_i)


@triton.jit
def masking_kernel(
    p_noise, p_counts, p_ids_keep, p_ids_mask, p_ids_restore, p_mask,
    num_patches, num_keep, num_mask,
    s_n, s_l,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """ids_shuffle = argsort(noise), stable; its first counts[n] are ids_keep, the others ids_mask, each with -1 behind.

    ids_restore = where in (ids_keep, ids_mask) each patch stands; mask = ids_restore >= num_keep.
    """
    n = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)  # [BLOCK]
    m_i = i < num_patches
    noise = tl.load(p_noise + n * s_n + i * s_l, mask=m_i, other=0).to(tl.float32) + 0.0  # -0.0 ties with 0.0
    # Flipped bits order like the numbers; NaN sorts last, padding behind it.
    bits = noise.to(tl.uint32, bitcast=True)
    bits = tl.where(bits >> 31 == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    bits = tl.where(m_i & (noise == noise), bits, 0xFFFFFFFF)
    # The index in the low half makes every key unique, hence the order stable.
    key = tl.sort((bits.to(tl.uint64) << 32) | i.to(tl.uint64))
    patch = (key & 0xFFFFFFFF).to(tl.int64)
    _write_ids(
        p_ids_keep, p_ids_mask, p_ids_restore, p_mask,
        p_counts, n, i, patch, num_patches, num_keep, num_mask,
    )  # fmt: skip


@triton.jit
def masking_of_order_kernel(
    p_ids_shuffle, p_counts, p_ids_keep, p_ids_mask, p_ids_restore, p_mask,
    num_patches, num_keep, num_mask,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The same results from a given ids_shuffle."""
    n = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    patch = tl.load(p_ids_shuffle + n * num_patches + i, mask=i < num_patches, other=0)
    _write_ids(
        p_ids_keep, p_ids_mask, p_ids_restore, p_mask,
        p_counts, n, i, patch, num_patches, num_keep, num_mask,
    )  # fmt: skip


def masking(noise: Tensor, counts: Tensor | None, num_keep: int, num_mask: int) -> tuple[Tensor, ...]:
    n, num_patches = noise.shape
    ids_keep = noise.new_empty((n, num_keep), dtype=torch.int64)
    ids_mask = noise.new_empty((n, num_mask), dtype=torch.int64)
    ids_restore = noise.new_empty((n, num_patches), dtype=torch.int64)
    mask = noise.new_empty((n, num_patches), dtype=torch.bool)
    results = (ids_keep, ids_mask, ids_restore, mask)
    counts = counts if counts is None else counts.contiguous()  # read without a stride
    sizes = num_patches, num_keep, num_mask
    if num_patches > MAX_PATCHES:
        ids_shuffle = torch.sort(noise.contiguous(), dim=1, stable=True).indices
        tiles = order_tiles()
        masking_of_order_kernel[(n, cdiv(num_patches, tiles.values))](
            ids_shuffle, counts, *results, *sizes, BLOCK=tiles.values, num_warps=tiles.num_warps
        )
        return results
    tiles = sort_tiles(num_patches)
    masking_kernel[(n,)](
        noise, counts, *results, *sizes, *noise.stride(), BLOCK=tiles.values, num_warps=tiles.num_warps
    )
    return results


def sort_tiles(num_patches: int) -> BlockTiles:
    block = max(next_power_of_2(num_patches), 16)
    # 196 patches take 32 registers, and 256 rows of them 3 µs on an H200; 1568 take at most 76 registers.
    return BlockTiles(block, num_warps=min(max(block // 64, 1), 4) if block <= 1024 else block // 256)


def order_tiles() -> BlockTiles:
    return BlockTiles(values=1024, num_warps=4)
