"""Token sequences as one table of rows, so that every selection is a single ``index_select``."""

from typing import TypeVar

import torch
from torch import Tensor

_Ids = TypeVar("_Ids", Tensor, Tensor | None)


def as_rows(tokens: Tensor) -> tuple[Tensor, int]:
    """View ``[N, T, D]`` as a table ``[rows, D]`` in which token ``t`` of sample ``n`` is row ``n * step + t``.

    Slices such as ``x[:, 1:]`` are viewed, not copied; sequences without such a view are made contiguous.
    """
    n, t, d = tokens.shape
    stride_n, stride_t, stride_d = tokens.stride()
    if stride_d != 1 or stride_t < d or stride_n % stride_t or stride_n < t * stride_t:
        tokens, stride_n, stride_t = tokens.contiguous(), t * d, d
    step = stride_n // stride_t
    rows = (n - 1) * step + t
    return tokens.as_strided((rows, d), (stride_t, 1)), step


def row_ids(ids: Tensor, step: int, first: int = 0) -> Tensor:
    """Rows ``n * step + first + ids[n, k]`` of the table, flattened to ``[N * K]``."""
    starts = torch.arange(first, first + ids.shape[0] * step, step, device=ids.device)  # [N]
    return (ids + starts[:, None]).flatten()


def without_padding(ids: _Ids) -> tuple[_Ids, Tensor | None]:
    """The ids with 0 in place of each -1, and where those stood, ``[N, K, 1]``; None where none is -1.

    On a device that would have to be waited for nobody looks, and the second result is never None.
    """
    if ids is None or (ids.device.type == "cpu" and (ids.numel() == 0 or ids.min().item() >= 0)):
        return ids, None
    return ids.clamp(min=0), (ids < 0)[:, :, None]
