"""The chips that launches are tiled for."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
import triton

CHIPS = ("sm_80", "sm_90", "sm_100", "gfx942")

_assumed: str | None = None


@contextmanager
def assume(chip: str) -> Iterator[None]:
    """Tile for a chip that may not be in this machine."""
    global _assumed
    previous, _assumed = _assumed, chip
    try:
        yield
    finally:
        _assumed = previous


def chip_of(device: torch.device) -> str:
    """The entry of CHIPS whose tiles a device takes: its own generation's, or that of the nearest one before it."""
    return _assumed or _chip_of(device)


@cache
def _chip_of(device: torch.device) -> str:
    if torch.version.hip:
        return "gfx942"
    if triton.knobs.runtime.interpret:
        return "sm_90"
    major, _ = torch.cuda.get_device_capability(device)
    return {8: "sm_80", 9: "sm_90"}.get(major, "sm_100")
