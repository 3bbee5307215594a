"""Values of any kind as the 256 levels that the model takes: which range of them is black to white."""

import numpy as np

ENOUGH = 32  # levels of 256, which a picture that holds as many values must not fall below

# What became of values that were not plainly taken, for whoever counts such pictures.
PLAIN, OWN_RANGE, FEW_LEVELS = "", "own range", "few levels"

_MOST_LEFT_OUT = 64  # isolated values


def to_8_bits(values: np.ndarray, value_range: tuple[float, float] | None = None) -> tuple[np.ndarray, str]:
    """``[C, H, W]`` uint8 for values ``[C, H, W]`` of any real dtype, and PLAIN, OWN_RANGE or FEW_LEVELS.

    With value_range its ends become 0 and 255, and what lies outside becomes the nearer one. Without it uint8 is taken
    as it is, and bool as 0 and 255; uint16 has the range 0 to 65535 and floats between 0 and 1 have that, where this
    leaves at least 32 levels, or as many as there are values. Everything else is scaled by the picture's own range; a
    channel that is no colour and would still fall below 32 levels, by the channel's. A few isolated values, such as
    nodata, are left out of a range that would leave fewer levels.

    Values that are not finite or are masked (``numpy.ma``) are in no range, and become 0. So do constant pictures,
    where there is no range to place their value in.

    Raises:
        ValueError: there are no real numbers, none is finite, or no range leaves enough levels.
    """
    if value_range is None and values.dtype.kind == "u" and values.dtype.itemsize == 1:
        return np.asarray(values), PLAIN
    if values.dtype.kind not in "buif":
        raise ValueError(f"its values are of dtype {values.dtype}, not real numbers")
    if value_range is None and values.dtype.kind in "iu" and values.dtype.itemsize == 8:
        values = _near_zero(values)
    x, masked = np.ma.getdata(values), np.ma.getmask(values)
    with np.errstate(over="ignore"):
        x = x.astype(np.float64 if x.dtype.itemsize > 8 else np.result_type(x.dtype, np.float32))
    x[masked] = np.nan
    finite = np.isfinite(x)
    if not finite.any():
        raise ValueError("none of its values is finite")
    if value_range is not None:
        out = _scaled(x, value_range)
        few = _levels(out[finite]) < ENOUGH and _levels(out[finite]) < _levels(_scaled(x[finite], _extent(x[finite])))
        return _without(out, finite), FEW_LEVELS if few else PLAIN
    nominal = _nominal(values.dtype, *_extent(x[finite]))
    ranges = [_range(x[finite], nominal)] * len(x)
    if len(x) not in (1, 3):  # a dark channel of a photograph stays dark beside the others
        for i, (channel, known) in enumerate(zip(x, finite, strict=True)):
            if _loses_levels(channel[known], ranges[i]):
                ranges[i] = _range(channel[known], nominal)
    out = np.stack([_scaled(channel, own) for channel, own in zip(x, ranges, strict=True)])
    note = PLAIN if all(r == nominal or r[0] == r[1] for r in ranges) else OWN_RANGE
    return _without(out, finite), note


def _near_zero(values: np.ndarray) -> np.ndarray:
    """Less the lowest where that is so large that floats of 64 bits would not tell its neighbours apart."""
    low = np.ma.min(values)
    if low is np.ma.masked or -(2**53) < int(low) < 2**53:
        return values
    return values.astype(np.uint64) - low.astype(np.uint64)  # modulo 2**64, so exact


def _nominal(dtype: np.dtype, low: float, high: float) -> tuple[float, float] | None:
    if dtype.kind == "u" and dtype.itemsize == 2:
        return 0, 65535
    return (0, 1) if dtype.kind in "bf" and low >= 0 and high <= 1 else None


def _range(x: np.ndarray, nominal: tuple[float, float] | None) -> tuple[float, float]:
    """The range for finite values, the nominal one where it keeps them apart."""
    if x.size == 0:  # a channel without a finite value, in a picture that has some
        return nominal or (0, 0)
    low, high = _extent(x)
    candidates = ([nominal] if nominal else []) + [(low, high)]
    kept = []
    for candidate in candidates:
        kept.append(_levels(_scaled(x, candidate)))
        if kept[-1] >= ENOUGH:
            return candidate
    values = np.unique(x)
    for candidate, levels in zip(candidates, kept, strict=True):
        if levels >= len(values):
            return candidate
    return _without_isolated(values)


def _without_isolated(values: np.ndarray) -> tuple[float, float]:
    """A range of values, sorted and each once, with enough levels, which few of them lie outside of."""
    gaps = np.diff(values / 2)  # halves: the difference of the largest floats is no float
    begin, end = 0, len(values)
    least = end - min(max(4, end // 100), _MOST_LEFT_OUT)
    while True:
        cut = begin + 1 + int(gaps[begin : end - 1].argmax())
        begin, end = (cut, end) if end - cut > cut - begin else (begin, cut)
        if end - begin < max(least, 2):
            raise ValueError(
                f"no range of its {len(values)} different values, {values[0]:g} to {values[-1]:g}, leaves "
                f"{ENOUGH} levels of 256; give one with --value-range LOW HIGH"
            )
        chosen = values[begin].item(), values[end - 1].item()
        if _levels(_scaled(values[begin:end], chosen)) >= min(ENOUGH, end - begin):
            return chosen


def _loses_levels(x: np.ndarray, chosen: tuple[float, float]) -> bool:
    if x.size == 0:
        return False
    levels = _levels(_scaled(x, chosen))
    return levels < ENOUGH and levels < _levels(_scaled(x, _extent(x)))


def _extent(x: np.ndarray) -> tuple[float, float]:
    return x.min().item(), x.max().item()


def _levels(pixels: np.ndarray) -> int:
    return int(np.count_nonzero(np.bincount(pixels.ravel(), minlength=256)))


def _scaled(x: np.ndarray, ends: tuple[float, float]) -> np.ndarray:
    with np.errstate(invalid="ignore", over="ignore"):
        low, high = (x.dtype.type(end) / 2 for end in ends)  # halves, as above
        if low == high:
            return np.zeros(x.shape, np.uint8)
        y = (x / 2 - low) / (high - low)
        y *= 255
    return np.nan_to_num(y.round(out=y).clip(0, 255, out=y), copy=False).astype(np.uint8)


def _without(pixels: np.ndarray, finite: np.ndarray) -> np.ndarray:
    return pixels if finite.all() else np.where(finite, pixels, np.uint8(0))
