"""``python -m mae linprobe``."""

from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from mae.commands.frozen import FrozenFeatures
from mae.commands.labelled_run import FEATURES_OF, LabelledOptions, LabelledRun, run_labelled
from mae.commands.options import RunOptions
from mae.commands.results import Table
from mae.data import open_train_and_test, printable
from mae.evaluation.predictions import Predictions
from mae.evaluation.probe import linear_probe
from mae.model import Classifier, HeadConfig, VisionTransformer
from mae.model.classifier import Pool
from mae.training.classification import ProbeTraining, probing

_OF_BOTH = {"batch_size", "workers", "seed", "device"}  # options, which say the same to every solver
_SMALL = 20_000  # pictures to learn from, up to which a logistic regression is solved in minutes


@dataclass(frozen=True)
class LinprobeConfig(LabelledOptions):
    """Train a linear classifier on the frozen features of an encoder."""

    solver: Literal["auto", "lbfgs", "sgd", "lars"] = "auto"
    """lbfgs solves a logistic regression on features that are computed once, beside those of an untrained encoder. sgd
    is a run of the trainer with random crops, as published. lars is that with the published optimizer, for batches of
    thousands. auto: lbfgs up to 20000 pictures to learn from, sgd above."""
    pool: Pool | None = None
    """What the classifier sees: the mean of the patch tokens, or the class token. By default the mean with lbfgs, the
    class token with sgd and lars, as published."""
    out: Path | None = None
    """Folder for results.json, predictions and report.html. By default the run folder of the checkpoint with lbfgs,
    and with sgd and lars runs/linprobe, a run folder of its own."""
    start: Annotated[RunOptions, tyro.conf.arg(name="")] = field(default_factory=RunOptions)
    train: Annotated[ProbeTraining, tyro.conf.arg(name="")] = field(default_factory=ProbeTraining)


def linprobe(config: LinprobeConfig) -> None:
    config.reading.reading()
    solver: Literal["auto", "lbfgs", "sgd", "lars"] = config.solver
    if solver == "auto":
        data, _ = open_train_and_test(config.data, config.test)
        solver = "lbfgs" if len(data) <= _SMALL else "sgd"
    if solver == "lbfgs":
        _refuse_run_options(config)
        _solve(config)
        return
    pool = config.pool or "token"

    def make_model(encoder: VisionTransformer, classes: tuple[str, ...]) -> Classifier:
        return Classifier(encoder.config, HeadConfig(classes, pool)).load_encoder(encoder)

    run_labelled(
        LabelledRun(
            command="linprobe",
            words=f"Linear probe on the {FEATURES_OF[pool]} of {printable(config.checkpoint)}",
            row="pre-trained encoder",
            config=config,
            training=config.train,
            start=config.start,
            out=config.out or Path("runs/linprobe"),
            conditions={"solver": solver, "pool": pool},
            make_model=make_model,
            make_task=partial(probing, solver=solver),
        )
    )


def _refuse_run_options(config: LinprobeConfig) -> None:
    """Rather than pass them over."""
    for part in (config.start, config.train):
        for name in (x.name for x in fields(part) if x.name not in _OF_BOTH and getattr(part, x.name) != x.default):
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} has no effect with the solver lbfgs; leave it out, or add --solver sgd")


def _solve(config: LinprobeConfig) -> None:
    asked = FrozenFeatures.prepare("linprobe", config, config.out, config.train.device, config.train.seed)
    pool = config.pool or "mean"
    print(f"Linear probe on {asked.words(pool)}")
    train, test = asked.features(pool, config.train.batch_size, config.train.workers)
    table = Table(len(asked.test.classes), test.labels)
    for i, name in enumerate(asked.encoders):
        probabilities = torch.from_numpy(linear_probe(train.features[i], train.labels, test.features[i]))
        predictions = Predictions.of(probabilities, *map(torch.from_numpy, (test.labels, test.numbers)))
        table.add(name, predictions)
    asked.write(table, predictions, images=len(train.labels), solver="lbfgs", pool=pool)
