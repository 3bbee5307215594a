"""The library's table of tiles, read and written."""

import re
from dataclasses import astuple, dataclass

import torch

from mae_kernels.inspect import BF16, F32, U8
from mae_kernels.kernels import tuned
from mae_kernels.kernels.tuned import Tiles

PREDICTED = "predicted"


@dataclass(frozen=True)
class Entry:
    """A line of the table, with what its comment says; times are microseconds."""

    key: tuple
    tiles: Tiles
    what: str
    time: float
    rule: float
    floor: float
    source: str  # the device of a measurement, or PREDICTED
    date: str

    def __str__(self) -> str:
        comment = f"{self.what}: {self.time:.1f} µs, rule {self.rule:.1f}, floor {self.floor:.1f}"
        tiles = f"{type(self.tiles).__name__}({', '.join(map(str, astuple(self.tiles)))})"
        return f"    # {comment}; {self.source}, {self.date}\n    ({', '.join(map(_code, self.key))}): {tiles},\n"


def _code(value) -> str:
    names = {BF16: "BF16", F32: "F32", U8: "U8", torch.float16: "F16"}
    return names[value] if isinstance(value, torch.dtype) else f'"{value}"' if isinstance(value, str) else str(value)


_OPENING = re.compile(r"^TABLE: [^\n]* = \{", re.M)
_COMMENT = re.compile(r"^    # (.*): ([\d.]+) µs, rule ([\d.]+), floor ([\d.]+); (.*), ([\d-]+)$", re.M)


def read_table(text: str) -> list[Entry]:
    body = text[_OPENING.search(text).end() - 1 :]
    comments = _COMMENT.findall(body)
    return [
        Entry(key, tiles, what, *map(float, times), source, date)
        for (key, tiles), (what, *times, source, date) in zip(eval(body, vars(tuned)).items(), comments, strict=True)
    ]


def rewritten(text: str, new: list[Entry]) -> str:
    """The file with new entries; predictions leave measured entries as they are."""
    entries = {entry.key: entry for entry in read_table(text)}
    for entry in new:
        if entry.source != PREDICTED or entry.key not in entries or entries[entry.key].source == PREDICTED:
            entries[entry.key] = entry
    lines = "".join(str(entry) for entry in sorted(entries.values(), key=lambda entry: list(map(_code, entry.key))))
    opening = _OPENING.search(text)
    return text[: opening.end()] + (f"\n{lines}" if lines else "") + "}\n"
