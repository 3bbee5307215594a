"""The precision of sums, and that of products under autocast."""

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of statistics, losses and gradients of parameters: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast casts to on a device, None where it is off."""
    try:
        return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    except RuntimeError:  # the device knows no autocast
        return None
