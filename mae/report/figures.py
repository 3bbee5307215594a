"""Pictures for a run folder."""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure
from torch import Tensor

from mae.data.sound import HOP, RATE, row_of
from mae.model import Reconstruction
from mae.report.tables import abbreviated

View = Literal["frames", "slices"]

_WAYS = ("masked", "reconstruction", "original")
_MOST_FRAMES = 8  # of a clip in a picture
MOST_MISTAKES = 24
_WIDE = 2  # times as wide as high, from which on the pictures of a triplet lie below each other


def picture_file(file: Path) -> Path:
    """Where a picture of that name will lie: a ``.png`` where the name has no suffix.

    Raises:
        ValueError: a folder, or a format that cannot be written.
    """
    if file.is_dir():
        raise ValueError(f"{file} is a folder, not a picture to write")
    file = file if file.suffix else file.with_name(f"{file.name}.png")
    known = sorted(FigureCanvasBase.get_supported_filetypes())
    if file.suffix[1:].lower() not in known:
        raise ValueError(f"{file} is of no format that can be written; choose one of .{', .'.join(known)}")
    return file


def default_count(image_size: tuple[int, ...]) -> int:
    """How many samples of this size, ``(H, W)`` or ``(T, H, W)``, are enough for one picture."""
    *frames, height, width = image_size
    return 6 if min(math.prod(frames), _MOST_FRAMES) * width >= _WIDE * height else 18


def save_reconstructions(
    pictures: Reconstruction, file: str | Path, per_row: int = 3, view: View | Literal["sound"] = "frames"
) -> None:
    """Triplets masked | reconstruction | original, per_row of them side by side, as in figure 2 of the paper.

    Channels that are neither grey nor colours are drawn as their mean. Of a clip eight frames lie side by side, spread
    over all, or its central slices with ``view="slices"``: the middle frame, the middle row of all frames, and their
    middle column. The three of a triplet lie below each other where they are wide. ``view="sound"`` draws axes.
    """
    drawn = {way: _flat(getattr(pictures, way), view) for way in _WAYS}  # each [N, C, H, W]
    count, channels, height, width = drawn["original"].shape
    is_wide = width >= _WIDE * height
    per_row = count if is_wide else min(per_row, count)
    rows = -(-count // per_row)
    # A narrow empty column between the triplets keeps them apart.
    columns = per_row * 4 - 1
    widths = [0.15 if c % 4 == 3 else 1 for c in range(columns)]
    if is_wide:
        size = min(6.6, 1.1 * width / height)
        figure = Figure(figsize=(size, sum(widths) * (size * height / width + 0.25) + 0.6), layout="constrained")
        axes = figure.subplots(columns, rows, squeeze=False, height_ratios=widths).T
    else:
        figure = Figure(figsize=(1.1 * sum(widths), 1.1 * rows * height / width + 0.6), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, width_ratios=widths)
    for axis in axes.flat:
        axis.set_axis_off()
    for i in range(count):
        for j, (way, flat) in enumerate(drawn.items()):
            axis = axes[i // per_row, i % per_row * 4 + j]
            picture = flat[i].permute(1, 2, 0).cpu().numpy()  # [H, W, C]
            axis.imshow(picture if channels == 3 else picture.mean(2), cmap="gray", vmin=0, vmax=1)
            if i < per_row:
                axis.set_title(way, fontsize=8)
            if view == "sound":
                _draw_scales(axis, height)
    notes = []
    if channels not in (1, 3):
        notes.append(f"mean of {channels} channels")
    if pictures.uses_true_statistics:
        notes.append("hidden patches take their mean and contrast from the original (normalised-pixel targets)")
    if notes:
        figure.supxlabel("; ".join(notes), fontsize=8)
    figure.savefig(file, dpi=150)


def save_mistakes(pictures: Tensor, captions: Sequence[tuple[str, str, float]], file: str | Path) -> None:
    """Pictures that a classifier was wrong about, up to 24, those first that it was most sure of.

    Args:
        pictures: ``[n, C, H, W]``, or clips ``[n, C, T, H, W]``, uint8.
        captions: label, predicted and its confidence from 0 to 1, of each.
    """
    order = sorted(range(len(captions)), key=lambda i: -captions[i][2])[:MOST_MISTAKES]
    flat = _flat(pictures[order].cpu() / 255, "frames")  # [N, C, H, W]
    channels, height, width = flat.shape[1:]
    fitting = max(1, min(6, round(6 * math.sqrt(height / width))))  # in a row
    wide, letters = 10.5 / fitting, 180 // fitting  # of a cell: in inches, and in letters of this size
    per_row = max(1, min(fitting, len(order)))
    rows = max(1, -(-len(order) // per_row))
    high = min(wide * height / width, 5) + 0.35
    figure = Figure(figsize=(per_row * wide, rows * high + 0.2), layout="constrained")
    axes = figure.subplots(rows, per_row, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for i, axis in zip(range(len(order)), axes.flat, strict=False):
        label, predicted, confidence = captions[order[i]]
        picture = flat[i].permute(1, 2, 0).numpy()  # [H, W, C]
        axis.imshow(picture if channels == 3 else picture.mean(2), cmap="gray", vmin=0, vmax=1)
        words = (
            f"{abbreviated(label, letters)}\ntaken for {abbreviated(predicted, letters - 16)}, {100 * confidence:.0f} %"
        )
        axis.set_title(words, fontsize=6.5, parse_math=False)  # a name may hold $
    if not order:
        figure.text(0.5, 0.5, "no mistakes", ha="center", va="center")
    elif channels not in (1, 3):
        figure.supxlabel(f"mean of {channels} channels", fontsize=8)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a letter that the font lacks is a box; the page holds it
        figure.savefig(file, dpi=150)


def _flat(pictures: Tensor, view: str) -> Tensor:
    """``[N, C, H, W]`` of pictures, or of clips ``[N, C, T, H, W]``."""
    if pictures.ndim == 4:
        return pictures
    frames, height, width = pictures.shape[2:]
    if view == "slices":
        middle = pictures[:, :, frames // 2], pictures[:, :, :, height // 2], pictures[:, :, :, :, width // 2]
        highest = max(height, frames)
        return torch.cat([F.pad(x, (0, 2, 0, highest - x.shape[2]), value=1) for x in middle], dim=3)
    shown = torch.linspace(0, frames - 1, min(frames, _MOST_FRAMES)).round().long()
    return torch.cat([F.pad(pictures[:, :, t], (0, 2), value=1) for t in shown], dim=3)


def _draw_scales(axis: Axes, height: int) -> None:
    """Of a spectrogram: seconds to the right, kHz upwards."""
    axis.set_axis_on()
    axis.tick_params(labelsize=5, length=2)
    axis.xaxis.set_major_formatter(lambda column, _: f"{column * HOP / RATE:g} s")
    kilohertz = (0.5, 1, 2, 4)
    axis.set_yticks([row_of(1000 * x, height) for x in kilohertz], [f"{x} kHz" for x in kilohertz])
