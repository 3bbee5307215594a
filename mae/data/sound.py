"""Sound as pictures: log-mel spectrograms, time to the right and frequency upwards."""

import numpy as np

RATE = 16_000  # samples a second, to which every sound is brought: frequencies up to 8 kHz are seen
WINDOW, HOP = 400, 160  # samples, 25 and 10 ms, as in AudioMAE
_LOWEST, _RANGE = -100, 80  # dB


def mono(samples: np.ndarray, rate: int) -> np.ndarray:
    """``[n]`` at RATE, of samples ``[m]`` or ``[m, channels]`` at rate; whole numbers are brought to [-1, 1]."""
    from scipy.signal import resample_poly  # here, because a second of every command would go into it

    if samples.dtype.kind in "iu":
        ends = np.iinfo(samples.dtype)
        samples = (samples - (ends.max + ends.min + 1) / 2) / ((ends.max - ends.min + 1) / 2)
    return resample_poly(samples.reshape(len(samples), -1).mean(1, dtype=np.float64), RATE, rate)


def spectrogram(samples: np.ndarray, bands: int, columns: int) -> np.ndarray:
    """``[bands, columns]``: mean power of each mel band in dB, the highest band in row 0.

    Column j is the Hann window of 25 ms that begins at 10 ms times j; silence follows where the samples end. 0 dB is
    the peak of a sine between -1 and 1. The bands are triangles between 0 and 8 kHz, equally wide in mel,
    ``2595 log10(1 + f / 700)``.
    """
    from scipy.signal import get_window

    samples = np.pad(samples, (0, max(0, (columns - 1) * HOP + WINDOW - len(samples))))
    frames = np.lib.stride_tricks.sliding_window_view(samples, WINDOW)[::HOP][:columns]
    window = get_window("hann", WINDOW)
    points = max(512, 1 << (8 * bands - 1).bit_length())  # as many as put a frequency into the lowest, narrowest band
    amplitudes = np.fft.rfft(frames * window * (2 / window.sum()), points)
    borders = 700 * np.expm1(np.linspace(0, np.log1p(RATE / 2 / 700), bands + 2))
    low, peak, high = borders[:-2, None], borders[1:-1, None], borders[2:, None]
    frequencies = np.fft.rfftfreq(points, 1 / RATE)
    triangles = np.minimum((frequencies - low) / (peak - low), (high - frequencies) / (high - peak)).clip(min=0)
    powers = triangles / triangles.sum(axis=1, keepdims=True) @ np.square(np.abs(amplitudes)).T
    return 10 * np.log10(powers.clip(min=10 ** (_LOWEST / 10)))[::-1]


def row_of(frequency: float, bands: int) -> float:
    """Where a frequency in Hz lies in a spectrogram of so many bands, in rows from the middle of row 0 on."""
    return bands - (bands + 1) * np.log1p(frequency / 700) / np.log1p(RATE / 2 / 700)


def below_loudest(levels: np.ndarray) -> np.ndarray:
    """Levels in dB brought to [0, 1], of which 0 is 80 dB below the loudest one, and never below -100 dB."""
    loudest = max(np.nanmax(levels), _LOWEST + _RANGE)
    return ((levels - loudest) / _RANGE + 1).clip(min=0)
