"""Pictures for a run folder."""

from pathlib import Path

from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure

from mae.model import Reconstruction

_WAYS = ("masked", "reconstruction", "original")


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


def save_reconstructions(pictures: Reconstruction, file: str | Path, per_row: int = 3) -> None:
    """Triplets masked | reconstruction | original, per_row of them side by side, as in figure 2 of the paper.

    Channels that are neither grey nor colours are drawn as their mean.
    """
    count = len(pictures.original)
    per_row = min(per_row, count)
    rows = -(-count // per_row)
    # A narrow empty column between the triplets keeps them apart.
    columns = per_row * 4 - 1
    widths = [0.15 if c % 4 == 3 else 1 for c in range(columns)]
    height, width = pictures.original.shape[2:]
    figure = Figure(figsize=(1.1 * sum(widths), 1.1 * rows * height / width + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, width_ratios=widths)
    for axis in axes.flat:
        axis.set_axis_off()
    for i in range(count):
        for j, way in enumerate(_WAYS):
            axis = axes[i // per_row, i % per_row * 4 + j]
            picture = getattr(pictures, way)[i].permute(1, 2, 0).cpu().numpy()  # [H, W, C]
            axis.imshow(picture if picture.shape[2] == 3 else picture.mean(2), cmap="gray", vmin=0, vmax=1)
            if i < per_row:
                axis.set_title(way, fontsize=8)
    notes = []
    if (channels := pictures.original.shape[1]) not in (1, 3):
        notes.append(f"mean of {channels} channels")
    if pictures.uses_true_statistics:
        notes.append("hidden patches take their mean and contrast from the original (normalised-pixel targets)")
    if notes:
        figure.supxlabel("; ".join(notes), fontsize=8)
    figure.savefig(file, dpi=150)


def save_loss(history: list[dict], file: str | Path) -> None:
    """Training loss by step, from the entries of ``metrics.jsonl``."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axis = figure.subplots()
    axis.plot([entry["step"] for entry in history], [entry["loss"] for entry in history])
    axis.set_xlabel("step")
    axis.set_ylabel("squared error on hidden patches")
    axis.grid(alpha=0.3)
    figure.savefig(file, dpi=150)
