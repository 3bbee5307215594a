"""Where a run stands, on disk: model, optimizer and step. Nothing else has to be kept, and nothing in it is run.

``checkpoints/step-NNNNNN`` holds the safetensors shards of torch.distributed.checkpoint, which any number of processes
read under DDP and FSDP2 alike, and ``state.json``. A folder of that name is whole: it gets it when it is.
"""

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)

from mae.checkpoints.layouts import CheckpointError
from mae.fields import is_number
from mae.reasons import reason_of
from mae.run_files import CHECKPOINTS
from mae.training.parallel import Processes, ProcessLost

_STATE = "state.json"
_NAME = re.compile(r"step-(\d{6,})")
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class Average:
    """An exponential moving average of the weights, of which each process holds what it holds of the model.

    Early ones count less: the decay of a step, counted from 0, is at most (1 + step) / (10 + step).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        state: dict[str, Any] = get_model_state_dict(model)
        self._weights = {name: x for name, x in state.items() if x.is_floating_point()}
        self.values = {name: x.clone() for name, x in self._weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_([*self.values.values()], [*self._weights.values()], 1 - decay)

    @torch.no_grad()
    def exchange(self) -> None:
        """The model gets the averages, and they its weights, until it is called again."""
        for name, x in self._weights.items():
            kept = x.clone()
            x.copy_(self.values[name])
            self.values[name].copy_(kept)


@dataclass
class TrainingState:
    """Model and optimizer of a run, and what is counted over all its parts."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None = None
    average: Average | None = None
    seconds: float = 0.0  # of training
    skipped: int = 0  # updates

    def tensors(self) -> dict[str, Tensor]:
        """What the model and the optimizer use, not copies; the learning rate and other settings are the recipe's."""
        model: dict[str, Any] = get_model_state_dict(self.model)
        optimizer = get_optimizer_state_dict(self.model, self.optimizer, options=_FLAT)
        moments = {f"optimizer.{name}": x for name, x in optimizer.items() if isinstance(x, Tensor)}
        averages = {} if self.average is None else {f"average.{name}": x for name, x in self.average.values.items()}
        return {f"model.{name}": x for name, x in model.items()} | moments | averages

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside the block the model has the averaged weights, where they are wanted."""
        if self.average is None:
            yield
            return
        self.average.exchange()
        try:
            yield
        finally:
            self.average.exchange()


def steps_on_disk(run: Path) -> list[int]:
    """Steps of the whole checkpoints of a run, in ascending order."""
    folder = run / CHECKPOINTS
    found = [_NAME.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name[1]) for name in found if name)


def path_of(run: Path, step: int) -> Path:
    return run / CHECKPOINTS / f"step-{step:06}"


def save_state(run: Path, step: int, state: TrainingState, processes: Processes, keep: int) -> None:
    """Write the checkpoint of a step, by all processes, and let go of all but the last ``keep``.

    Raises:
        CheckpointError: it could not be written; those from before are whole.
    """
    path = path_of(run, step)
    stage = path.with_name(f".{path.name}.saving")
    try:
        with processes.together():
            if processes.leads:
                _clean(run)
                stage.mkdir(parents=True)
        with processes.together():
            _write_shards(stage, state)
        with processes.together():
            if processes.leads:
                _finish(stage, path, step, state)
                for old in steps_on_disk(run)[:-keep]:
                    _remove(path_of(run, old))
    except ProcessLost:
        raise
    except Exception as error:  # a full disk is whatever PyTorch and safetensors make of it
        if processes.leads:
            shutil.rmtree(stage, ignore_errors=True)
        before = [x for x in steps_on_disk(run) if x != step]
        kept = f"; the one of step {before[-1]} is whole" if before else ""
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written into {run}: {reason_of(error)}{kept}"
        ) from error


def _write_shards(stage: Path, state: TrainingState) -> None:
    # One file a process, with the place of each piece in it; consolidated only for those who want the model.
    writer = dcp.HuggingFaceStorageWriter(str(stage), save_distributed=True)
    with _plainly_raised():
        dcp.save(state.tensors(), storage_writer=writer, no_dist=not dist.is_initialized())


@contextmanager
def _plainly_raised() -> Iterator[None]:
    """What went wrong in a process, not what PyTorch wraps it in, which is no Exception; nor that there is only one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except dcp.CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from error


