"""One loop: for any task, any source of images and any number of processes."""

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mae.checkpoints.checkpoint import save_weights
from mae.checkpoints.saving import write_files
from mae.data import Batch, Batches, DataError, DataWarning, TensorImages, TrainingImages, counted, on_device, printable
from mae.model import MaskedAutoencoder, VisionTransformer
from mae.run_files import WEIGHTS
from mae.training.metrics import TrainingStopped, Watch
from mae.training.parallel import Processes, ProcessLost, distribute, plain, whole_state
from mae.training.recipe import Recipe, RunConfig, Schedule, TrainConfig
from mae.training.run import Mode, RunError, open_run
from mae.training.signals import StopRequest, stop_requests
from mae.training.state import Average, TrainingState, load_state, path_of, save_state, steps_on_disk
from mae.training.step import Execution, Step
from mae.training.tasks import Pretraining, Task
from mae_kernels.backend import is_recent_gpu

_MEASURED = 3  # steps after which a run says how long it will take, the first of which compiles and warms up
_LONG = 10.0  # seconds of a step, after which it is said at once where nothing compiles
_MOST_NAMED = 3
_GO_ON, _ASKED, _NO_DATA = range(3)  # what a process wants; all do what most of them wants, in this order


class StoppedBySignal(TrainingStopped):
    """A signal asked for it, and the checkpoint is written."""


@dataclass(frozen=True)
class Looks:
    """What a run does between its steps, beside training: each takes the plain model of the steps done so far."""

    validate: Callable[[torch.nn.Module], dict[str, float]] | None = None  # in all processes: scalars by their names
    draw: Callable[[MaskedAutoencoder, int], Path] | None = None  # in the leading one: the picture of that step
    foretell: Callable[[float, int], str] | None = None  # what is said of the seconds a step takes, and of steps left


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
    model: VisionTransformer,
    images: TrainingImages | TensorImages,
    config: RunConfig,
    run: Path,
    mode: Mode = "new",
    *,
    task: Task | None = None,
    processes: Processes = Processes(),
    looks: Looks = Looks(),
    recipe: Recipe | None = None,
) -> list[dict[str, Any]]:
    """Train model in place, and write metrics and checkpoints into the folder run.

    Args:
        model: moved to the config's device.
        run: a folder without a run, unless mode says otherwise.
        mode: ``"overwrite"`` the run in the folder, or ``"resume"`` it: go on where the newest checkpoint stands, or
            at the first step where there is none.
        task: what is trained, by default :class:`mae.training.tasks.Pretraining`, whose config is a TrainConfig.
        recipe: what ``recipe.json`` says of the run, by default the fields of config and the number of images.

    Returns:
        The entries of ``metrics.jsonl``: step, epoch, loss (mean since the entry before, None where none was finite),
        lr, images_per_second, seconds, waiting (share of the time that data took), memory_mb, what validations gave,
        skipped (updates, in all) where there are any; in processes that do not lead none.

    Raises:
        RunError: as of :func:`mae.training.run.open_run`.
        CheckpointError: something could not be written; the last checkpoint is whole.
        StoppedBySignal: with a checkpoint written.
        TrainingStopped: the data failed, with a checkpoint written; or too many losses were not finite.
    """
    device = choose_device(config.device)
    bfloat16 = uses_bfloat16(config.precision, device)
    if model.residual_dtype == torch.bfloat16 and not bfloat16:
        raise ValueError("residual bfloat16 needs precision bfloat16: in float32 nothing is computed in bfloat16")
    if config.batch_size % (processes.count * config.micro_batches):
        raise ValueError(
            f"batch_size {config.batch_size} is not a multiple of {processes.count} processes times "
            f"{config.micro_batches} micro_batches"
        )
    recipe = recipe or Recipe(asdict(config), {"images": len(images)}, config.schedule(len(images)))
    if task is None:
        assert isinstance(config, TrainConfig)
        task = Pretraining(config, model.config.patch_size, processes)
    schedule = recipe.schedule
    model.to(device).train()
    fsdp_dtype = torch.bfloat16 if config.fsdp_dtype == "bfloat16" else None
    distributed = distribute(model, config.parallel, processes, fsdp_dtype)
    optimizer = task.optimizer(distributed, schedule.peak_lr)
    scaler = torch.amp.GradScaler(device.type) if config.precision == "float16" else None
    step = Step(
        distributed,
        optimizer,
        task.loss,
        bfloat16=bfloat16,
        execution=choose_execution(config.execution, device),
        micro_batches=config.micro_batches,
        clip_grad=config.clip_grad,
        scaler=scaler,
    )
    average = None if task.ema_decay is None else Average(distributed, task.ema_decay)
    state = TrainingState(distributed, optimizer, scaler, average)
    with open_run(run, mode, processes) as started, stop_requests(processes.leads) as asked:
        if mode == "resume":
            with processes.together():
                recipe.refuse_another(run)
        first = load_state(run, state, processes) if mode == "resume" else 0
        if mode == "resume" and not first and (run / WEIGHTS).is_file():
            raise RunError(f"{run} holds a model and no checkpoint to go on from; choose another --out, or --overwrite")
        step.skipped.fill_(state.skipped)
        rows = processes.rows(config.batch_size)
        batches = Batches(images, config.batch_size, range(first, schedule.steps), rows=rows, workers=config.workers)
        with Watch(run, schedule.steps, first, state.seconds, processes) as watch:
            if first:
                going = "Going on after" if first < schedule.steps else "Nothing is left to do after"
                watch.say(f"{going} step {first} of {schedule.steps}")
            running = _Run(run, config, recipe, task, processes, step, state, batches, watch, looks, started)
            try:
                running.go(device, asked)
            except ProcessLost as error:
                raise TrainingStopped(f"stopped near step {watch.step + 1}: {error}.{running.resumable()}") from error
            return watch.history


