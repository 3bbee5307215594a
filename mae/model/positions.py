"""Position embeddings: fixed ones of sines and cosines."""

import torch
from torch import Tensor


def sincos_pos_embed(dim: int, grid_size: tuple[int, int]) -> Tensor:
    """Fixed position embedding ``[L, dim]``: the first half of the channels encodes the column, the second the row."""
    frequency = 10000 ** -torch.linspace(0, 1, dim // 4 + 1, dtype=torch.float64)[:-1]  # [dim / 4]
    rows, columns = (torch.arange(size, dtype=torch.float64) for size in grid_size)
    rows, columns = torch.meshgrid(rows, columns, indexing="ij")
    halves = []
    for position in (columns, rows):
        angle = position.flatten()[:, None] * frequency  # [L, dim / 4]
        halves += [angle.sin(), angle.cos()]
    return torch.cat(halves, dim=1).float()
