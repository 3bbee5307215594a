"""``python -m mae reconstruct``."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from mae.checkpoints.checkpoint import CheckpointError
from mae.commands.options import LoadOptions, ReadingOptions
from mae.commands.pictures import reconstructed, refuse_replacing, some_pictures, view_of
from mae.data import counted, printable
from mae.fields import COUNT, RATIO, SEED, check
from mae.model import MaskedAutoencoder
from mae.report.figures import View, default_count, picture_file, save_reconstructions
from mae.training.loop import choose_device
from mae.training.step import MaskStrategy, StrategyName


@dataclass(frozen=True)
class ReconstructConfig:
    """Hide patches of images, predict them, and save masked | reconstruction | original."""

    checkpoint: Path
    """Run folder, or a checkpoint file of any layout that convert reads."""
    images: tuple[str, ...]
    """Image files, folders of them, or hf: and a dataset, as in pretrain."""
    out: Path = Path("reconstructions.png")
    """Picture to write, a .png unless its name ends otherwise."""
    masking: StrategyName = "random"
    """Which patches are hidden, as in pretrain."""
    mask_ratio: float = 0.75
    """Share of hidden patches."""
    most: int | None = None
    """Take only this many images, spread over all files; by default 18, of clips and wide pictures 6."""
    view: View = "frames"
    """How clips and volumes are drawn: eight frames side by side, or the three central slices."""
    seed: int = 0
    """Of the masks."""
    device: str = "auto"
    """auto, cpu, cuda, mps."""
    loading: Annotated[LoadOptions, tyro.conf.arg(name="")] = field(default_factory=LoadOptions)
    reading: Annotated[ReadingOptions, tyro.conf.arg(name="")] = field(default_factory=ReadingOptions)


def reconstruct(config: ReconstructConfig) -> None:
    check(vars(config), {"mask_ratio": RATIO, "most": (lambda x: x is None or COUNT[0](x), COUNT[1]), "seed": SEED})
    config.reading.reading()
    out = picture_file(config.out)
    refuse_replacing(out, config.images)
    model = config.loading.load(config.checkpoint)
    if not isinstance(model, MaskedAutoencoder):
        raise CheckpointError(
            f"{config.checkpoint} holds the encoder alone, so there is nothing to reconstruct with; take a checkpoint "
            "that holds the decoder too (published ones are called *_full or mae_visualize_*)"
        )
    model = model.to(choose_device(config.device))
    reading = config.reading.reading(model.config)
    source, pictures, indices = some_pictures(config.images, reading, config.most or default_count(reading.image_size))
    strategy = MaskStrategy(config.masking, config.mask_ratio)
    result = reconstructed(model, pictures, strategy, config.seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_reconstructions(result, out, view=view_of(source, indices, config.view))
    print(f"Wrote {counted(len(pictures), 'reconstruction')} to {printable(out)}")
    if result.uses_true_statistics:
        print("The model was trained on normalised pixels: hidden patches take mean and contrast from the original.")
