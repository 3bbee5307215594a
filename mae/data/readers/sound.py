"""Sound as spectrograms: WAV files with SciPy, others with soundfile."""

from collections.abc import Callable

import numpy as np
from scipy.io import wavfile

from mae.data.errors import DataError, counted
from mae.data.readers.reading import Reading, Wanted
from mae.data.readers.stored import Stored
from mae.data.readers.values import Values
from mae.data.sound import HOP, RATE, WINDOW, below_loudest, mono, spectrogram

try:
    import soundfile
except (ImportError, OSError):  # OSError: the package is there, and the library that it wraps is not
    soundfile = None

_PACKAGE = "the package soundfile: pip install 'mae_kernels[audio]'"


def read_wav(file: Stored, reading: Reading, wanted: Wanted) -> Values:
    rate, samples = wavfile.read(file.openable())
    return _heard(len(samples), rate, lambda begin, count: samples[begin : begin + count], reading, wanted)


def read(file: Stored, reading: Reading, wanted: Wanted) -> Values:
    if soundfile is None:
        raise DataError(f"it is sound, which needs {_PACKAGE}")
    with soundfile.SoundFile(file.openable()) as sound:

        def read(begin: int, count: int) -> np.ndarray:
            sound.seek(begin)
            return sound.read(count)

        return _heard(sound.frames, sound.samplerate, read, reading, wanted)


def _heard(count: int, rate: int, read: Callable[[int, int], np.ndarray], reading: Reading, wanted: Wanted) -> Values:
    """The spectrogram of as many samples as the model has columns for, ``read`` giving those from one place on."""
    if (reading.channels, reading.frames) != (1, 1):
        raise DataError("it is sound, which takes a model of one channel and no frames")
    *_, bands, columns = reading.image_size
    if count * RATE < WINDOW * rate:
        raise DataError(f"it has {counted(count, 'sample')}, fewer than a window of {WINDOW / RATE:g} s")
    place = wanted.start(max((count * RATE // rate - WINDOW) // HOP + 1 - columns, 0) + 1)
    length = (columns - 1) * HOP + WINDOW
    samples = read(place * HOP * rate // RATE, -(-length * rate // RATE))
    levels = spectrogram(mono(samples, rate), bands, columns)
    return Values((levels if reading.value_range else below_loudest(levels))[None], is_sound=True)


def missing() -> str:
    return "" if soundfile else _PACKAGE
