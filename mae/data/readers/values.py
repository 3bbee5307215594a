"""Numbers of a file that are not plain 8 bits, black below white and the right way up."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np

# Tags of TIFFs, and of EXIF the orientation.
SUBFILE, BITS, PHOTOMETRIC, SAMPLES, PLANAR, EXTRA_SAMPLES, SAMPLE_FORMAT = 254, 258, 262, 277, 284, 338, 339
GDAL_NODATA, ORIENTATION = 42113, 274


class Values(NamedTuple):
    """What a reader found in a file whose pixels are not plain 8 bits."""

    values: np.ndarray  # [C, H, W] or [C, T, H, W] of any dtype; nodata is masked (numpy.ma)
    alpha: np.ndarray | None = None  # [H, W] or [T, H, W] uint8, 0 is transparent
    is_sound: bool = False  # of the model's size, see mae.data.sound


def interpreted(values: np.ndarray, tags: Mapping[int, Any]) -> np.ndarray:
    """Numbers of a TIFF with black below white, and those masked that are, as GDAL writes it, no values."""
    with suppress(TypeError, ValueError), np.errstate(over="ignore"):
        values = np.ma.masked_where(values == float(tags.get(GDAL_NODATA, "")), values, copy=False)
    if tags.get(PHOTOMETRIC) == 0:
        return 1 - values if values.dtype.kind == "f" else ~values
    return values


def alpha_of(values: np.ndarray) -> np.ndarray:
    """As uint8. The largest value tells which one is opaque: colours of 12 bits in 16 have an alpha of as many."""
    highest = np.nan_to_num(values).max()
    most = np.iinfo(values.dtype).max if values.dtype.kind in "ui" else highest
    opaque = next((x for x in (1, 255, 1023, 4095, 16383, 65535) if highest <= x < most), most) or 1
    return (np.nan_to_num(values) / opaque * 255).clip(0, 255).round().astype(np.uint8)


def upright(stored: Values, orientation: int | None) -> Values:
    turn = _TURNS.get(orientation or 1, lambda x: x)
    return Values(turn(stored.values), stored.alpha if stored.alpha is None else turn(stored.alpha))


# What the EXIF orientation asks for, of [..., H, W].
_TURNS = {
    2: lambda x: x[..., ::-1],
    3: lambda x: x[..., ::-1, ::-1],
    4: lambda x: x[..., ::-1, :],
    5: lambda x: x.swapaxes(-1, -2),
    6: lambda x: x[..., ::-1, :].swapaxes(-1, -2),
    7: lambda x: x[..., ::-1, ::-1].swapaxes(-1, -2),
    8: lambda x: x[..., ::-1].swapaxes(-1, -2),
}
