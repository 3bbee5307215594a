"""Pages of the report as a browser sees them, and what they are written from."""

import base64
import io
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
from PIL import Image

from mae.report.curves import HEIGHT, WIDTH
from mae.report.page import write_report

EVIL = "a <script>alert(1)</script> \"&' b"


def entry(step: int, **more) -> dict:
    return {
        "step": step, "epoch": step / 78, "loss": 1 / step, "lr": 1.5e-4, "seconds": step * 36.0,
        "images_per_second": 3000.0 + ((step + 1) % 3) ** 3, "waiting": 0.25,
        "grad_norm": 2.0, "skipped": 3, "memory_mb": 800 + step % 2,
    } | more  # fmt: skip


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (4, 4), shade).save(file, "png")
    return file.getvalue()


class Page(HTMLParser):
    """What a browser sees: texts by their element, tags with their attributes, and tables as rows of texts."""

    def __init__(self, folder):
        super().__init__()
        self.source = (folder / "report.html").read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict]] = []
        self.texts: dict[str, list[str]] = {}
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self.feed(self.source)
        # Well formed beyond what a browser asks for: no tag is left open, no character is loose.
        self.tree = ElementTree.fromstring(self.source)
        self.figures = {f.find("h3").text: f for f in self.tree.iter("figure") if f.find("h3") is not None}
        assert "http" not in re.sub("http-equiv", "", self.source)
        loading = [a[n] for _, a in self.tags for n in ("src", "href", "data", "srcset", "action", "poster") if n in a]
        assert all(x.startswith("data:image/png;base64,") for x in loading)
        assert not re.search(r"url\(|@import", self.source)
        assert "script" not in {tag for tag, _ in self.tags}
        assert not any(name.startswith("on") for _, attributes in self.tags for name in attributes)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._open.append(tag)
        self.texts.setdefault(tag, []).append("")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        for tag in {*self._open}:
            self.texts[tag][-1] += data
        if {"td", "th"} & {*self._open}:
            self.rows[-1][-1] += data

    @property
    def state(self) -> str:
        return next("".join(p.itertext()) for p in self.tree.iter("p") if p.get("class") == "state")

    @property
    def pictures(self) -> list[bytes]:
        return [base64.b64decode(a["src"].split(",", 1)[1]) for tag, a in self.tags if tag == "img"]

    def caption(self, title: str) -> str:
        return "".join(self.figures[title].find("figcaption").itertext())

    def values(self, title: str, line: int = 0) -> np.ndarray:
        """Steps and values ``[points, 2]`` of a curve, read off its axes; every place must be in the picture."""
        svg = self.figures[title].find("svg")
        assert svg.get("viewBox") == f"0 0 {WIDTH} {HEIGHT}"
        assert svg[0].tag == "title"
        assert svg[0].text.startswith(title)
        points = [np.array([p.split(",") for p in x.get("points").split()], float) for x in svg.iter("polyline")]
        texts = {kind: [t for t in svg.iter("text") if t.get("class") == kind] for kind in ("x", "y", "unit", "step")}
        for x, y in [*np.concatenate(points), *((float(t.get("x")), float(t.get("y"))) for t in svg.iter("text"))]:
            assert 0 <= x <= WIDTH
            assert 0 <= y <= HEIGHT
        read = []
        for axis, (kind, power) in enumerate((("x", "step"), ("y", "unit"))):
            places = [float(t.get(kind)) for t in texts[kind]]
            labels = [float(t.text.replace(",", "")) for t in texts[kind]]
            assert len(labels) == len({*labels}) > 1  # else rounded too far
            assert min(places) <= min(p[:, axis].min() for p in points)
            assert max(p[:, axis].max() for p in points) <= max(places)
            superscript = re.search("times 10([⁻⁰-⁹¹²³]+)", texts[power][0].text or "")
            factor = (
                10.0 ** int(superscript[1].translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789"))) if superscript else 1
            )
            order = np.argsort(places)
            assert [*np.argsort(labels)] == [*(order if axis == 0 else order[::-1])]  # to the right, and upwards
            read.append(np.interp(points[line][:, axis], np.array(places)[order], np.array(labels)[order] * factor))
        return np.stack(read, axis=1)


def written(folder) -> Page:
    assert write_report(folder) == folder / "report.html"
    return Page(folder)
