"""Linear probe and nearest neighbours: what can be read from frozen features without training the encoder."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 1 << 26  # similarities at a time


def linear_probe(train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Probabilities ``[m, classes]`` of test by a logistic regression on standardised features.

    Args:
        train: ``[n, D]``.
        labels: ``[n]`` whole numbers from 0 on, each at least once.
        test: ``[m, D]``.
    """
    from sklearn.linear_model import LogisticRegression  # here, because a second of every command would go into it
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return classifier.fit(train, labels).predict_proba(test)


@torch.no_grad()
def nearest_neighbours(
    train: Tensor, labels: Tensor, test: Tensor, ks: Sequence[int], temperature: float = 0.07
) -> dict[int, Tensor]:
    """Shares of the votes ``[m, classes]`` of each picture's k nearest neighbours, for each k.

    A neighbour of cosine similarity s votes with ``exp(s / temperature)``. Where there are fewer than k, all vote.

    Args:
        train: ``[n, D]``, on the device that computes.
        labels: ``[n]`` int64 from 0 on.
        test: ``[m, D]``, there too.

    Source: Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination".
    """
    train, test = (F.normalize(x.float(), dim=1) for x in (train, test))
    ks = tuple(dict.fromkeys(ks))
    labels, classes, most = labels.to(train.device), int(labels.max()) + 1, min(max(ks), len(train))
    votes: dict[int, list[Tensor]] = {k: [] for k in ks}
    for part in test.split(max(1, _CHUNK // len(train))):
        similarity, nearest = (part @ train.T).topk(most, dim=1)  # [chunk, most], the nearest first
        weights = ((similarity - similarity[:, :1]) / temperature).exp()  # of which only ratios matter
        for k in ks:
            counts = part.new_zeros(len(part), classes)
            counts.scatter_add_(1, labels[nearest[:, :k]], weights[:, :k])
            votes[k].append(counts / counts.sum(1, keepdim=True))
    return {k: torch.cat(parts) for k, parts in votes.items()}
