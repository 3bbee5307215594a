"""TIFFs of many bands, pages or kinds, as microscopes and satellites write them."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, UnidentifiedImageError

from mae.data.errors import DataError
from mae.data.readers import pillow
from mae.data.readers.reading import Reading, Wanted
from mae.data.readers.stored import Stored
from mae.data.readers.values import (
    BITS,
    EXTRA_SAMPLES,
    ORIENTATION,
    PHOTOMETRIC,
    PLANAR,
    SAMPLE_FORMAT,
    SAMPLES,
    SUBFILE,
    Values,
    alpha_of,
    interpreted,
    upright,
)

try:
    import tifffile
except ImportError:
    tifffile = None  # type: ignore[assignment]  # in the module's place

_COLOURS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3, 8: 3}  # samples of each photometric interpretation


def read(file: Stored, reading: Reading, wanted: Wanted) -> Sequence[Image.Image] | Values:
    """Pillow where it gives all that the file holds, tifffile elsewhere. Pages are frames, for a model of one channels.

    Axes that the file calls samples or channels are channels for every model.
    """
    beyond = _beyond_pillow(file)
    if not beyond:
        return pillow.read(file, reading, wanted)
    if tifffile is None:
        raise DataError(f"it {beyond}, which needs the package tifffile: pip install 'mae_kernels[multiband]'")
    with tifffile.TiffFile(file.openable()) as tiff:
        series, *others = tiff.series
        # Overviews and masks repeat the picture; anything else would be cut away.
        stack = [series, *(s for s in others if not s.keyframe.subfiletype & 5)]
        if len(kinds := [*dict.fromkeys(map(_kind, stack))]) > 1:
            raise DataError(f"its pages are of different kinds: {kinds[0]} and {kinds[1]}")
        axes = "I" + series.axes  # of a stack of series, I for image
        if not {"Y", "X"} <= {*axes}:
            raise DataError(f"tifffile finds no rows and columns in its axes {series.axes!r}")
        sizes = (len(stack), *series.shape)
        rows, columns = axes.index("Y"), axes.index("X")
        height, width = sizes[rows], sizes[columns]
        reading.check_size(height, width)
        page = series.keyframe
        if page.photometric not in (0, 1, 2) and not (page.photometric == 6 and page.compression in (6, 7)):
            raise DataError(f"its photometric interpretation {_name(page.photometric)} is not known here")
        others = [i for i, axis in enumerate(axes) if axis not in "YX"]
        planes = [i for i in others if reading.frames == 1 or axes[i] in "SC"]
        frames = [i for i in others if i not in planes]
        if sum(sizes[i] > 1 for i in frames) > 1:
            raise DataError(f"more than one of its axes {series.axes!r} could be the frames")
        channels = math.prod(sizes[i] for i in planes)
        has_alpha = page.extrasamples in ((1,), (2,)) and reading.channels in (1, 3)
        reading.check_channels(channels - has_alpha)
        clip = reading.clip(math.prod(sizes[i] for i in frames), wanted.start)
        try:
            values = np.stack([s.asarray() for s in stack])
        except ValueError as error:
            if "imagecodecs" not in str(error):
                raise
            raise DataError(
                f"it {beyond}, and {_name(page.compression)} needs the package imagecodecs: "
                "pip install 'mae_kernels[multiband]'"
            ) from error
        values = values.transpose(*planes, *frames, rows, columns)
        values = values.reshape(channels, -1, height, width)[:, clip]
        if 1 < page.bitspersample < 8:
            values = values * np.uint8(255 // (2**page.bitspersample - 1))
        tags = {tag.code: tag.value for tag in page.tags}
        colours = interpreted(values[: channels - has_alpha], tags)
        return upright(Values(colours, alpha_of(values[-1]) if has_alpha else None), tags.get(ORIENTATION))


def _kind(series: "tifffile.TiffPageSeries") -> str:
    page = series.keyframe
    return f"{series.shape} {series.dtype} {_name(page.photometric)} {_name(page.compression)}"


def _name(code: int) -> str:
    """Of a number that TIFF defines, such as ``"LZW"``."""
    return getattr(code, "name", f"{code}")


def _beyond_pillow(file: Stored) -> str:
    """What Pillow would leave out of a TIFF, or cannot read; empty where it gives everything."""
    try:
        with pillow.opened(file) as image:
            tags, mode = dict(image.tag_v2), image.mode
            for page in range(1, image.n_frames):
                image.seek(page)
                if not image.tag_v2.get(SUBFILE, 0) & 5:  # neither an overview nor a mask
                    return "has more than one page"
    except UnidentifiedImageError:
        return "has pixels that Pillow does not know"
    samples, formats = tags.get(SAMPLES, 1), tags.get(SAMPLE_FORMAT, (1,))
    alphas = sum(extra in (1, 2) for extra in tags.get(EXTRA_SAMPLES, ()))
    if alphas > 1 or samples != _COLOURS.get(tags.get(PHOTOMETRIC, -1), 1) + alphas:
        return f"has {samples} values a pixel that are not all colours"
    if not mode.startswith(("I", "F")) and any(f not in (1, 4) for f in formats):
        return "has signed values"
    if tags.get(PLANAR) == 2 and max(tags.get(BITS, (1,))) > 8:
        return "has planes of more than 8 bits"
    return ""
