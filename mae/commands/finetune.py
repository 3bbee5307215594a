"""``python -m mae finetune``."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from mae.commands.labelled_run import LabelledOptions, LabelledRun, run_labelled
from mae.commands.options import RunOptions
from mae.data import printable
from mae.model import Classifier, HeadConfig, VisionTransformer
from mae.model.classifier import Pool
from mae.training.classification import FinetuneTraining, finetuning


@dataclass(frozen=True)
class FinetuneConfig(LabelledOptions):
    """Train the encoder of a checkpoint and a classifier on labelled pictures; under torchrun in several processes."""

    out: Path = Path("runs/finetune")
    """Run folder: recipe.json, metrics.jsonl, checkpoints, model.safetensors, results.json, report.html."""
    scratch: bool = False
    """Begin with random weights of the same architecture: what pre-training is worth."""
    pool: Pool = "mean"
    """What the classifier sees: the mean of the patch tokens behind a norm of its own, as published, or the class
    token, which Hugging Face's ViTForImageClassification looks at."""
    start: Annotated[RunOptions, tyro.conf.arg(name="")] = field(default_factory=RunOptions)
    train: Annotated[FinetuneTraining, tyro.conf.arg(name="")] = field(default_factory=FinetuneTraining)


def finetune(config: FinetuneConfig) -> None:
    def make_model(encoder: VisionTransformer, classes: tuple[str, ...]) -> Classifier:
        head = HeadConfig(classes, config.pool, fc_norm=config.pool == "mean")
        model = Classifier(encoder.config, head, drop_path=config.train.drop_path)
        return model if config.scratch else model.load_encoder(encoder)

    of = "Training from scratch the architecture of" if config.scratch else "Fine-tuning the encoder of"
    run_labelled(
        LabelledRun(
            command="finetune",
            words=f"{of} {printable(config.checkpoint)}",
            row="from scratch" if config.scratch else "fine-tuned",
            config=config,
            training=config.train,
            start=config.start,
            out=config.out,
            conditions={"pool": config.pool},
            make_model=make_model,
            make_task=finetuning,
        )
    )