def _finish(stage: Path, path: Path, step: int, state: TrainingState) -> None:
    shards = {file.name: file.stat().st_size for file in stage.iterdir()}
    scaler = None if state.scaler is None else state.scaler.state_dict()
    counts = {"seconds": state.seconds, "skipped": state.skipped}
    content = {"step": step, "shards": shards, "scaler": scaler} | counts
    with open(stage / _STATE, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    _sync(stage)
    if path.exists():  # of a step that a run has come to a second time
        _remove(path)
    stage.rename(path)
    _sync(path.parent)


def _remove(path: Path) -> None:
    """Renamed first: half a checkpoint must not look like one."""
    gone = path.with_name(f".{path.name}.removed")
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _clean(run: Path) -> None:
    """What a killed process left half written or half removed."""
    for path in (run / CHECKPOINTS).glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def load_state(run: Path, state: TrainingState, processes: Processes) -> int:
    """Take up the newest whole checkpoint and return its step; 0 where there is none yet.

    Raises:
        CheckpointError: there are checkpoints, and none of them can be read, or it is that of another model.

    Warns:
        UserWarning: a newer one is damaged, and why.
    """
    problems = []
    for step in reversed(steps_on_disk(run)):
        path = path_of(run, step)
        try:
            with processes.together():
                _load(path, state)
            if problems:
                warnings.warn(f"{'; '.join(problems)}. Resuming from step {step}", stacklevel=2)
                with processes.together():
                    if processes.leads:
                        _set_aside(run, step)
            return step
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError(f"{'; '.join(problems)}. No checkpoint in {run} can be resumed")
    return 0


def _set_aside(run: Path, step: int) -> None:
    """Damaged checkpoints of later steps, whose places the run will need."""
    for later in [x for x in steps_on_disk(run) if x > step]:
        path = path_of(run, later)
        aside = path.with_name(f"damaged-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)


def _load(path: Path, state: TrainingState) -> None:
    content = _read(path)
    for name, size in content["shards"].items():
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found != size:
            is_ = "is missing" if found is None else f"has {found} bytes and not {size}"
            raise CheckpointError(f"{path} is damaged: {name} {is_}")
    tensors = state.tensors()  # which are read into, in place
    try:
        reader = dcp.HuggingFaceStorageReader(str(path))
        held: dict[str, Any] = reader.read_metadata().state_dict_metadata
        _check(path, {name: tuple(x.size) for name, x in held.items()}, {n: tuple(x.shape) for n, x in tensors.items()})
        with _plainly_raised():
            dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
        if state.scaler is not None and content["scaler"]:
            state.scaler.load_state_dict(content["scaler"])
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {reason_of(error)}") from error
    state.seconds, state.skipped = content["seconds"], content["skipped"]


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads((path / _STATE).read_text(encoding="utf-8"))
        are_numbers = all(is_number(content[name]) for name in ("seconds", "skipped"))
        are_objects = all(isinstance(content[name], (dict, type(None))) for name in ("shards", "scaler"))
        if not (are_numbers and are_objects and content["shards"]):
            raise ValueError("it holds other things")
        return content
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {_STATE} cannot be read ({reason_of(error)})") from error


def _check(path: Path, held: dict[str, tuple[Any, ...]], expected: dict[str, tuple[Any, ...]]) -> None:
    for name in dict.fromkeys([*expected, *held]):
        if name not in held or name not in expected:
            raise CheckpointError(f"{path} is of another model: {name} is {'not in it' if name in expected else 'new'}")
        if held[name] != expected[name]:
            raise CheckpointError(f"{path} is of another model: {name} is {held[name]} there, {expected[name]} here")


def _sync(folder: Path) -> None:
    """What was renamed there outlives a loss of power."""
    if os.name != "posix":
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
