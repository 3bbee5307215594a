"""What a classifier takes labelled pictures for, and how often it is right."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mae.data import Batch, Labelled, Reading, whole_batches
from mae.data.whole import warn_unreadable
from mae.training.parallel import Processes

_TOP_5_FROM = 10  # classes


class Predictions(NamedTuple):
    """One entry for each picture."""

    numbers: np.ndarray  # [n] int64, in their source
    labels: np.ndarray  # [n] int64
    predicted: np.ndarray  # [n] int64
    confidence: np.ndarray  # [n] float32, the probability of what is predicted
    ranks: np.ndarray  # [n] int64, the place of the true class, 0 where the prediction is right
    losses: np.ndarray  # [n] float32, the negative logarithm of the true one's probability

    @staticmethod
    def of(probabilities: Tensor, labels: Tensor, numbers: Tensor) -> "Predictions":
        """Of probabilities ``[n, classes]``; of equal ones the first class comes first, and NaN counts as 0."""
        probabilities = probabilities.float().nan_to_num(0.0)
        true, places = probabilities.gather(1, labels[:, None]), torch.arange(probabilities.shape[1])
        before = (probabilities > true) | ((probabilities == true) & (places < labels[:, None]))
        losses = -true[:, 0].clamp(min=torch.finfo(torch.float32).tiny).log()
        columns = numbers, labels, probabilities.argmax(1), probabilities.amax(1), before.sum(1), losses
        return Predictions(*(x.numpy() for x in columns))

    @staticmethod
    def joined(parts: "Sequence[Predictions]") -> "Predictions":
        """In the order of their numbers."""
        whole = [np.concatenate(columns) for columns in zip(*parts, strict=True)]
        order = np.argsort(whole[0], kind="stable")
        return Predictions(*(x[order] for x in whole))

    def top(self, k: int) -> float:
        """The share of pictures whose class is among the k most probable."""
        return float((self.ranks < k).mean())

    def mistakes(self) -> np.ndarray:
        """Places of those that are wrong, the most confident first."""
        wrong = np.flatnonzero(self.ranks)
        return wrong[np.argsort(-self.confidence[wrong], kind="stable")]


def measures(classes: int) -> tuple[int, ...]:
    """The k of which top-k accuracy is said."""
    return (1, 5) if classes >= _TOP_5_FROM else (1,)


class Evaluation:
    """Callable: a classifier in, its :class:`Predictions` of labelled pictures out, alike in any number of processes.

    The pictures are read again in each call. What cannot be read is left out, and said in the first.

    Args:
        batch_size: images of a forward pass in each process.
        autocast: to which dtype, None for none.
        workers: processes that read, for each process that computes.
    """

    def __init__(
        self,
        labelled: Labelled,
        reading: Reading,
        processes: Processes = Processes(),
        *,
        batch_size: int = 64,
        autocast: torch.dtype | None = None,
        workers: int = 0,
    ) -> None:
        self._labelled, self._reading, self._processes = labelled, reading, processes
        self._batch_size, self._autocast, self._workers = batch_size, autocast, workers
        self._is_first = True

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> Predictions:
        was_training, self._problems = model.training, []
        model.eval()
        try:
            parts = self._parts(model)
        finally:  # a run goes on where its test pictures cannot be had for a while
            model.train(was_training)
        gathered = self._processes.gather((parts, self._problems))
        if self._is_first and self._processes.leads:
            warn_unreadable([x for _, problems in gathered for x in problems], len(self._labelled))
        self._is_first = False
        return Predictions.joined([part for parts, _ in gathered for part in parts])

    def _parts(self, model: nn.Module) -> list[Predictions]:
        """This process's share."""
        device, processes = next(model.parameters()).device, self._processes
        labels, batches, parts = torch.from_numpy(self._labelled.labels), self._batches(), []
        blank = torch.zeros(1, self._reading.channels, *self._reading.image_size, dtype=torch.uint8)
        while True:
            with processes.together():
                batch = next(batches, None)
            # FSDP2 gathers parameters in every forward pass, so that all processes need as many of them.
            if not processes.most(batch is not None):
                break
            images = blank if batch is None else batch.images
            with torch.autocast(device.type, self._autocast, enabled=self._autocast is not None):
                logits = model(images.to(device, non_blocking=True))
            if batch is not None:
                probabilities = F.softmax(logits.float(), dim=1).cpu()
                parts.append(Predictions.of(probabilities, labels[batch.numbers], batch.numbers))
        return parts

    def scalars(self, model: nn.Module) -> dict[str, float]:
        """What a run logs of it."""
        predictions = self(model)
        return {"val_loss": float(predictions.losses.mean()), "val_top1": predictions.top(1)}

    def _batches(self) -> Iterator[Batch]:
        count, processes = len(self._labelled), self._processes
        numbers = range(count * processes.rank // processes.count, count * (processes.rank + 1) // processes.count)
        return whole_batches(
            self._labelled.source,
            self._reading,
            self._batch_size,
            numbers=numbers,
            workers=self._workers,
            warn=self._is_first,
            problems=self._problems,
        )
