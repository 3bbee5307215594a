"""The chips that launches are tiled for."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
import triton


@dataclass(frozen=True)
class Chip:
    tiles: str  # the generation whose tiles it takes
    shared_kib: int  # of memory that one program may use


CHIPS = {
    "sm_80": Chip("sm_80", 163),
    "sm_86": Chip("sm_80", 99),
    "sm_90": Chip("sm_90", 227),
    "sm_100": Chip("sm_100", 227),
    "sm_120": Chip("sm_100", 99),
    "gfx942": Chip("gfx942", 64),
}

_assumed: str | None = None


@contextmanager
def assume(chip: str) -> Iterator[None]:
    """Tile for a chip of CHIPS that may not be in this machine."""
    global _assumed
    previous, _assumed = _assumed, CHIPS[chip].tiles
    try:
        yield
    finally:
        _assumed = previous


def chip_of(device: torch.device) -> str:
    """The generation whose tiles a device takes: that of its chip in CHIPS, or of the nearest one before it."""
    return _assumed or _chip_of(device)


@cache
def _chip_of(device: torch.device) -> str:
    if torch.version.hip:
        return "gfx942"
    if triton.knobs.runtime.interpret:
        return "sm_90"
    major, minor = torch.cuda.get_device_capability(device)
    known = [int(chip[3:]) for chip in CHIPS if chip.startswith("sm_")]
    return CHIPS[f"sm_{max(n for n in known if n <= 10 * major + minor)}"].tiles
