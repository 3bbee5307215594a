"""Curves of a page about a run: means, round ticks, words that may hold anything, colours that can be seen."""

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from mae.report.curves import Line, draw, thin, tick_labels, ticks
from mae.report.style import STYLE

EVIL = "a <script>alert(1)</script> \"&' b"


def test_a_line_is_thinned_by_means_of_equal_parts():
    steps = np.arange(1001.0)
    line, size = thin(Line("x", steps, steps**2))
    assert size == 3
    assert len(line.steps) == 334
    np.testing.assert_array_equal(line.steps[:2], [1, 4])
    np.testing.assert_allclose(line.values[:2], [5 / 3, 50 / 3])
    np.testing.assert_allclose((line.steps[-1], line.values[-1]), (999.5, (999**2 + 1000**2) / 2))
    line, size = thin(Line("x", steps[:500], steps[:500]))
    assert size == 1
    np.testing.assert_array_equal(line.values, steps[:500])


@pytest.mark.parametrize(
    ("low", "high", "labels", "power"),
    [
        (0, 4000, ["0", "1,000", "2,000", "3,000", "4,000"], ""),
        (0.31, 0.92, ["0.2", "0.4", "0.6", "0.8", "1.0"], ""),
        (0.3, 0.7, ["0.3", "0.4", "0.5", "0.6", "0.7"], ""),
        (0, 1.5e-4, ["0.0", "0.5", "1.0", "1.5"], "times 10⁻⁴"),
        (0, 1e6, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"], "times 10⁶"),
        (0, 250_000, ["0", "50", "100", "150", "200", "250"], "times 10³"),
        (-3, 3, ["-4", "-2", "0", "2", "4"], ""),
        (7, 7, ["0", "2", "4", "6", "8"], ""),
        (0, 0, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"], ""),
        (0.4123, 0.4127, ["0.4123", "0.4124", "0.4125", "0.4126", "0.4127"], ""),
    ],
)
def test_ticks_are_round_and_cover_the_values(low, high, labels, power):
    assert tick_labels(ticks(low, high)) == (labels, power)


def test_ticks_cover_values_of_every_size():
    generator = np.random.default_rng(0)
    for _ in range(2000):
        low, high = sorted(generator.normal(size=2) * 10.0 ** generator.uniform(-90, 90, size=2))
        places, most = ticks(low, high), generator.integers(3, 8)
        assert 2 <= len(ticks(low, high, most)) <= most + 2
        slack = 1e-5 * (high - low)
        assert places[0] - slack <= low
        assert high <= places[-1] + slack
        assert len({*tick_labels(places)[0]}) == len(places)


def test_words_of_a_curve_may_hold_anything():
    svg = ElementTree.fromstring(draw(EVIL, EVIL, [Line("x", np.array([1.0]), np.array([2.0]))]))
    assert svg.find("title").text == EVIL
    assert [t.text for t in svg.iter("text") if t.get("class") == "unit"] == [EVIL]


def test_colours_can_be_told_from_the_ground():
    """In light and in dark: 4.5 times the luminance for text, as WCAG 2 asks for."""

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * x for x in colour[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    light, dark = STYLE.split("(prefers-color-scheme: dark)")
    schemes = [dict(re.findall(r"(--[\w-]+): (#\w+)", part)) for part in (light, dark)]
    assert schemes[0].keys() == schemes[1].keys()
    for scheme in schemes:
        pairs = [(x, "--ground") for x in ("--text", "--soft", "--one", "--two")] + [("--mark-text", "--mark")]
        for pair in pairs:
            darker, lighter = sorted(luminance(scheme[name]) for name in pair)
            assert (lighter + 0.05) / (darker + 0.05) >= 4.5, pair
