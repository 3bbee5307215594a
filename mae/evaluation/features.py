"""Features of whole pictures, from a frozen encoder."""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mae.data import DataError, Labelled, Reading, printable, whole_batches
from mae.model import Classifier, VisionTransformer
from mae.model.classifier import pool_tokens

FeatureKind = Literal["mean", "token", "patches"]


@torch.no_grad()
def features_of(model: VisionTransformer, images: Tensor, kind: FeatureKind = "mean") -> Tensor:
    """What the encoder makes of images, nothing masked, in float32 on the model's device.

    Args:
        model: in evaluation mode, on any device. Of a :class:`mae.model.Classifier` whose head has a norm of the mean
            the mean is normalised by it, as its head sees it; its tokens are not normalised.
        images: as of :class:`mae.model.VisionTransformer`, on any device.
        kind: the mean of the patch tokens or the class token, ``[N, D]``, or all patch tokens ``[N, L, D]``.
    """
    tokens = model.forward_features(images.to(model.cls_token.device)).float()
    if kind == "patches":
        return tokens[:, 1:]
    pooled = pool_tokens(tokens, kind)
    return model.fc_norm(pooled) if kind == "mean" and isinstance(model, Classifier) else pooled


def extract_features(model: VisionTransformer, batches: Iterable[Tensor], kind: FeatureKind = "mean") -> np.ndarray:
    """The features of all batches of images in one array, ``[images, ...]`` float32.

    The model is in evaluation mode for the call.
    """
    was_training = model.training
    model.eval()
    try:
        return torch.cat([features_of(model, images, kind).cpu() for images in batches]).numpy()
    finally:
        model.train(was_training)


class LabelledFeatures(NamedTuple):
    """Of the pictures that could be read."""

    features: list[np.ndarray]  # of each model, [n, D] float32
    labels: np.ndarray  # [n] int64
    numbers: np.ndarray  # [n] int64, in their source


def labelled_features(
    models: Sequence[VisionTransformer],
    labelled: Labelled,
    reading: Reading,
    kind: FeatureKind = "mean",
    *,
    batch_size: int = 64,
    workers: int = 0,
) -> LabelledFeatures:
    """Features of several models, for which each picture is read once.

    Raises:
        DataError: no picture of a class can be read, or features are not finite.
    """
    parts, numbers = [], []
    for model in models:
        model.eval()
    for images, places in whole_batches(labelled.source, reading, batch_size, workers=workers):
        numbers.append(places)
        parts.append([features_of(model, images, kind).cpu() for model in models])
    places = torch.cat(numbers).numpy()
    labels = labelled.labels[places]
    if missing := {*range(len(labelled.classes))} - {*labels.tolist()}:
        name = printable(labelled.classes[min(missing)])
        raise DataError(f"no picture of {name} in {printable(labelled.where)} can be read")
    features = [torch.cat(x).numpy() for x in zip(*parts, strict=True)]
    if not all(np.isfinite(x).all() for x in features):  # NaN would be everybody's nearest neighbour
        raise DataError(f"the encoder's features of {printable(labelled.where)} are not all finite")
    return LabelledFeatures(features, labels, places)
