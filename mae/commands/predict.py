"""``python -m mae predict``."""

import csv
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import tyro

from mae.checkpoints.checkpoint import CheckpointError
from mae.checkpoints.saving import write_files
from mae.commands.options import LoadOptions, ReadingOptions
from mae.commands.pictures import open_images
from mae.data import counted, printable, usable_workers, whole_batches
from mae.data.whole import refuse_unreadable
from mae.fields import COUNT, WORKERS, check
from mae.model import Classifier
from mae.training.loop import choose_device

_MOST_NAMED = 8  # classes, in a line


@dataclass(frozen=True)
class PredictConfig:
    """Say what images show, by a classifier that finetune or linprobe has trained."""

    checkpoint: Path
    """Run folder of finetune or linprobe --solver sgd, or another checkpoint of a classifier."""
    images: tuple[str, ...]
    """Image files, folders of them, or hf: and a dataset."""
    out: Path = Path("predictions.csv")
    """Table to write, a row for each image: file, predicted class, its probability, and that of every class."""
    batch_size: int = 64
    """Images per forward pass."""
    workers: int = 2
    """Processes that decode images."""
    device: str = "auto"
    """auto, cpu, cuda, mps."""
    loading: Annotated[LoadOptions, tyro.conf.arg(name="")] = field(default_factory=LoadOptions)
    reading: Annotated[ReadingOptions, tyro.conf.arg(name="")] = field(default_factory=ReadingOptions)


@torch.no_grad()
def predict(config: PredictConfig) -> None:
    check(vars(config), {"batch_size": COUNT, "workers": WORKERS})
    config.reading.reading()
    if config.out.suffix != ".csv":
        raise ValueError(f"{config.out} must end in .csv")
    if config.out.is_dir():
        raise ValueError(f"{config.out} is a folder, not a file to write")
    model = config.loading.load(config.checkpoint)
    if not isinstance(model, Classifier):
        raise CheckpointError(
            f"{config.checkpoint} is no classifier: it was pre-trained and has learned no labels; train one with "
            f"python -m mae finetune --checkpoint {config.checkpoint} --data FOLDER --test FOLDER, or with linprobe "
            "--solver sgd"
        )
    device = choose_device(config.device)
    model.to(device)
    source, reading = open_images(config.images), config.reading.reading(model.config)
    classes, counts = model.head_config.classes, Counter()
    refuse_unreadable(source, reading)

    def lines() -> Iterator[list[Any]]:
        yield ["file", "predicted", "confidence", *classes]
        workers = usable_workers(config.workers)
        for images, numbers in whole_batches(source, reading, config.batch_size, workers=workers):
            probabilities = F.softmax(model(images.to(device)).float(), dim=1).cpu()
            for number, row in zip(numbers.tolist(), probabilities, strict=True):
                label = classes[int(row.argmax())]
                counts[label] += 1
                yield [source.name(number), label, *(f"{x:.4f}" for x in (row.max(), *row))]

    def write(path: Path) -> None:
        with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            csv.writer(file).writerows(lines())

    write_files(config.out.parent, {config.out.name: write})
    found = ", ".join(f"{count} {printable(name)}" for name, count in counts.most_common(_MOST_NAMED))
    more = f" and {len(counts) - _MOST_NAMED} more" if len(counts) > _MOST_NAMED else ""
    print(f"Wrote the labels of {counted(counts.total(), 'image')} to {printable(config.out)}: {found}{more}")
