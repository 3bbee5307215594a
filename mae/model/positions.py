"""Position embeddings of a grid of patches: sines and cosines, and any table for another grid."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mae_kernels.precision import accumulation_dtype


def sincos_pos_embed(dim: int, grid: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """The fixed position embedding: sines, then cosines, of the coordinates of each patch.

    ``table[l] = [sin(w x), cos(w x), sin(w y), cos(w y), sin(w t), cos(w t)]`` for column x, row y and frame t, with
    ``w[i] = 10000 ** (-i / n)`` for ``i < n``.

    Args:
        dim: channels D, even. Of a grid of two sides each coordinate takes D / 2 (D is then a multiple of 4); of three
            sides column and row take ``2 * (D // 6)`` each, and the frame takes the rest.
        grid: patches along height and width, or along time, height and width.
        device: where the table is made, in float64.

    Returns:
        ``[L, D]`` float32, patches in row-major order of the grid.

    Source: Vaswani et al. 2017, section 3.5; two sides in this order: the code of He et al. 2021.
    """
    part = 2 * (dim // (2 * len(grid)))  # channels of a coordinate, half of them sines
    parts = []
    for axis, size in reversed([*enumerate(grid)]):
        width = part if axis else dim - part * (len(grid) - 1)
        exponents = torch.linspace(0, 1, width // 2 + 1, dtype=torch.float64, device=device)[:-1]
        angle = torch.arange(size, dtype=torch.float64, device=device)[:, None] * 10000**-exponents
        waves = torch.cat([angle.sin(), angle.cos()], dim=1).float()  # [size, width]
        shape = [1] * len(grid)
        shape[axis] = size
        parts.append(waves.view(*shape, width).expand(*grid, width))
    return torch.cat(parts, dim=-1).flatten(0, -2)


def resample_pos_embed(table: Tensor, old_grid: Sequence[int], new_grid: Sequence[int], num_prefix: int = 1) -> Tensor:
    """A position embedding for another grid: bicubic with antialiasing along each side, rows of the prefix as they are.

    Time is resampled like height and width: one filter for every side, and fewer frames are averages, not a choice.

    Args:
        table: ``[1, R + L, D]`` floating.
        old_grid: two or three sides, of which L is the product.
        new_grid: as many sides.
        num_prefix: R, rows of the class token and registers, which come first.

    Returns:
        ``[1, R + L', D]`` in the table's dtype, computed in float32 (float64 for float64); the table itself for an
        equal grid.

    Source: two sides are those of timm's ``resample_abs_pos_embed``.
    """
    if tuple(old_grid) == tuple(new_grid):
        return table
    rows = table[0, num_prefix:].to(accumulation_dtype(table.dtype))
    *old_frames, height, width = old_grid
    x = rows.view(-1, height, width, rows.shape[1]).permute(0, 3, 1, 2)  # [T, D, H, W]
    x = F.interpolate(x, tuple(new_grid[-2:]), mode="bicubic", antialias=True)
    if old_frames:
        x = x.flatten(2).transpose(0, 1)[None]  # [1, D, T, H' W']
        x = F.interpolate(x, (new_grid[0], x.shape[3]), mode="bicubic", antialias=True)
        x = x[0].transpose(0, 1)  # [T', D, H' W']
    x = x.flatten(2).transpose(1, 2).reshape(1, -1, rows.shape[1]).to(table.dtype)
    return torch.cat([table[:, :num_prefix], x], dim=1)


def pos_embed_for(table: Tensor, old_grid: Sequence[int], new_grid: Sequence[int], num_prefix: int = 1) -> Tensor:
    """The position embedding of another grid: computed anew where it is of sines and cosines, and resampled elsewhere.

    Which of them it is, the table's numbers say where they lie: nothing is read back, and a graph holds both ways.

    Arguments and result: as of :func:`resample_pos_embed`.
    """
    if tuple(old_grid) == tuple(new_grid):
        return table
    device = "cpu" if table.device.type == "mps" else table.device  # MPS has no float64
    old, new = (sincos_pos_embed(table.shape[2], grid, device).to(table) for grid in (old_grid, new_grid))
    tolerance = max(1e-4, torch.finfo(table.dtype).eps)  # of tables that were computed in float32, or rounded
    is_computed = (table[0, num_prefix:] - old).abs().amax() <= tolerance
    resampled = resample_pos_embed(table, old_grid, new_grid, num_prefix)
    computed = torch.cat([table[0, :num_prefix], new])[None]
    return torch.where(is_computed, computed, resampled)
