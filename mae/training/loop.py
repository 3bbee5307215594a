"""Pre-training: one loop for every source of images."""

import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from mae.checkpoints.checkpoint import CheckpointError, save_checkpoint
from mae.data import DataError, counted, on_device
from mae.fields import COUNT, RATIO, SEED, check, is_number
from mae.model import MaskedAutoencoder
from mae.training.run import open_run
from mae.training.step import Execution, MaskStrategy, StrategyName, TrainingStep, adamw
from mae_kernels.backend import is_recent_gpu


@dataclass(frozen=True)
class TrainConfig:
    """The published recipe, appendix A.1 of He et al. 2021, unless said otherwise."""

    steps: int = 10_000
    """Optimizer steps."""
    batch_size: int = 64
    """Images per step."""
    masking: StrategyName = "random"
    """Which patches are hidden: random ones; blocks, rectangles as in BEiT; a grid, the same of every 2 x 2; tubes,
    alike in all frames as in VideoMAE; axis, whole rows and columns first as in AudioMAE. grid takes a ratio of 0.25,
    0.5 or 0.75."""
    mask_ratio: float = 0.75
    """Share of hidden patches."""
    base_lr: float = 1.5e-4
    """Peak learning rate per 256 images: the rate is base_lr * batch_size / 256."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises linearly; then it falls as a half cosine."""
    weight_decay: float = 0.05
    """AdamW weight decay, as published of all parameters but biases and norms."""
    seed: int = 0
    """Of weights, order of images, crops and masks."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 autocast on GPUs of compute capability 8.0 or more, float32 elsewhere."""
    execution: Literal["auto", "eager", "compile", "graph"] = "auto"
    """compile: one graph by torch.compile; graph: that, replayed as a CUDA graph. auto: compile on GPUs of compute
    capability 8.0 or more, eager elsewhere."""
    micro_batches: int = 1
    """Parts in which a batch is computed, for models that do not fit; the update is that of the whole batch."""
    clip_grad: float | None = None
    """Largest norm of the gradient; published: none."""
    log_every: int = 20
    """Steps between entries of metrics.jsonl."""
    save_every: int = 1000
    """Steps between checkpoints; the last step and Ctrl-C always write one."""

    def __post_init__(self):
        check(vars(self), _RULES)
        if self.batch_size % self.micro_batches:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of micro_batches {self.micro_batches}")

    @property
    def strategy(self) -> MaskStrategy:
        return MaskStrategy(self.masking, self.mask_ratio)


_RULES = {
    **dict.fromkeys(("steps", "batch_size", "micro_batches", "log_every", "save_every"), COUNT),
    "mask_ratio": RATIO,
    "base_lr": (lambda x: is_number(x, 0), "a number above 0"),
    "warmup": (lambda x: is_number(x) and 0 <= x <= 1, "a number from 0 to 1"),
    "weight_decay": (lambda x: is_number(x) and x >= 0, "a number from 0 on"),
    "clip_grad": (lambda x: x is None or is_number(x, 0), "a number above 0"),
    "seed": SEED,
}


class TrainingStopped(Exception):
    """Training ended before its last step; the message says why and where the checkpoint is."""


