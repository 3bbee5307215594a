"""Curves as SVG that stands in a page: its colours and fonts are those of the page."""

import html
import math
from typing import NamedTuple

import numpy as np

# Small enough that letters stay readable on a telephone, where a curve is about 330 pixels wide.
WIDTH, HEIGHT = 400, 230
_TOP, _RIGHT, _BOTTOM = 28, 26, 40
_LETTER = 6.6  # width of a digit of 12 pixels
_MOST_POINTS, _MOST_DOTS = 500, 40
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class Line(NamedTuple):
    """One curve; at least one point, finite numbers, steps that rise."""

    label: str
    steps: np.ndarray
    values: np.ndarray


def thin(line: Line) -> tuple[Line, int]:
    """The line by means of equal parts, so that a page stays small, and how many points are in a part."""
    size = -(-len(line.steps) // _MOST_POINTS)
    starts = np.arange(0, len(line.steps), size)
    counts = np.diff(starts, append=len(line.steps))
    steps, values = (np.add.reduceat(x, starts) / counts for x in (line.steps, line.values))
    return Line(line.label, steps, values), size


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers at equal distances, from one at or below low to one at or above high."""
    if high - low <= max(1e-9 * max(abs(low), abs(high)), 1e-99):  # a constant is seen against zero
        low, high = min(low, 0.0), max(high, 0.0)
        high = high if high - low > 1e-99 else low + 1
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    size = next((power * x for x in (1, 2, 5) if power * x >= rough), power * 10)
    # What is a tick but for rounding needs no further tick beyond it.
    first, last = math.floor(low / size + 1e-6), math.ceil(high / size - 1e-6)
    return [i * size for i in range(first, last + 1)]


def tick_labels(places: list[float]) -> tuple[list[str], str]:
    """Short labels, and the power of ten that they are to be multiplied by, or no text."""
    top, size = max(map(abs, places)), places[1] - places[0]
    power = 0
    if top >= 1e5:
        power = math.floor(math.log10(top) / 3 + 1e-9) * 3
    elif top < 1e-2:
        power = math.floor(math.log10(top) + 1e-9)
    decimals = max(0, -math.floor(math.log10(size) - power + 1e-9))
    labels = [f"{x / 10.0**power:,.{decimals}f}" for x in places]
    return labels, f"times 10{str(power).translate(_SUPERSCRIPTS)}" if power else ""


def draw(title: str, unit: str, lines: list[Line], from_zero: bool = True) -> str:
    """Lines by step, with axes: the first one plain, a second one dashed. Few points are dots as well.

    Args:
        title: for those who do not see the picture.
        unit: of the values, written above their axis.
        lines: one or two, as :func:`thin` leaves them.
        from_zero: whether zero is on the axis of the values.
    """
    lowest, highest = (float(f([f(line.values) for line in lines])) for f in (np.min, np.max))
    ys = ticks(min(lowest, 0.0), max(highest, 0.0)) if from_zero else ticks(lowest, highest)
    xs = ticks(min(0.0, *(float(line.steps[0]) for line in lines)), max(float(line.steps[-1]) for line in lines), 4)
    (x_labels, x_power), (y_labels, y_power) = tick_labels(xs), tick_labels(ys)
    left, right, bottom = 14 + _LETTER * max(map(len, y_labels)), WIDTH - _RIGHT, HEIGHT - _BOTTOM

    def x_of(step: float) -> str:
        return f"{left + (step - xs[0]) / (xs[-1] - xs[0]) * (right - left):.1f}"

    def y_of(value: float) -> str:
        return f"{bottom - (value - ys[0]) / (ys[-1] - ys[0]) * (bottom - _TOP):.1f}"

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">', f"<title>{html.escape(title)}</title>"]
    for y, label in zip(map(y_of, ys), y_labels, strict=True):
        parts.append(f'<line class="grid" x1="{left:.1f}" y1="{y}" x2="{right}" y2="{y}"/>')
        parts.append(f'<text class="y" x="{left - 6:.1f}" y="{y}" dy="4">{label}</text>')
    for x, label in zip(map(x_of, xs), x_labels, strict=True):
        parts.append(f'<line class="tick" x1="{x}" y1="{bottom}" x2="{x}" y2="{bottom + 4}"/>')
        parts.append(f'<text class="x" x="{x}" y="{bottom + 17}">{label}</text>')
    parts.append(f'<text class="unit" x="4" y="14">{html.escape(_joined(unit, y_power))}</text>')
    parts.append(f'<text class="step" x="{right}" y="{HEIGHT - 6}">{_joined("step", x_power)}</text>')
    for line, name in zip(lines, ("one", "two"), strict=False):
        points = [(x_of(x), y_of(y)) for x, y in zip(line.steps.tolist(), line.values.tolist(), strict=True)]
        parts.append(f'<polyline class="{name}" points="{" ".join(map(",".join, points))}"/>')
        if len(points) <= _MOST_DOTS:
            parts += [f'<circle class="{name}" cx="{x}" cy="{y}" r="2.5"/>' for x, y in points]
    return "\n".join([*parts, "</svg>"])


def _joined(*words: str) -> str:
    return ", ".join(filter(None, words))
