"""``metrics.jsonl`` as columns of numbers, in whatever state a run has left it."""

import json
import math
from array import array
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mae.data.errors import counted

COLUMNS = (
    "step", "epoch", "loss", "val_loss", "val_top1", "lr", "images_per_second", "seconds", "waiting", "grad_norm",
    "skipped", "memory_mb",
)  # fmt: skip
_LARGEST = 1e99  # beyond which means and differences could overflow


@dataclass(frozen=True)
class History:
    """One value a line in each column: NaN where the line does not say it, infinite where it is no usable number."""

    columns: dict[str, np.ndarray]
    problems: tuple[str, ...]  # sentences about the file

    def __len__(self) -> int:
        return len(self.columns["step"])

    def curve(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of the lines that hold a usable number."""
        values = self.columns[name]
        usable = np.isfinite(values)
        return self.columns["step"][usable], values[usable]

    def means(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The same over as many steps as most lines are apart; the few before a checkpoint join those behind it."""
        steps, values = self.curve(name)
        if not len(steps):
            return steps, values
        lengths = np.diff(steps, prepend=0)
        usual, kept, total, weight = np.quantile(lengths, 0.5, method="lower"), [], 0.0, 0.0
        for step, value, length in zip(steps, values, lengths, strict=True):
            total, weight = total + value * length, weight + length
            if weight >= usual or step == steps[-1]:
                kept.append((step, total / weight))
                total = weight = 0.0
        steps, values = np.array(kept).T
        return steps, values

    def last(self, name: str) -> float:
        """The last usable number, or NaN."""
        values = self.curve(name)[1]
        return float(values[-1]) if len(values) else math.nan

    def unusable(self, name: str) -> int:
        """How many lines hold NaN, an infinite or a far too large number."""
        return int(np.isinf(self.columns[name]).sum())


def read_history(file: Path) -> History:
    """Lines that cannot be read are counted and left out.

    A run that went back to a checkpoint writes steps again: the newer line of a step replaces the older ones from that
    step on.
    """
    columns = {name: array("d") for name in COLUMNS}
    steps = columns["step"]
    unreadable = went_back = 0
    is_torn = False
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            entry = _entry(line)
            if entry is None:
                is_torn = bool(line.strip()) and not line.endswith("\n")
                unreadable += bool(line.strip()) and not is_torn
                continue
            if steps and entry["step"] <= steps[-1]:
                went_back += 1
                kept = bisect_left(steps, entry["step"])
                for column in columns.values():
                    del column[kept:]
            for name, column in columns.items():
                column.append(_number(entry.get(name)))
    problems = []
    if is_torn:
        problems.append("The last line of metrics.jsonl is cut off, as when a run is killed or still writing.")
    if unreadable:
        problems.append(f"Left out of metrics.jsonl: {counted(unreadable, 'line')} that cannot be read.")
    if went_back:
        problems.append(
            f"The run went back to an earlier step {counted(went_back, 'time')}; what it did again replaces what it "
            "had done before."
        )
    return History({name: np.array(column) for name, column in columns.items()}, tuple(problems))


def _entry(line: str) -> dict[str, Any] | None:
    """The object of a line, with a step that has a place on an axis."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or not math.isfinite(_number(entry.get("step"))):
        return None
    return entry


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    return float(value) if abs(value) < _LARGEST else math.inf  # NaN is not below anything
