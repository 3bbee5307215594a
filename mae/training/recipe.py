"""What a run is trained with: every option in a file, before the first step."""

import json
import math
import platform
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch

import mae_kernels
from mae.checkpoints.layouts import CheckpointError
from mae.checkpoints.saving import write_json
from mae.fields import COUNT, RATIO, SEED, WORKERS, check, is_number
from mae.reasons import reason_of
from mae.run_files import RECIPE
from mae.training.optimizers import OptimizerName
from mae.training.parallel import Parallel
from mae.training.run import RunError
from mae.training.step import Execution, MaskStrategy, StrategyName

_WORK = {  # what may differ when a run is resumed: it computes the same, up to rounding at most
    "data", "val", "test", "held_out", "init", "checkpoint",
    "workers", "micro_batches", "execution", "parallel", "device", "log_every",
    "save_every", "eval_every", "keep", "max_skipped",
}  # fmt: skip


@dataclass(frozen=True)
class RunConfig:
    """What every run of the trainer has, whatever it trains."""

    steps: int | None = None
    """Optimizer steps, in place of epochs."""
    epochs: float | None = None
    """Passes over all images."""
    batch_size: int = 64
    """Images per step, in all processes together."""
    base_lr: float = 1.5e-4
    """Peak learning rate per 256 images: the rate is base_lr * batch_size / 256."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises linearly; then it falls as a half cosine."""
    warmup_epochs: float | None = None
    """The same in epochs."""
    weight_decay: float = 0.05
    """Weight decay of all parameters but biases and norms."""
    seed: int = 0
    """Of weights, order of images, crops and whatever else is random."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: bfloat16 autocast on GPUs of compute capability 8.0 or more, float32 elsewhere. float16 autocast scales the
    loss, for older GPUs."""
    execution: Execution | Literal["auto"] = "auto"
    """compile: one graph by torch.compile; graph: that, replayed as a CUDA graph. auto: compile on GPUs of compute
    capability 8.0 or more, eager elsewhere."""
    micro_batches: int = 1
    """Parts in which a process computes its share of a batch, to fit into memory; the update is that of the whole."""
    clip_grad: float | None = None
    """Largest norm of the gradient; published: none."""
    parallel: Parallel = "ddp"
    """How processes that torchrun starts share the model: ddp holds it whole in each, fsdp shards it block by block."""
    fsdp_dtype: Literal["float32", "bfloat16"] = "float32"
    """What parameters are gathered in under fsdp: bfloat16 halves that traffic, and is not exact."""
    workers: int = 2
    """Processes that decode and crop images, for each process that trains."""
    log_every: int = 20
    """Steps between entries of metrics.jsonl; checkpoints and validations have one too."""
    save_every: int = 1000
    """Steps between checkpoints; the last step and signals always write one."""
    keep: int = 2
    """Checkpoints that are kept to resume from."""
    eval_every: int | None = None
    """Steps between validations; by default whole epochs, about a tenth of the run."""
    max_skipped: int = 20
    """Losses in a row that are not finite, whose updates are skipped, until the run stops."""

    usual: ClassVar[dict[str, float]] = {"steps": 10_000}  # where neither steps nor epochs are given

    def __post_init__(self) -> None:
        check(vars(self), _RULES)
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"steps {self.steps} and epochs {self.epochs:g} say the same thing; give one of them")
        if self.batch_size % self.micro_batches:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of micro_batches {self.micro_batches}")

    def schedule(self, images: int) -> "Schedule":
        """Of a run on that many images."""
        per_epoch = images / self.batch_size
        length: dict[str, Any] = self.usual if self.steps is None and self.epochs is None else vars(self)
        steps = length.get("steps") or max(1, round(length["epochs"] * per_epoch))
        warmup = self.warmup * steps if self.warmup_epochs is None else self.warmup_epochs * per_epoch
        if warmup > steps:
            raise ValueError(f"warmup_epochs {self.warmup_epochs:g} are longer than the run of {steps} steps")
        evaluate = self.eval_every or math.ceil(max(1, round(steps / 10 / per_epoch)) * per_epoch)
        return Schedule(steps, max(1, round(warmup)), self.base_lr * self.batch_size / 256, per_epoch, evaluate)


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """Pre-training: the published recipe, appendix A.1 of He et al. 2021, unless said otherwise."""

    steps: int | None = None
    """Optimizer steps; 10000 where epochs are not given either."""
    epochs: float | None = None
    """The same in passes over all images."""
    warmup_epochs: float | None = None
    """The same in epochs; published: 40."""
    weight_decay: float = 0.05
    """AdamW weight decay, as published of all parameters but biases and norms."""
    seed: int = 0
    """Of weights, order of images, crops and masks."""
    eval_every: int | None = None
    """Steps between validations and reconstructions; by default whole epochs, about a tenth of the run."""
    masking: StrategyName = "random"
    """Which patches are hidden: random ones; blocks, rectangles as in BEiT; a grid, the same of every 2 x 2; tubes,
    alike in all frames as in VideoMAE; axis, whole rows and columns first as in AudioMAE. grid takes a ratio of 0.25,
    0.5 or 0.75."""
    mask_ratio: float = 0.75
    """Share of hidden patches."""
    optimizer: OptimizerName = "adamw"
    """adamw, as published. muon is not the published recipe: updates of the blocks' matrices are made orthogonal, at
    AdamW's learning rate and weight decay, and all else is left to AdamW."""

    @property
    def strategy(self) -> MaskStrategy:
        return MaskStrategy(self.masking, self.mask_ratio)


