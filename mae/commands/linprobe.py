"""``python -m mae linprobe``."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from mae.checkpoints.saving import write_json
from mae.commands.options import LoadOptions, ReadingOptions
from mae.data import DataError, ImageFiles, find_labelled_images, printable, read_pictures
from mae.evaluation.probe import extract_features, linear_probe
from mae.fields import COUNT, SEED, check
from mae.model import MaskedAutoencoder, VisionTransformer
from mae.run_files import RESULTS
from mae.training.loop import choose_device
from mae.training.run import refuse_file


@dataclass(frozen=True)
class LinprobeConfig:
    """Train a linear classifier on frozen features and compare with an untrained encoder."""

    checkpoint: Path
    """Run folder, or a checkpoint file of any layout that convert reads."""
    data: Path
    """Training images, one sub-folder per class."""
    test: Path
    """Test images, the same sub-folders."""
    batch_size: int = 64
    """Images per forward pass."""
    out: Path | None = None
    """Folder for results.json, to which the result is added; by default the run folder, if there is one."""
    seed: int = 0
    """Of the untrained encoder."""
    device: str = "auto"
    """auto, cpu, cuda, mps."""
    loading: Annotated[LoadOptions, tyro.conf.arg(name="")] = field(default_factory=LoadOptions)
    reading: Annotated[ReadingOptions, tyro.conf.arg(name="")] = field(default_factory=ReadingOptions)


def linprobe(config: LinprobeConfig) -> None:
    check(vars(config), {"batch_size": COUNT, "seed": SEED})
    config.reading.reading()
    device = choose_device(config.device)
    trained = config.loading.load(config.checkpoint).to(device)
    torch.manual_seed(config.seed)
    untrained = MaskedAutoencoder(trained.config).to(device)
    *fit, classes = find_labelled_images(config.data)
    *test, test_classes = find_labelled_images(config.test)
    if classes != test_classes:
        only = sorted(set(classes) ^ set(test_classes))
        raise DataError(
            f"{printable(config.data)} and {printable(config.test)} do not hold the same classes; only in one: "
            f"{', '.join(map(printable, only))}"
        )
    folder = config.out or (config.checkpoint if config.checkpoint.is_dir() else None)
    if folder is not None:  # what cannot be written is better known before minutes of work
        refuse_file(folder)
        earlier = _results(folder)
    print(f"Linear probe: {len(fit[0])} images to fit, {len(test[0])} to test, {len(classes)} classes")
    top1 = {"chance (largest class)": max(Counter(test[1]).values()) / len(test[1])}
    print(f"  {'chance (largest class)':<24}{top1['chance (largest class)']:>8.1%}")
    for name, model in {"untrained encoder": untrained, "pre-trained encoder": trained}.items():
        features = [_features(model, files, labels, config) for files, labels in (fit, test)]
        top1[name] = linear_probe(*features[0], *features[1])
        print(f"  {name:<24}{top1[name]:>8.1%}")
    if folder is not None:
        counts = {"images": len(fit[0]), "test_images": len(test[0]), "classes": len(classes)}
        where = {name: str(getattr(config, name)) for name in ("checkpoint", "data", "test")}
        result = {"command": "linprobe", **where, **counts, "top1": top1}
        write_json(folder, {RESULTS: [*earlier, result]})
        print(f"Added to {printable(folder / RESULTS)}")


def _results(folder: Path) -> list[dict]:
    file = folder / RESULTS
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    except ValueError:
        found = None
    if not isinstance(found, list):
        raise ValueError(f"{file} is no list of results; give another --out")
    return found


def _features(model: VisionTransformer, files: list[Path], labels: list[int], config: LinprobeConfig):
    kept: list[int] = []

    def batches() -> Iterator[Tensor]:
        reading = config.reading.reading(model.config)
        waiting = []
        for picture, index in read_pictures(ImageFiles(files), reading):
            waiting.append(picture)
            kept.append(labels[index])
            if len(waiting) == config.batch_size:
                yield torch.stack(waiting)
                waiting.clear()
        if waiting:
            yield torch.stack(waiting)

    return extract_features(model, batches()), kept
