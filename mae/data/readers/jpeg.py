"""JPEGs, decoded by simplejpeg where it is installed.

It asks libjpeg-turbo for the pixels that Pillow asks it for, and leaves them where they were decoded: Pillow's images
take four bytes for each three, and are copied when they become arrays.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from mae.data.readers import pillow
from mae.data.readers.reading import Reading, Wanted
from mae.data.readers.stored import Stored
from mae.data.readers.values import ORIENTATION, Values

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

_COLOURS = {"L": "GRAY", "RGB": "RGB"}  # others are inks


def read(file: Stored, reading: Reading, wanted: Wanted) -> Sequence[Image.Image | np.ndarray] | Values:
    """Pillow where a JPEG is more than its pixels, is shrunk, which takes either as long, or is damaged."""
    if simplejpeg is None:
        return pillow.read(file, reading, wanted)
    with file.open() as stream:
        file = Stored(stream.read(), file.name)
    with pillow.opened(file) as image:
        reading.check_size(image.height, image.width)
        colours = _COLOURS.get(image.mode) if image.format == "JPEG" else None  # an MPO is several
        is_whole = reading.frames == 1 and wanted.shrink(image.height, image.width) == 1
        if colours and is_whole and image.getexif().get(ORIENTATION, 1) == 1:
            try:
                pixels = simplejpeg.decode_jpeg(file.held, colours)
                return (pixels[..., 0] if colours == "GRAY" else pixels,)
            except ValueError:  # Pillow knows which damage leaves a picture
                pass
    return pillow.read(file, reading, wanted)
