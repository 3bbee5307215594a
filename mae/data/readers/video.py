"""Videos, read with PyAV."""

from PIL import Image

from mae.data.errors import DataError, counted
from mae.data.readers.reading import Reading, Wanted
from mae.data.readers.stored import Stored

try:
    import av
except ImportError:
    av = None  # type: ignore[assignment]  # in the module's place

_PACKAGE = "the package av: pip install 'mae_kernels[video]'"


def read(file: Stored, reading: Reading, wanted: Wanted) -> list[Image.Image]:
    """Frames in the order in which they are shown; none before the last key frame that is needed is decoded."""
    if av is None:
        raise DataError(f"it is a video, which needs {_PACKAGE}")
    with av.open(file.openable(), "r") as container:
        if not container.streams.video:
            raise DataError("it holds no video")
        stream = container.streams.video[0]
        reading.check_size(stream.height, stream.width)
        times = sorted(p.pts for p in container.demux(stream) if p.pts is not None and not p.is_discard)
        chosen = times[reading.clip(len(times), wanted.start)]
        container.seek(chosen[0], stream=stream)
        frames = {}
        for frame in container.decode(stream):
            if frame.pts in chosen:
                frames[frame.pts] = frame.to_image().rotate(frame.rotation, expand=True)
            if len(frames) == len(chosen):
                return [frames[time] for time in chosen]
        raise DataError(f"only {len(frames)} of {counted(len(chosen), 'frame')} can be decoded")


def missing() -> str:
    return "" if av else _PACKAGE
