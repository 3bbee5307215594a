"""Pictures of a result file: how much faster each op is, and how far from the machine's roofs.

Both draw the same bytes from the same values, and carry a digest of values and of this file. A picture is in step with
its results if the digests agree: another version of matplotlib, which may draw other bytes, does not make it stale.
"""

import hashlib
import io
import json
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.report.result import digits, times

SOURCE = Path(__file__).read_text(encoding="utf-8")
OURS, COMPILED, PUBLISHED = "#6fa8dc", "#222222", "#777777"
COLORS = ["#2f6db3", "#d1495b", "#2e8b57", "#e08e0b", "#7b4fa3", "#17a2a8", "#8c564b", "#c2379a", "#6b7f00", "#555555"]
MARKERS = {"forward": "o", "forward+backward": "s"}


class Picture:
    @property
    def digest(self) -> str:
        values = json.dumps([type(self).__name__, asdict(self)], sort_keys=True)
        return hashlib.sha256((values + SOURCE).encode()).hexdigest()[:16]

    def svg(self) -> str:
        """The digest stands in the metadata, where :func:`digest_of` finds it."""
        import matplotlib
        from matplotlib.figure import Figure

        settings = {"svg.hashsalt": "mae_kernels", "svg.fonttype": "none", "font.size": 9}
        with matplotlib.rc_context(settings):
            figure = Figure(layout="constrained")
            self.draw(figure)
            file = io.StringIO()
            figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Description": self.digest})
        return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"

    def draw(self, figure) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class Bars(Picture):
    """Speed-ups over the published pipeline. ``compiled`` is what torch.compile makes of that, where it was tried."""

    title: str
    caption: str
    labels: list[str]
    ours: list[float]
    compiled: list[float | None]

    def draw(self, figure) -> None:
        places = range(len(self.labels))
        figure.set_size_inches(8, 1.8 + 0.24 * len(self.labels))
        axis = figure.subplots()
        axis.barh(places, self.ours, height=0.68, color=OURS, label="mae_kernels")
        tried = [(place, value) for place, value in zip(places, self.compiled, strict=True) if value]
        for place, value in tried:
            axis.plot([value, value], [place - 0.34, place + 0.34], color=COMPILED, linewidth=2, solid_capstyle="butt")
        longest = max([*self.ours, *(value for _, value in tried), 1.0])
        for place, value in zip(places, self.ours, strict=True):
            end = max(value, self.compiled[place] or 0, 1)  # a number in a line is hard to read
            axis.text(end + longest * 0.01, place, times(value), va="center")
        axis.axvline(1, color=PUBLISHED, linewidth=1, linestyle="--", label="published pipeline, eager: 1")
        if tried:
            axis.plot([], [], color=COMPILED, linewidth=2, label="published pipeline, torch.compile")
        axis.set_yticks(places, self.labels)
        axis.set_ylim(len(self.labels) - 0.4, -0.6)
        axis.set_xlim(0, longest * 1.1)
        axis.set_xlabel("times as fast as the published pipeline in eager PyTorch")
        axis.spines[["top", "right"]].set_visible(False)
        _annotate(figure, self.title, self.caption)
        axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False)


@dataclass(frozen=True)
class Point:
    label: str  # of the op
    stage: str
    flops: int
    logical_bytes: int
    ours_ms: float
    published_ms: float

    def rate(self, milliseconds: float) -> float:
        return self.flops / milliseconds * 1e3


@dataclass(frozen=True)
class Roofline(Picture):
    """FLOP/s over FLOP per logical byte, under the rates of a large copy and of large products of the same run."""

    title: str
    caption: str
    points: list[Point]
    copy_gb_per_s: float
    tflops: dict[str, float]

    def draw(self, figure) -> None:
        figure.set_size_inches(9, 5.6)
        axis = figure.subplots()
        axis.set_xscale("log")
        axis.set_yscale("log")
        copy, roofs = self.copy_gb_per_s * 1e9, sorted(self.tflops.items(), key=lambda roof: roof[1])
        intensities = [point.flops / point.logical_bytes for point in self.points]
        left, right = min(intensities) / 2, max([*intensities, 1e12 * roofs[-1][1] / copy]) * 4
        axis.plot([left, roofs[-1][1] * 1e12 / copy], [left * copy, roofs[-1][1] * 1e12], color="black", linewidth=1.2)
        # Nothing can be above the roofs: that is where their names have room.
        names = [((left * roofs[0][1] * 1e12 / copy) ** 0.5, f"large copy: {digits(self.copy_gb_per_s)} GB/s")]
        for name, rate in roofs:
            axis.plot([rate * 1e12 / copy, right], [rate * 1e12] * 2, color="black", linewidth=1.2)
            names.append((rate * 1e12 / copy, f"large product in {name}: {digits(rate)} TFLOP/s"))
        for x, name in names:
            axis.annotate(name, (x, x * copy), (-6, 0), textcoords="offset points", ha="right", va="center")
        colors = {label: COLORS[i % len(COLORS)] for i, label in enumerate(dict.fromkeys(p.label for p in self.points))}
        for point, x in zip(self.points, intensities, strict=True):
            ours, published, marker = point.rate(point.ours_ms), point.rate(point.published_ms), MARKERS[point.stage]
            color = colors[point.label]
            axis.plot([x, x], [published, ours], color=color, linewidth=0.8, zorder=1)
            axis.plot(x, published, marker, markerfacecolor="white", markeredgecolor=color, markersize=6)
            axis.plot(x, ours, marker, color=color, markersize=7)
        axis.set_xlim(left, right)
        axis.set_xlabel("FLOP per logical byte (each input read once, each output written once)")
        axis.set_ylabel("FLOP/s")
        axis.grid(which="major", color="#e4e4e4", linewidth=0.6)
        axis.set_axisbelow(True)
        for label, color in colors.items():
            axis.plot([], [], "D", color=color, label=label)
        for stage in dict.fromkeys(point.stage for point in self.points):
            axis.plot([], [], MARKERS[stage], color="#555555", label=stage)
        axis.plot([], [], "o", markerfacecolor="white", markeredgecolor="#555555", label="published pipeline")
        _annotate(figure, self.title, self.caption)
        figure.legend(loc="outside right upper", frameon=False)


def digest_of(svg: str) -> str:
    return svg.partition("<dc:description>")[2].partition("</dc:description>")[0]


def _annotate(figure, title: str, caption: str) -> None:
    """The conditions are part of the picture, so that they travel with it."""
    figure.suptitle(title, fontsize=11)
    width = int(figure.get_size_inches()[0] * 15)
    figure.supxlabel(textwrap.fill(caption, width, break_on_hyphens=False), fontsize=8, color="#444444")
