"""Linear probe: how much a linear classifier reads from frozen features."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from mae.model import VisionTransformer


@torch.no_grad()
def extract_features(model: VisionTransformer, batches: Iterable[Tensor]) -> np.ndarray:
    """The mean of the patch tokens of every image, nothing masked: ``[images, D]`` float32.

    Args:
        model: in evaluation mode for the call, on any device.
        batches: tensors ``[N, C, H, W]``, uint8 or normalised floating.
    """
    was_training = model.training
    model.eval()
    device = model.cls_token.device
    features = [model.forward_features(images.to(device))[:, 1:].mean(1).float().cpu() for images in batches]
    model.train(was_training)
    return torch.cat(features).numpy()


def linear_probe(train: np.ndarray, train_labels, test: np.ndarray, test_labels) -> float:
    """Top-1 accuracy on test of a logistic regression on standardised features ``[images, D]``."""
    from sklearn.linear_model import LogisticRegression  # here, because a second of every command would go into it
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return classifier.fit(train, train_labels).score(test, test_labels)
