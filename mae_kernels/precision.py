"""The precision in which statistics, losses and gradients of parameters are computed."""

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else, half precision included."""
    return torch.float64 if dtype == torch.float64 else torch.float32
