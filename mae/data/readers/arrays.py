"""Arrays that NumPy wrote."""

from pathlib import Path
from typing import Literal

import numpy as np

from mae.data.errors import DataError, counted
from mae.data.readers.reading import Reading, Wanted
from mae.data.readers.stored import Stored
from mae.data.readers.values import Values


def read(file: Stored, reading: Reading, wanted: Wanted) -> Values:
    """``[H, W]``, ``[H, W, C]`` or ``[C, H, W]``, with T before H for a model of frames; its channels say which."""
    # A model of frames needs a few of a long file.
    mode: Literal["r"] | None = "r" if isinstance(file.held, Path) else None
    values = np.load(file.openable(), mmap_mode=mode, allow_pickle=False)
    if not isinstance(values, np.ndarray):
        with values as arrays:
            if len(arrays) != 1:
                raise DataError(f"it holds {counted(len(arrays), 'array')}, not one: {', '.join(arrays)}")
            (values,) = arrays.values()
    shape, sides = values.shape, 2 + (reading.frames > 1)
    if values.ndim == sides:
        if sides == 3 and shape[2] == 3:
            raise DataError(f"its shape is {shape}: it is one picture in colours, not {reading.frames} frames")
        values = values[None]
    elif values.ndim == sides + 1:
        counts = [reading.channels] + [c for c in (1, 3) if c != reading.channels and reading.channels in (1, 3)]
        axes = next(filter(None, ([a for a in (0, sides) if shape[a] == count] for count in counts)), [])
        if len(axes) > 1:
            raise DataError(f"its shape is {shape}: its first axis could be the channels, and its last one too")
        if not axes:
            raise DataError(
                f"its shape is {shape}: it has {shape[0]} or {shape[-1]} channels, and the model takes "
                f"{reading.channels}"
            )
        values = np.moveaxis(values, axes[0], 0)
    else:
        raise DataError(
            f"its shape is {shape}: it has {counted(values.ndim, 'axis', 'axes')}, not {sides} or {sides + 1}"
        )
    reading.check_size(*values.shape[-2:])
    reading.check_channels(len(values))
    values = values.reshape(len(values), -1, *values.shape[-2:])  # [C, T, H, W]
    return Values(values[:, reading.clip(values.shape[1], wanted.start)])