_WHOLE = (lambda x: x is None or COUNT[0](x), COUNT[1])
_POSITIVE = (lambda x: x is None or is_number(x, 0), "a number above 0")
_RULES = {
    **dict.fromkeys(("batch_size", "micro_batches", "log_every", "save_every", "keep", "max_skipped"), COUNT),
    **dict.fromkeys(("steps", "eval_every"), _WHOLE),
    **dict.fromkeys(("epochs", "warmup_epochs", "clip_grad"), _POSITIVE),
    "workers": WORKERS,
    "mask_ratio": RATIO,
    "base_lr": (lambda x: is_number(x, 0), "a number above 0"),
    "warmup": (lambda x: is_number(x) and 0 <= x <= 1, "a number from 0 to 1"),
    "weight_decay": (lambda x: is_number(x) and x >= 0, "a number from 0 on"),
    "seed": SEED,
}


class Schedule(NamedTuple):
    """What happens when."""

    steps: int
    warmup: int
    peak_lr: float
    steps_per_epoch: float
    eval_every: int

    def lr(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.peak_lr * (step + 1) / self.warmup
        return self.peak_lr * 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(1, self.steps - self.warmup)))


@dataclass(frozen=True)
class Recipe:
    """A run as its ``recipe.json`` describes it: options by their names, what it is trained on, and what follows."""

    options: dict[str, Any]
    data: dict[str, Any]
    schedule: Schedule

    def write(self, run: Path) -> None:
        """Put ``recipe.json`` into the run folder, where there is none.

        Raises:
            CheckpointError: as of :func:`mae.checkpoints.saving.write_files`.
        """
        if not (run / RECIPE).is_file():
            content = {"options": self.options, "data": self.data, "schedule": self.schedule._asdict()}
            labels = [f"not the published method: {x}" for x in unpublished(self.options)]
            write_json(run, {RECIPE: content | {"versions": versions()} | ({"labels": labels} if labels else {})})

    def refuse_another(self, run: Path) -> None:
        """Raise :class:`RunError` where the recipe in the folder computes something else, or on other images."""
        if not (run / RECIPE).is_file():
            return
        before = read_recipe(run / RECIPE)
        options = json.loads(json.dumps(self.options))  # tuples become lists, as in the file
        if changed := _changed(before["options"], options):
            hint = "" if "command" in options else f", which --recipe {run} does"
            words = f"{run} was started with another recipe: {'; '.join(changed)}"
            raise RunError(f"{words}. Give it its own options again{hint}")
        if changed := _changed(before["data"], self.data):
            raise RunError(
                f"{run} was started on other images: {'; '.join(changed)}. Put them back, or begin another run"
            )


def _changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Field by field; what only one of two versions says is not compared."""
    both = {name: (x, now[name]) for name, x in before.items() if name in now and name not in _WORK}
    return [f"{name} was {x!r} and is {y!r}" for name, (x, y) in both.items() if x != y]


def unpublished(options: dict[str, Any]) -> list[str]:
    """Options that make the objective or its optimizer another than He et al. 2021 published."""
    published = {"decoder": "self", "predicted_share": 1.0, "optimizer": "adamw"}
    return [f"{name} {options[name]}" for name, x in published.items() if options.get(name, x) != x]


def read_recipe(file: Path) -> dict[str, Any]:
    """What :class:`Recipe` wrote, or a person with no more than options.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        content = {"data": {}} | json.loads(file.read_text(encoding="utf-8"))
        if not all(isinstance(content[part], dict) for part in ("options", "data")):
            raise ValueError("it holds other things")
        return content
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{file} is no recipe: {reason_of(error)}") from error


def preset(name: str) -> dict[str, Any]:
    """Options of a recipe that ships with the package, or of a ``recipe.json``, by their names.

    Raises:
        ValueError: there is none of that name.
    """
    shipped = resources.files("mae").joinpath("recipes")
    known = sorted(x.name.removesuffix(".json") for x in shipped.iterdir() if x.name.endswith(".json"))
    if name in known:
        return json.loads(shipped.joinpath(f"{name}.json").read_text(encoding="utf-8"))["options"]
    file = Path(name)
    file = file / RECIPE if file.is_dir() else file
    if not file.is_file():
        raise ValueError(f"there is no recipe {name}; there are {', '.join(known)}, and the recipe.json of any run")
    return read_recipe(file)["options"]


def versions() -> dict[str, str]:
    """Of what decides about numbers."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    packages = {package.__name__: package.__version__ for package in (mae_kernels, torch, np)}
    return packages | {"python": platform.python_version(), "device": device, "system": platform.platform()}
