"""``python -m mae pretrain``."""

import os
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from mae.commands.options import ModelName, ReadingOptions, SizeOptions
from mae.commands.reconstruct import ReconstructConfig, reconstruct
from mae.data import Batches, DataWarning, TrainingImages, find_images, printable
from mae.fields import check, is_whole
from mae.model import MaskedAutoencoder
from mae.report.figures import save_loss
from mae.training.loop import TrainConfig, choose_device, train
from mae.training.run import open_run, refuse_run


@dataclass(frozen=True)
class PretrainConfig:
    """Pre-train a masked autoencoder on a folder of images."""

    data: Path
    """Folder of images, searched with its sub-folders; no labels are needed."""
    model: ModelName = "mae_vit_small_patch16"
    """Architecture."""
    out: Path = Path("runs/pretrain")
    """Run folder: model.safetensors, config.json, metrics.jsonl, loss.png, reconstructions.png."""
    overwrite: bool = False
    """Replace the run that the folder holds."""
    norm_pix_loss: bool | Literal["channel"] = True
    """Normalise target patches, or each of their channels: better features. Without it the reconstructions are honest
    pictures."""
    decoder_depth: int | None = None
    """Blocks of the decoder, published: 8. Fewer are another model, not the same one faster: 1 block gives 84.8 % and
    not 84.9 % fine-tuned, and 65.5 % and not 73.5 % by linear probe (ViT-L, He et al. 2021, table 1)."""
    decoder_width: int | None = None
    """Width of the decoder, published: 512. There 128 gives 84.9 % fine-tuned and 69.1 % by linear probe."""
    residual: Literal["float32", "bfloat16"] = "float32"
    """Tokens between the blocks under bfloat16 autocast: float32 as published; bfloat16 saves memory, not exact."""
    workers: int = 2
    """Processes that decode and crop images."""
    sizes: Annotated[SizeOptions, tyro.conf.arg(name="")] = field(default_factory=SizeOptions)
    reading: Annotated[ReadingOptions, tyro.conf.arg(name="")] = field(default_factory=ReadingOptions)
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)


def pretrain(config: PretrainConfig) -> None:
    check(vars(config), {"workers": (lambda x: is_whole(x, 0, 10**9), "a whole number from 0 on")})
    config.reading.reading()
    refuse_run(config.out, config.overwrite)
    choose_device(config.train.device)
    decoder = {"decoder_depth": config.decoder_depth, "decoder_embed_dim": config.decoder_width}
    sizes = config.sizes.config(config.model, norm_pix_loss=config.norm_pix_loss, **decoder)
    config.train.strategy(0, sizes.grid.grid)  # refuses a ratio that this grid cannot have
    files = find_images(config.data)
    torch.manual_seed(config.train.seed)
    model = MaskedAutoencoder(sizes, torch.bfloat16 if config.residual == "bfloat16" else None)
    with open_run(config.out, config.overwrite):
        _pretrain(config, files, model)


def _pretrain(config: PretrainConfig, files: list[Path], model: MaskedAutoencoder) -> None:
    print(f"Pre-training {config.model} on {len(files)} images from {printable(config.data)}")
    batches = Batches(
        TrainingImages(files, config.reading.reading(model.config)),
        steps=config.train.steps,
        batch_size=config.train.batch_size,
        workers=_workers(config.workers),
        seed=config.train.seed,
    )
    try:
        history = train(model, batches, config.train, config.out, overwrite=True)  # its folder is held
    finally:
        batches.notes.warn()
    save_loss(history, config.out / "loss.png")
    picture = config.out / "reconstructions.png"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)  # training has said them
        shared = {name: getattr(config.train, name) for name in ("device", "masking", "mask_ratio")}
        reconstruct(ReconstructConfig(config.out, (config.data,), picture, reading=config.reading, **shared))
    print(f"The model is in {printable(config.out)}. Try it on images that it has not seen:")
    print(f"  python -m mae reconstruct --checkpoint {printable(config.out)} --images FOLDER")


def _workers(asked: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if asked > cores:
        print(f"Warning: {asked} workers were asked for; {cores} are started, one a core", file=sys.stderr)
    return min(asked, cores)
