"""``python -m mae knn``."""

from dataclasses import dataclass
from pathlib import Path

import torch

from mae.commands.frozen import FrozenFeatures
from mae.commands.labelled_run import LabelledOptions
from mae.commands.results import Table
from mae.evaluation.predictions import Predictions
from mae.evaluation.probe import nearest_neighbours
from mae.fields import COUNT, SEED, WORKERS, are_all, check, is_number, is_whole
from mae.model.classifier import Pool

_RULES = {
    "k": (lambda x: are_all(x, is_whole, 1, 10**9) and len(x) > 0, "whole numbers above 0"),
    "temperature": (lambda x: is_number(x) and x >= 1e-3, "a number of at least 0.001"),
    "batch_size": COUNT,
    "workers": WORKERS,
    "seed": SEED,
}


@dataclass(frozen=True)
class KnnConfig(LabelledOptions):
    """Classify pictures by their nearest neighbours among the features of labelled ones; nothing is trained."""

    k: tuple[int, ...] = (5, 10, 20, 200)
    """Numbers of neighbours that vote, at most all. The predictions of 20 are kept, or those of the first number."""
    temperature: float = 0.07
    """A neighbour of cosine similarity s votes with exp(s / temperature)."""
    pool: Pool = "mean"
    """What of a picture is compared: the mean of the patch tokens, or the class token."""
    batch_size: int = 64
    """Images per forward pass."""
    workers: int = 2
    """Processes that decode images."""
    out: Path | None = None
    """Folder for results.json, predictions and report.html; by default the run folder of the checkpoint."""
    seed: int = 0
    """Of the untrained encoder."""
    device: str = "auto"
    """auto, cpu, cuda, mps."""


def knn(config: KnnConfig) -> None:
    check(vars(config), _RULES)
    asked = FrozenFeatures.prepare("knn", config, config.out, config.device, config.seed)
    print(f"Nearest neighbours by {asked.words(config.pool)}")
    train, test = asked.features(config.pool, config.batch_size, config.workers)
    device = next(iter(asked.encoders.values())).cls_token.device
    ks = [*dict.fromkeys(min(k, len(train.labels)) for k in config.k)]
    table, kept = Table(len(asked.test.classes), test.labels), 20 if 20 in ks else ks[0]
    labels, true, numbers = map(torch.from_numpy, (train.labels, test.labels, test.numbers))
    for i, name in enumerate(asked.encoders):
        features = [torch.from_numpy(x.features[i]).to(device) for x in (train, test)]
        votes = nearest_neighbours(features[0], labels, features[1], ks, config.temperature)
        predicted = {k: Predictions.of(share.cpu(), true, numbers) for k, share in votes.items()}
        for k, predictions in predicted.items():
            table.add(f"{name}, k = {k}", predictions)
    conditions = {"pool": config.pool, "temperature": config.temperature, "predictions_k": kept}
    asked.write(table, predicted[kept], images=len(train.labels), **conditions)
