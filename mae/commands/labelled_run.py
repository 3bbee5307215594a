"""What fine-tuning and linear probing have in common: a run of the trainer on labelled pictures, and its test."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from mae.checkpoints.checkpoint import load_checkpoint
from mae.commands.options import HOW_STARTED, LoadOptions, ReadingOptions, RunOptions, flat
from mae.commands.results import Results, Table
from mae.commands.words import duration, rounded, started_workers
from mae.data import Labelled, TrainingImages, counted, open_train_and_test, printable, usable_workers
from mae.data.whole import refuse_unreadable
from mae.evaluation.predictions import Evaluation
from mae.model import Classifier, VisionTransformer
from mae.model.classifier import Pool
from mae.report.page import write_report
from mae.run_files import METRICS
from mae.training.classification import Classification, LabelledConfig
from mae.training.loop import Looks, choose_device, train, uses_bfloat16
from mae.training.parallel import Processes, joined, own_device
from mae.training.recipe import Recipe
from mae.training.run import RunError, refuse_run

FEATURES_OF: dict[Pool, str] = {"mean": "mean features", "token": "class-token features"}

_FEW = 10_000  # pictures


@dataclass(frozen=True)
class LabelledOptions:
    """What every command has that takes a checkpoint, labelled pictures and others to test on."""

    checkpoint: Path
    """Run folder, or a checkpoint file of any layout that convert reads; of a classifier its encoder."""
    data: str
    """Labelled pictures to learn from: a folder with one sub-folder per class, or hf: and a dataset with a column of
    labels, as in hf:NAME:train or hf:FILE.parquet:label=COLUMN."""
    test: str
    """Labelled pictures to test on, of the same classes."""
    loading: Annotated[LoadOptions, tyro.conf.arg(name="")] = field(default_factory=LoadOptions)
    reading: Annotated[ReadingOptions, tyro.conf.arg(name="")] = field(default_factory=ReadingOptions)

    @property
    def where(self) -> dict[str, str]:
        """What is tested on what, as a result says it."""
        return {name: str(getattr(self, name)) for name in ("checkpoint", "data", "test")}


@dataclass(frozen=True)
class LabelledRun:
    """A run that is asked for."""

    command: Literal["finetune", "linprobe"]
    words: str  # which its first line begins with
    row: str  # of the table of accuracies
    config: LabelledOptions
    training: LabelledConfig
    start: RunOptions
    out: Path
    conditions: dict[str, Any]  # which stand beside its accuracies
    make_model: Callable[[VisionTransformer, tuple[str, ...]], Classifier]  # of the encoder and the classes
    make_task: Callable[..., Classification]  # of the classifier, the training, the labels and the processes


def run_labelled(asked: LabelledRun) -> None:
    """Train, test, and write results and report."""
    device = own_device(choose_device(asked.training.device))
    with joined(device) as processes:
        with processes.together():
            job = _prepare(asked, device, processes)
        if processes.leads:
            print("\n".join(filter(None, [job.plan(), job.hint()])), flush=True)
        if not asked.start.dry_run:
            job.train()
            job.evaluate()


@dataclass
class _Job:
    """Everything that the run needs, checked."""

    asked: LabelledRun
    model: Classifier
    task: Classification
    images: TrainingImages
    test: Labelled
    recipe: Recipe
    results: Results
    evaluation: Evaluation
    device: torch.device
    processes: Processes

    def hint(self) -> str:
        """For those who fine-tune on few pictures with what is published for a million; nothing where there is none."""
        training = self.asked.training
        if not (training.mixup or training.cutmix) or len(self.images) >= _FEW:
            return ""
        return (
            "The published recipe is for a million pictures, and may learn little from so few; see what this does: "
            "--base-lr 8e-3 --least-area 0.6 --mixup 0 --cutmix 0"
        )

    def plan(self) -> str:
        asked, schedule, size = self.asked, self.recipe.schedule, self.model.config
        pixels, patch = (" x ".join(map(str, x)) for x in (size.image_size, size.patch_size))
        epochs = rounded(schedule.steps / schedule.steps_per_epoch)
        return (
            f"{asked.words} ({pixels} pixels in patches of {patch}, {self.device}) on "
            f"{counted(len(self.images), 'picture')} of {len(self.test.classes)} classes from "
            f"{printable(asked.config.data)}: {counted(schedule.steps, 'step')} of {asked.training.batch_size} images, "
            f"{epochs} epochs, learning rate up to {schedule.peak_lr:.2g}; {counted(len(self.test), 'picture')} to test"
        )

    def train(self) -> None:
        asked, leads = self.asked, self.processes.leads
        workers = started_workers(asked.training.workers, self.processes)
        try:
            train(
                self.model,
                self.images,
                replace(asked.training, device=str(self.device), workers=workers),
                asked.out,
                asked.start.mode,
                task=self.task,
                processes=self.processes,
                looks=Looks(self.evaluation.scalars, foretell=_foretell),
                recipe=self.recipe,
            )
        except Exception:
            if leads and (asked.out / METRICS).is_file():
                with suppress(Exception):  # what went wrong first is said
                    write_report(asked.out)
            raise

    def evaluate(self) -> None:
        """What is on disk is tested, which is what others load."""
        self.processes.gather(None)  # until the leading one has written it
        with self.processes.together():
            model = load_checkpoint(self.asked.out).to(self.device)
        predictions = self.evaluation(model)
        if not self.processes.leads:
            return
        table = Table(len(self.test.classes), predictions.labels, f"{len(predictions.numbers)} test pictures")
        table.add(self.asked.row, predictions)
        conditions = self.asked.config.where | {"images": len(self.images)} | self.asked.conditions
        self.results.write(table, predictions, self.test, self.images.reading, conditions)
        print(f"The classifier is in {printable(self.asked.out)}. Try it:")
        print(f"  python -m mae predict --checkpoint {printable(self.asked.out)} --images FOLDER --out predictions.csv")


def _prepare(asked: LabelledRun, device: torch.device, processes: Processes) -> _Job:
    config, training = asked.config, asked.training
    if asked.start.overwrite and config.checkpoint.resolve().is_relative_to(asked.out.resolve()):
        raise RunError(f"--overwrite would remove {config.checkpoint}, which the run begins with; choose another --out")
    if processes.leads:
        refuse_run(asked.out, asked.start.mode != "new")
    results = Results(asked.command, asked.out)
    config.reading.reading()
    data, test = open_train_and_test(config.data, config.test)
    encoder = config.loading.load(config.checkpoint)
    torch.manual_seed(training.seed)
    model = asked.make_model(encoder, data.classes)
    task = asked.make_task(model, training, torch.from_numpy(data.labels), processes)
    reading = config.reading.reading(model.config)
    for labelled in (data, test):
        refuse_unreadable(labelled.source, reading)
    images = TrainingImages(data.source, reading, training.seed, least_area=training.least_area, flips=training.flips)
    held = {"images": len(data), "fingerprint": data.source.fingerprint(), "labels": data.fingerprint()}
    options = {name: x for name, x in flat(config).items() if name not in HOW_STARTED}
    recipe = Recipe({"command": asked.command, **options}, held, training.schedule(len(data)))
    if asked.start.resume:
        recipe.refuse_another(asked.out)
    evaluation = Evaluation(
        test,
        reading,
        processes,
        batch_size=max(1, training.batch_size // processes.count),
        autocast=torch.bfloat16 if uses_bfloat16(training.precision, device) else None,
        workers=usable_workers(training.workers),
    )
    return _Job(asked, model, task, images, test, recipe, results, evaluation, device, processes)


def _foretell(seconds: float, steps: int) -> str:
    return f"A step takes {duration(seconds)}, and what is left of the run {duration(seconds * steps)}"
