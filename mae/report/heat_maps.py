"""Pictures of where a model looks."""

from pathlib import Path
from textwrap import wrap

import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

_SIDE, _GAP = 1.1, 0.05  # inches: the width of a picture, and what lies between the original and its maps
_DIMMED = 0.5  # share of the grey picture's light under the heat


def save_heat_maps(pictures: Tensor, maps: Tensor, titles: list[str], file: str | Path, words: str = "") -> None:
    """A row for each picture: itself, and its maps as heat over its grey.

    A map is dark where it is 0 and bright at its own maximum. Of clips the middle frame is drawn, with the maps of the
    patches that hold it.

    Args:
        pictures: ``[N, C, H, W]`` or ``[N, C, T, H, W]`` uint8.
        maps: ``[N, M, H', W']`` or ``[N, M, T', H', W']``, not negative.
        titles: M of them.
        words: a note below.
    """
    notes = [words] if words else []
    if pictures.ndim == 5:
        pictures, maps = (x[:, :, x.shape[2] // 2] for x in (pictures, maps))
        notes.append("middle frame")
    if pictures.shape[1] not in (1, 3):
        notes.append(f"mean of {pictures.shape[1]} channels")
    pictures = pictures.cpu() / 255
    count, channels, height, width = pictures.shape
    grey = pictures.mean(1)  # [N, H, W]
    maps = maps.float().cpu()
    maps = maps / maps.amax((2, 3), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    maps = F.interpolate(maps, (height, width), mode="bilinear")  # [N, M, H, W]
    # Light adds up: a colour is as bright on a black ground as on a white one, and grey never looks hot.
    heated = torch.from_numpy(colormaps["magma"](maps.numpy())[..., :3])  # [N, M, H, W, 3]
    heated = 1 - (1 - heated) * (1 - _DIMMED * grey[:, None, ..., None])
    widths = [1, _GAP, *[1] * len(titles)]
    width_in, height_in = _SIDE * sum(widths), count * (_SIDE * height / width + 0.05)
    lines = wrap("; ".join(notes), int(15 * width_in))  # letters of this size to the inch
    figure = Figure(figsize=(width_in, height_in + 0.25 + 0.17 * len(lines)), layout="constrained")
    axes = figure.subplots(count, len(widths), squeeze=False, width_ratios=widths)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, title in zip(axes[0], ["original", "", *titles], strict=True):
        axis.set_title(title, fontsize=8)
    for i, (original, _, *others) in enumerate(axes):
        shown = pictures[i].permute(1, 2, 0) if channels == 3 else grey[i]
        original.imshow(shown.numpy(), cmap="gray", vmin=0, vmax=1)
        for axis, picture in zip(others, heated[i], strict=True):
            axis.imshow(picture.numpy())
    if lines:
        figure.supxlabel("\n".join(lines), fontsize=8)
    figure.savefig(file, dpi=150)