def choose_device(name: str) -> torch.device:
    """The device of that name, for ``"auto"`` the accelerator if there is one.

    Raises:
        ValueError: there is no such device; the message names those that there are.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator or torch.device("cpu")
    here = ["cpu"]
    if accelerator is not None:
        here += [accelerator.type, *(f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count()))]
    if name not in here:
        raise ValueError(f"device {name!r} cannot be used here; there is {', '.join(here)}")
    return torch.empty(0, device=name).device


def uses_bfloat16(precision: str, device: torch.device) -> bool:
    return precision == "bfloat16" or (precision == "auto" and is_recent_gpu(device))


def choose_execution(execution: Execution | Literal["auto"], device: torch.device) -> Execution:
    if execution != "auto":
        return execution
    return "compile" if is_recent_gpu(device) else "eager"


def train(
    model: MaskedAutoencoder, batches: Iterable[Tensor], config: TrainConfig, run: Path, overwrite: bool = False
) -> list[dict]:
    """Pre-train model in place and write ``metrics.jsonl`` and the checkpoint into the folder run.

    Args:
        model: moved to the config's device.
        batches: ``config.steps`` batches, each with a length and a method ``to(device)`` that gives images
            ``[N, C, H, W]``, uint8 or normalised floating, as tensors have. Problems that appear in the attribute
            ``unreadable`` of the batches, if they have one, are reported and counted.
        run: a folder without a run, unless overwrite is True. Nothing is written before the first steps are done.

    Returns:
        The entries of ``metrics.jsonl``: step, loss (mean since the entry before), lr, images_per_second, seconds.

    Raises:
        RunError: as of :func:`mae.training.run.open_run`.
        CheckpointError: something could not be written; the last checkpoint is whole.
        TrainingStopped: by Ctrl-C or because the data failed, with a checkpoint written; or by a non-finite loss,
            with the last good checkpoint left as it was.
    """
    device = choose_device(config.device)
    bfloat16 = uses_bfloat16(config.precision, device)
    if model.residual_dtype == torch.bfloat16 and not bfloat16:
        raise ValueError("residual bfloat16 needs precision bfloat16: in float32 nothing is computed in bfloat16")
    model.to(device).train()
    optimizer = adamw(model, config.base_lr * config.batch_size / 256, config.weight_decay)
    schedule = _schedule(optimizer, config)
    training_step = TrainingStep(
        model,
        optimizer,
        strategy=config.strategy,
        bfloat16=bfloat16,
        execution=choose_execution(config.execution, device),
        micro_batches=config.micro_batches,
        clip_grad=config.clip_grad,
    )
    step, problem = 0, ""
    with open_run(run, overwrite), _Metrics(run, config.steps) as metrics, _interrupt() as interrupted:

        def save() -> None:
            # Looks at the loss first: weights behind a non-finite one would replace good ones.
            metrics.log(step, schedule.get_last_lr()[0], getattr(batches, "unreadable", ()))
            save_checkpoint(model, run)

        try:
            for step, images in enumerate(on_device(batches, device), start=1):
                metrics.add(training_step(images), len(images))
                if step == config.steps or interrupted():
                    break
                if step % config.save_every == 0:
                    save()
                elif step % config.log_every == 0:
                    metrics.log(step, schedule.get_last_lr()[0], getattr(batches, "unreadable", ()))
                schedule.step()
        except DataError as error:
            if step == 0:
                raise
            problem = f": {error}"
        save()
    if step < config.steps:
        raise TrainingStopped(f"stopped after step {step} of {config.steps}{problem}. The checkpoint is in {run}")
    return metrics.history


def _schedule(optimizer: torch.optim.Optimizer, config: TrainConfig) -> torch.optim.lr_scheduler.LambdaLR:
    rise = max(1, round(config.warmup * config.steps))

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, config.steps - rise)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


_MOST_NAMED = 3  # files that cannot be read, in a line


class _Metrics:
    """The progress bar, ``metrics.jsonl``, and the watch over the loss."""

    def __init__(self, run: Path, steps: int):
        self.history: list[dict] = []
        self._run = run
        self._live = sys.stderr.isatty()  # in a log file the bar gets a line now and then
        self._bar = tqdm(
            total=steps,
            bar_format="step {n_fmt}/{total_fmt} |{bar:24}| {remaining} left{postfix}",
            smoothing=0.05,
            mininterval=0.2 if self._live else 10,
        )
        self._losses: list[Tensor] = []  # kept on the device: reading one waits for it
        self._images = self._reported = 0
        self._start = self._last = time.perf_counter()

    def __enter__(self) -> "_Metrics":
        return self

    def __exit__(self, *exc_info) -> None:
        self._bar.close()

    def add(self, loss: Tensor, images: int) -> None:
        self._losses.append(loss)
        self._images += images
        self._bar.update()

    def log(self, step: int, lr: float, unreadable: Collection[str]) -> None:
        if not self._losses:
            return
        loss = torch.stack(self._losses).mean().item()
        now = time.perf_counter()
        rate = self._images / (now - self._last)
        entry = {"step": step, "loss": loss, "lr": lr, "images_per_second": rate, "seconds": now - self._start}
        self.history.append(entry)
        self._write(entry)
        self._bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} images/s", refresh=self._live)
        if len(unreadable) > self._reported:
            new = list(unreadable)[self._reported :]
            self._reported = len(unreadable)
            more = [f"and {len(new) - _MOST_NAMED} more"] if len(new) > _MOST_NAMED else []
            words = "; ".join([*new[:_MOST_NAMED], *more])
            self._bar.write(f"Warning: passed over {counted(self._reported, 'file')} that cannot be read: {words}")
        if not math.isfinite(loss):
            raise TrainingStopped(
                f"stopped: the loss became {loss} near step {step}. A checkpoint from before it, if there is one, "
                f"is in {self._run}. Try a lower learning rate or precision float32"
            )
        self._losses, self._images, self._last = [], 0, now

    def _write(self, entry: dict) -> None:
        path = self._run / "metrics.jsonl"
        # What fails before the first entry leaves an older run as it was.
        mode = "a" if len(self.history) > 1 else "w"
        try:
            with open(path, mode, encoding="utf-8") as file:
                print(json.dumps(entry), file=file)
        except OSError as error:
            raise CheckpointError(
                f"{path} could not be written: {error.strerror or error}. A checkpoint from before, if there is one, "
                "is whole"
            ) from error


@contextmanager
def _interrupt() -> Iterator[Callable[[], bool]]:
    """Inside the block the first Ctrl-C only sets a flag, so that the running step ends; the second one kills."""
    pressed = False

    def press(*_) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, previous)

    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, previous)
