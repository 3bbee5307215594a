"""The pictures of the documentation, written into docs/pictures: ``python docs/pictures.py``."""

from pathlib import Path

import matplotlib.pyplot as plt
import torch

from mae_kernels import axis_masking, block_masking, grid_masking, random_masking, tube_masking

FOLDER = Path(__file__).parent / "pictures"


def masks() -> None:
    """Each masking strategy at its usual ratio on 14 x 14 patches, tubes in three frames; hidden patches are dark."""
    generator = torch.Generator().manual_seed(8)
    drawn = {
        "random, 75 %": random_masking(1, 196, 0.75, generator=generator),
        "grid, 75 %": grid_masking(1, (14, 14), 0.75, generator=generator),
        "block, 40 %": block_masking(1, (14, 14), 0.4, generator=generator),
        "axis, 75 %": axis_masking(1, (14, 14), 0.75, share=0.4, generator=generator),
        "tube, 90 %": tube_masking(1, (3, 14, 14), 0.9, generator=generator),
    }
    shown = [(title, frame) for title, m in drawn.items() for frame in m.mask.view(-1, 14, 14)]
    figure, axes = plt.subplots(1, len(shown), figsize=(1.5 * len(shown), 1.72), layout="constrained")
    for ax, (title, frame) in zip(axes, shown, strict=True):
        ax.pcolormesh(frame.flip(0), cmap="Blues", vmin=-0.3, vmax=1.2, edgecolors="white", linewidth=0.4)
        ax.set(aspect="equal", xticks=[], yticks=[])
        ax.set_frame_on(False)
        ax.set_title(title, fontsize=8)
    save(figure, "masks")


def save(figure: plt.Figure, name: str) -> None:
    FOLDER.mkdir(exist_ok=True)
    figure.savefig(FOLDER / f"{name}.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    masks()
