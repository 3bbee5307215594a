"""What is done to a batch of labelled images on the device: parts erased, pairs mixed. Pure functions of seed and step.

Images are mixed with their neighbours, the first with the second, the third with the fourth: batches are in random
order, and so the result is the same in any number of processes.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mae.data.randomness import uniform

_TRIES = 10  # boxes, until one fits


class Mix(NamedTuple):
    """How the pairs of a batch are mixed."""

    share: float = 1.0  # of an image itself; the rest is its neighbour's
    box: tuple[slice, slice] | None = None  # rows and columns that come from the neighbour, None for a mean of pixels


def draw_mix(seed: int, step: int, mixup: float, cutmix: float, size: tuple[int, int]) -> Mix:
    """Mixup or cutmix, each in half of the steps where both have a parameter above 0, of a Beta(a, a) distribution.

    Source: Zhang et al. 2018, "mixup"; Yun et al. 2019, "CutMix"; one share for a batch, as timm's Mixup.
    """
    if not mixup and not cutmix:
        return Mix()
    from scipy.special import betaincinv  # here, because most commands have no use for it

    switch, quantile, down, right = uniform("mix", seed, (step, 0), 4)
    is_cut = bool(cutmix) and (not mixup or switch < 0.5)
    alpha = cutmix if is_cut else mixup
    share = float(betaincinv(alpha, alpha, quantile))
    if not is_cut:
        return Mix(share)
    box = []
    for length, place in zip(size, (down, right), strict=True):
        half, middle = int(length * math.sqrt(1 - share)) // 2, int(place * length)
        box.append(slice(max(0, middle - half), min(length, middle + half)))
    cut = math.prod(part.stop - part.start for part in box)
    return Mix(1 - cut / math.prod(size), (box[0], box[1]))


def neighbours(x: Tensor) -> Tensor:
    """``[N, ...]``, N even: the other of each pair in its place."""
    return x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def mix_images(images: Tensor, mix: Mix) -> Tensor:
    """Images ``[N, ..., H, W]``, floating for a mean of pixels."""
    if mix.box is None:
        return images * mix.share + neighbours(images) * (1 - mix.share)
    rows, columns = mix.box
    images, others = images.clone(), neighbours(images)
    images[..., rows, columns] = others[..., rows, columns]
    return images


def mixed_targets(labels: Tensor, classes: int, smoothing: float, mix: Mix) -> Tensor:
    """Probabilities ``[N, classes]`` float32 of labels ``[N]``: smoothing spreads that share over all classes."""
    targets = F.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes
    return targets if mix.share == 1 else targets * mix.share + neighbours(targets) * (1 - mix.share)


class Erasing(NamedTuple):
    """A box of some images, and the colour that it gets."""

    boxes: np.ndarray  # [N, 4] int64: first row, first column, rows, columns; all 0 for none
    colours: np.ndarray  # [N, C] float64 in [0, 1)

    def __call__(self, images: Tensor) -> Tensor:
        """Images ``[N, C, ..., H, W]`` uint8 with their boxes in one colour."""
        device, (height, width) = images.device, images.shape[-2:]
        top, left, rows, columns = torch.from_numpy(self.boxes).to(device)[..., None].unbind(1)  # each [N, 1]
        row, column = torch.arange(height, device=device), torch.arange(width, device=device)
        across, down = (column >= left) & (column < left + columns), (row >= top) & (row < top + rows)
        inside = down[:, :, None] & across[:, None]  # [N, H, W]
        colours = torch.from_numpy((self.colours * 256).astype(np.uint8)).to(device)
        ones = [1] * (images.ndim - 3)
        return torch.where(inside.view(-1, *ones, height, width), colours.view(*colours.shape, *ones, 1), images)


def draw_erasing(seed: int, step: int, share: float, batch_size: int, channels: int, size: tuple[int, int]) -> Erasing:
    """A box of 2 to 33 % of the area in that share of the images.

    Source: Zhong et al. 2017, "Random Erasing Data Augmentation", with boxes as timm's RandomErasing.
    """
    draws = uniform("erase", seed, (step, 0), batch_size * (1 + 4 * _TRIES + channels)).reshape(batch_size, -1)
    boxes = np.zeros((batch_size, 4), np.int64)
    for i in np.flatnonzero(draws[:, 0] < share):
        for area, ratio, down, right in draws[i, 1 : 1 + 4 * _TRIES].reshape(-1, 4):
            area = math.prod(size) * (0.02 + (1 / 3 - 0.02) * area)
            ratio = 0.3 * (1 / 0.3) ** (2 * ratio)
            rows, columns = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if rows < size[0] and columns < size[1]:
                boxes[i] = int(down * (size[0] - rows + 1)), int(right * (size[1] - columns + 1)), rows, columns
                break
    return Erasing(boxes, draws[:, -channels:])