@dataclass
class _Run:
    """What the parts of the loop have in common."""

    folder: Path
    config: RunConfig
    recipe: Recipe
    task: Task
    processes: Processes
    step: Step
    state: TrainingState
    batches: Batches
    watch: Watch
    looks: Looks
    started: Callable[[], None]
    saved: int = -1  # the last step of which this process has written a checkpoint

    @property
    def schedule(self) -> Schedule:
        return self.recipe.schedule

    def go(self, device: torch.device, asked: StopRequest) -> None:
        config, schedule, watch = self.config, self.schedule, self.watch
        first, end, problem, begin = watch.step, _GO_ON, None, time.perf_counter()
        batches = on_device(self.batches, device)
        try:
            while watch.step < schedule.steps and end == _GO_ON:
                with watch.waiting():
                    batch, problem = _next(batches)
                # Without it the other processes would wait for the gradients of one that has no batch.
                end = self.processes.most(_NO_DATA if problem is not None else _ASKED if asked else _GO_ON)
                if batch is None or end == _NO_DATA or (end == _ASKED and watch.step > first):
                    break
                if watch.step == first and self.processes.leads:
                    self.recipe.write(self.folder)
                self._one(batch)
                done = watch.step
                if done == first + 1:
                    self.started()
                    took, begin = self._now() - begin, self._now()
                    is_long = took > _LONG and choose_execution(config.execution, device) == "eager"
                    if is_long:
                        self._foretell(took)
                if done - first == _MEASURED and not is_long:
                    self._foretell((self._now() - begin) / (_MEASURED - 1))
                if done == schedule.steps:
                    break
                scalars = self.look() if done % schedule.eval_every == 0 else {}
                saves = done % config.save_every == 0
                if scalars or saves or done % config.log_every == 0:  # a resumed run averages from the checkpoint on
                    self.log(**scalars)
                if saves:
                    self.save()
        finally:
            batches.close()  # the worker processes end
            self.batches.notes.warn()
        problem = next(filter(None, self.processes.gather(problem)), None)
        if problem is not None and watch.step == first:
            raise problem
        if watch.step == schedule.steps > first:  # a run whose last checkpoint is there has all its pictures too
            self.log(**self.look())
        with asked.held():
            self.save()
        if first < watch.step < schedule.steps:
            self.log(**self.look())
        if watch.step < schedule.steps:
            why = f": {problem}" if problem is not None else ""
            kind = StoppedBySignal if end == _ASKED else TrainingStopped
            raise kind(
                f"stopped after step {watch.step} of {schedule.steps}{why}. The checkpoint is in {self.folder}; "
                "the same command with --resume goes on"
            )

    def _now(self) -> float:
        """When the device has done everything up to here."""
        self.step.skipped.item()
        return time.perf_counter()

    def _foretell(self, seconds: float) -> None:
        left = self.schedule.steps - self.watch.step
        if self.looks.foretell is not None and left:
            self.watch.say(self.looks.foretell(seconds, left))

    def _one(self, batch: Batch) -> None:
        done = self.watch.step
        lr = self.schedule.lr(done)
        for group in self.state.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        with self.processes.lost_said():
            loss = self.step(*self.task.inputs(batch, done))
        if self.state.average is not None:
            self.state.average.update(done)
        self.watch.add(loss, lr, self.config.batch_size)

    def log(self, **scalars: float) -> None:
        epoch = self.watch.step / self.schedule.steps_per_epoch
        bad = self.watch.log([*self.batches.unreadable], self.step.skipped, epoch=epoch, **scalars)
        if not bad:
            return
        self.watch.say(
            f"Warning: {counted(len(bad), 'loss was', 'losses were')} not finite up to step {self.watch.step}; the "
            "updates are skipped"
        )
        bad = self.watch.longest_row
        if len(bad) < self.config.max_skipped:
            return
        names = [self._name(key[1]) for key in self.batches.order.keys(bad[0] - 1)]
        listed = "non-finite.txt"
        if self.processes.leads:
            text = "".join(f"{self._name(key[1])}\n" for step in bad for key in self.batches.order.keys(step - 1))
            write_files(self.folder, {listed: lambda path: path.write_text(text, encoding="utf-8")})
        raise TrainingStopped(
            f"stopped: {len(bad)} losses in a row were not finite, the first of these at step {bad[0]}, "
            f"whose files are {', '.join(names[:_MOST_NAMED])} and {max(0, len(names) - _MOST_NAMED)} more, listed in "
            f"{self.folder / listed}.{self.resumable()} Try a lower learning rate or precision float32"
        )

    def _name(self, index: int) -> str:
        source = getattr(self.batches.images, "source", None)
        return printable(source.name(index)) if source is not None else f"image {index}"

    def save(self) -> None:
        """The checkpoint to resume from, and the weights for everyone else."""
        start = time.perf_counter()
        if self.watch.step == self.saved:
            return
        with self.state.averaged():
            weights = self.task.exported(whole_state(self.step.model))
            if self.state.average is not None:  # on a CPU these are the model's own, which gets its weights back
                weights = {name: x.clone() for name, x in weights.items()}
        finite = all(x.isfinite().all() for x in weights.values() if x.is_floating_point())
        if self.processes.most(not finite):
            raise TrainingStopped(
                f"stopped: the weights are not finite after step {self.watch.step}, so they are not saved."
                f"{self.resumable()} Try a lower learning rate or precision float32"
            )
        self.state.seconds, self.state.skipped = self.watch.seconds, int(self.step.skipped)
        if not 0 < self.watch.step == self.watch.first:  # resumed at its end, as one that was killed before its weights
            save_state(self.folder, self.watch.step, self.state, self.processes, self.config.keep)
        self.saved = self.watch.step
        if self.processes.leads:
            save_weights(weights, plain(self.step.model).description(), self.folder)
        self.watch.pause(time.perf_counter() - start)

    def look(self) -> dict[str, float]:
        """Validate and draw, where somebody wants it."""
        start, scalars = time.perf_counter(), {}
        if self.looks.validate is not None:
            try:
                with self.state.averaged():
                    scalars = self.looks.validate(self.step.model)
            except DataError as error:  # in all processes; training may still have its images
                self._warn(f"no validation of step {self.watch.step}: {error}")
        if self.looks.draw is not None:
            weights = whole_state(self.step.model)
            if self.processes.leads:
                self._draw(self.looks.draw, weights)
        self.watch.pause(time.perf_counter() - start)
        return scalars

    def _draw(self, draw: Callable[[MaskedAutoencoder, int], Path], weights: dict[str, Tensor]) -> None:
        model = MaskedAutoencoder(plain(self.step.model).config)
        model.load_state_dict(weights)
        try:
            self.watch.picture(draw(model.to(self.step.skipped.device).eval(), self.watch.step))
        except (OSError, DataError) as error:  # a picture is not worth a month of training
            self._warn(f"no picture of step {self.watch.step}: {error}")

    def _warn(self, words: str) -> None:
        if self.processes.leads:
            warnings.warn(words, DataWarning, stacklevel=3)

    def resumable(self) -> str:
        """Which checkpoint is the last one, in a sentence; nothing where there is none."""
        steps = steps_on_disk(self.folder)
        return f" The checkpoint of step {steps[-1]} is {path_of(self.folder, steps[-1])}." if steps else ""


def _next(batches: Iterator[Batch]) -> tuple[Batch | None, DataError | None]:
    try:
        return next(batches), None
    except DataError as error:
        return None, error
