"""What is seen of a run: the progress bar, ``metrics.jsonl``, TensorBoard's events, and the watch over the loss."""

import json
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mae.checkpoints.layouts import CheckpointError
from mae.checkpoints.saving import write_files
from mae.data import counted
from mae.reasons import reason_of
from mae.run_files import EVENTS, METRICS, RECONSTRUCTIONS
from mae.training.parallel import Processes

_MOST_NAMED = 3  # files, in a line
_BAR = 16  # characters
_LINE_EVERY = 60.0  # seconds, where there is no terminal


class TrainingStopped(Exception):
    """Training ended before its last step; the message says why and where the checkpoint is."""


class Watch:
    """Collects what the steps leave on the device, and reads it back only when it is logged.

    Args:
        run: its folder, into which the leading process alone writes.
        first: steps that are done already.
        seconds: that they took.
    """

    def __init__(self, run: Path, steps: int, first: int, seconds: float, processes: Processes) -> None:
        self.history = cut_back(run, first) if processes.leads else []
        self.seconds_before = seconds
        self.step, self.lr, self.first = first, 0.0, first
        self._run, self._processes = run, processes
        self._losses: list[Tensor] = []  # kept on the device: reading one waits for it
        self._images, self._waited = 0, 0.0
        self._unreadable: dict[str, None] = {}
        self._row: list[int] = []  # steps up to now whose losses were not finite
        self.longest_row: list[int] = []  # of those that the last entry covers
        self._start = self._last = time.perf_counter()
        self._bar = _Bar(steps, first) if processes.leads else None

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._bar is not None:
            self._bar.close()
        if events := vars(self).get("_events"):
            events.close()

    @cached_property
    def _events(self) -> Any:
        """TensorBoard's writer, None where it is not installed; a resumed run hides what came after its first step.

        It is made with the first entry, so that a run that never comes to one leaves nothing.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return None
        return SummaryWriter(str(self._run / EVENTS), purge_step=self.first + 1 if self.first else None)

    @property
    def seconds(self) -> float:
        """That the run has taken, in all its parts."""
        return self.seconds_before + time.perf_counter() - self._start

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what the training waits for."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def add(self, loss: Tensor, lr: float, images: int) -> None:
        self.step, self.lr = self.step + 1, lr
        self._losses.append(loss)
        self._images += images
        if self._bar is not None:
            self._bar.advance()

    def log(self, unreadable: Sequence[str], skipped: Tensor, **more: Any) -> list[int]:
        """Write an entry, in which the loss is the mean since the one before, and return steps that had none.

        Called in all processes.
        """
        self._say_unreadable(unreadable)
        if not self._losses:
            return []
        losses = self._processes.mean(torch.stack(self._losses).float()).tolist()
        good, bad, self.longest_row = [], [], self._row
        for step, loss in enumerate(losses, start=self.step - len(losses) + 1):
            if math.isfinite(loss):
                good.append(loss)
                self._row = []
            else:
                bad.append(step)
                self._row = [*self._row, step]
                self.longest_row = max(self.longest_row, self._row, key=len)
        now = time.perf_counter()
        took = now - self._last
        entry = {
            "step": self.step,
            "loss": sum(good) / len(good) if good else None,
            "lr": self.lr,
            "images_per_second": self._images / took,
            "seconds": self.seconds,
            "waiting": self._waited / took,
            "memory_mb": _memory(),
            **more,
        }
        if count := int(skipped):
            entry["skipped"] = count
        if self._processes.leads:
            self.history.append(entry)
            self._write(entry)
        if self._bar is not None:
            self._bar.show(entry)
        self._losses, self._images, self._waited, self._last = [], 0, 0.0, now
        return bad

    def pause(self, seconds: float) -> None:
        """Leave time out of the images per second, in which other things were done than training."""
        self._last += seconds

    def picture(self, file: Path) -> None:
        """Show it in TensorBoard too."""
        if self._events:
            import numpy as np
            from PIL import Image

            with Image.open(file) as image:
                self._events.add_image(RECONSTRUCTIONS, np.asarray(image.convert("RGB")), self.step, dataformats="HWC")

    def say(self, words: str) -> None:
        """A line above the bar."""
        if self._bar is not None:
            self._bar.write(words)

    def _say_unreadable(self, problems: Sequence[str]) -> None:
        gathered = [x for part in self._processes.gather(list(problems)) for x in part]
        new = [x for x in dict.fromkeys(gathered) if x not in self._unreadable]
        if not new:
            return
        self._unreadable.update(dict.fromkeys(new))
        words = "; ".join(new[:_MOST_NAMED]) + (
            f"; and {len(new) - _MOST_NAMED} more" if len(new) > _MOST_NAMED else ""
        )
        self.say(f"Warning: passed over {counted(len(self._unreadable), 'file')} that cannot be read: {words}")

    def _write(self, entry: dict[str, Any]) -> None:
        path = self._run / METRICS
        try:
            with open(path, "a", encoding="utf-8") as file:
                print(json.dumps(entry), file=file)
        except OSError as error:
            raise CheckpointError(
                f"{path} could not be written: {reason_of(error)}. A checkpoint from before, if there is one, is whole"
            ) from error
        for name, value in entry.items() if self._events else ():
            if name != "step" and value is not None:
                self._events.add_scalar(name, value, entry["step"])


class _Bar:
    """On a terminal a bar that fits its width; elsewhere a line a minute."""

    def __init__(self, steps: int, first: int) -> None:
        self._steps, self._first, self._done = steps, first, first
        self._live = sys.stderr.isatty()
        self._start = self._said = time.perf_counter()
        width = os.get_terminal_size(sys.stderr.fileno()).columns if self._live else 80
        bar = f"|{{bar:{_BAR}}}| " if width >= 100 else ""
        self._bar = tqdm(
            total=steps,
            initial=first,
            bar_format="{n_fmt}/{total_fmt} " + bar + "{remaining} left{postfix}",
            smoothing=0.05,
            mininterval=0.2,
            disable=not self._live,
        )
        self._room = width - len(f"{steps}/{steps} 00:00:00 left, ") - (len("|| ") + _BAR if bar else 0)
        self._held_out = ""

    def advance(self) -> None:
        self._done += 1
        self._bar.update()

    def show(self, entry: dict[str, Any]) -> None:
        if "val_loss" in entry:
            self._held_out = f"held out {entry['val_loss']:.4f}"
        if "val_top1" in entry:
            self._held_out += f" and {entry['val_top1']:.1%} right"
        parts = [
            "no loss" if entry["loss"] is None else f"loss {entry['loss']:.4f}",
            self._held_out,
            f"{entry['images_per_second']:.0f} images/s",
            f"lr {entry['lr']:.1e}",
            f"{entry['waiting']:.0%} waiting for data",
            f"{entry['memory_mb']:,.0f} MB of memory",
        ]
        parts = [*filter(None, parts)]
        while self._live and len(parts) > 1 and len(", ".join(parts)) > self._room:
            parts.pop()
        words = ", ".join(parts)
        self._bar.set_postfix_str(words)
        now = time.perf_counter()
        is_due = now - self._said >= _LINE_EVERY or "val_loss" in entry or self._done == self._steps
        if not self._live and is_due:
            self._said = now
            left = (now - self._start) / max(1, self._done - self._first) * (self._steps - self._done)
            print(f"step {self._done}/{self._steps}, {tqdm.format_interval(left)} left, {words}", file=sys.stderr)

    def write(self, words: str) -> None:
        tqdm.write(words, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()


def cut_back(run: Path, step: int) -> list[dict[str, Any]]:
    """Entries of ``metrics.jsonl`` up to a step; later ones, and a line that was not finished, leave the file."""
    path = run / METRICS
    if not path.is_file():
        return []
    entries, lines = [], path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    for line in lines:
        try:
            entry = json.loads(line)
            if entry["step"] <= step and line.endswith("\n"):
                entries.append(entry)
        except (ValueError, TypeError, KeyError):
            continue
    if len(entries) < len(lines):
        text = "".join(json.dumps(entry) + "\n" for entry in entries)
        write_files(run, {METRICS: lambda file: file.write_text(text, encoding="utf-8")})
    return entries


def _memory() -> float:
    """Megabytes that the device has held at most, on a CPU the process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e6
    try:
        import resource
    except ImportError:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3
