"""``python -m mae pretrain``."""

from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from mae.checkpoints.checkpoint import CheckpointError, load_checkpoint
from mae.commands.data_benchmark import data_benchmark
from mae.commands.options import HOW_STARTED, ModelName, ReadingOptions, RunOptions, SizeOptions, flat, from_flat
from mae.commands.pictures import Drawing
from mae.commands.words import duration, rounded, started_workers
from mae.data import (
    ImageFiles,
    Source,
    StreamOrder,
    TrainingImages,
    counted,
    held_out,
    open_source,
    printable,
)
from mae.data.whole import refuse_unreadable
from mae.fields import SHARE, check
from mae.model import MAEConfig, MaskedAutoencoder
from mae.run_files import REPORT
from mae.training.loop import Looks, choose_device, train, uses_bfloat16
from mae.training.parallel import Processes, joined, own_device
from mae.training.profile import training_flops
from mae.training.recipe import Recipe, Schedule, TrainConfig, preset, unpublished
from mae.training.run import refuse_run
from mae.training.state import steps_on_disk
from mae.training.validation import Validation

_SOON = 600.0  # seconds, beyond which a run says what would be shorter


@dataclass(frozen=True)
class PretrainConfig:
    """Pre-train a masked autoencoder on a folder of images; under torchrun in several processes."""

    data: str
    """Folder of images, searched with its sub-folders; no labels are needed. Or hf: and a dataset: hf:NAME of the hub,
    hf:FOLDER, hf:FILE.parquet, hf:NAME:SPLIT. With :streaming behind it Parquet files are read where they lie, of the
    hub without a copy on this disk, in an order that mixes some row groups at a time."""
    model: ModelName | None = None
    """Architecture; by default mae_vit_small_patch16, on a CPU the smallest, mae_vit_tiny_patch16."""
    out: Path = Path("runs/pretrain")
    """Run folder: recipe.json, metrics.jsonl, checkpoints, model.safetensors, reconstructions, report.html."""
    recipe: str | None = None
    """Defaults of a recipe: published, small_data, cpu, or the recipe.json of a run. Other options win over it."""
    init: Path | None = None
    """Checkpoint whose weights the model begins with, of any layout that convert reads."""
    data_benchmark: bool = False
    """Measure how many images a second can be loaded, and trained on, and do nothing else."""
    val: str | None = None
    """Folder or hf:dataset of images that are held out: the loss of at most 4096 of them, spread over all, under masks
    that stay, is in metrics.jsonl."""
    val_share: float = 0.0
    """Share of the images that is held out in place of a folder."""
    norm_pix_loss: bool | Literal["channel"] = True
    """Normalise target patches, or each of their channels: better features. Without it the reconstructions are honest
    pictures."""
    decoder_depth: int | None = None
    """Blocks of the decoder, published: 8. Fewer are another model, not the same one faster: 1 block gives 84.8 % and
    not 84.9 % fine-tuned, and 65.5 % and not 73.5 % by linear probe (ViT-L, He et al. 2021, table 1)."""
    decoder_width: int | None = None
    """Width of the decoder, published: 512. There 128 gives 84.9 % fine-tuned and 69.1 % by linear probe."""
    decoder: Literal["self", "cross"] = "self"
    """self: mask tokens among the visible ones, as published. cross is not the published method but CrossMAE's: hidden
    patches attend to visible ones alone, which is faster, and a file that only this project reads."""
    predicted_share: float = 1.0
    """Share of the hidden patches that are predicted, published: all. Less is not the published method: faster, and a
    loss of fewer patches. CrossMAE was trained with a third and with all."""
    residual: Literal["float32", "bfloat16"] = "float32"
    """Tokens between the blocks under bfloat16 autocast: float32 as published; bfloat16 saves memory, not exact."""
    start: Annotated[RunOptions, tyro.conf.arg(name="")] = field(default_factory=RunOptions)
    sizes: Annotated[SizeOptions, tyro.conf.arg(name="")] = field(default_factory=SizeOptions)
    reading: Annotated[ReadingOptions, tyro.conf.arg(name="")] = field(default_factory=ReadingOptions)
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)


_NOT_OF_THE_RECIPE = HOW_STARTED | {"recipe", "data_benchmark"}
_SAY_THE_SAME = (("steps", "epochs"), ("warmup", "warmup_epochs"), ("val", "val_share"))
_NOT_OF_A_PRESET = _NOT_OF_THE_RECIPE | {"data", "val", "init"}


def defaults(arguments: list[str]) -> PretrainConfig | None:
    """Those of the recipe that the command line names; None where it names none."""
    names = [after for before, after in pairwise(arguments) if before == "--recipe"]
    names += [x.removeprefix("--recipe=") for x in arguments if x.startswith("--recipe=")]
    if not names:
        return None
    said = {x.split("=")[0].lstrip("-").replace("-", "_") for x in arguments if x.startswith("--")}
    beaten = {name for pair in _SAY_THE_SAME for name in pair if said & {*pair}} - said
    options = {name: x for name, x in preset(names[-1]).items() if name not in _NOT_OF_A_PRESET | beaten}
    return from_flat(PretrainConfig, {"data": tyro.MISSING, **options})


def pretrain(config: PretrainConfig) -> None:
    check(vars(config), {"val_share": SHARE})
    if config.val is not None and config.val_share:
        raise ValueError("--val and --val-share both say what is held out; give one of them")
    config.reading.reading()
    device = own_device(choose_device(config.train.device))
    if config.model is None:
        smallest = device.type == "cpu"
        config = replace(config, model="mae_vit_tiny_patch16" if smallest else "mae_vit_small_patch16")
    with joined(device) as processes:
        with processes.together():
            job = _prepare(config, device, processes)
        if processes.leads:
            print(job.plan(), flush=True)
        if config.start.dry_run:
            return
        if config.data_benchmark:
            if processes.leads:
                data_benchmark(job.images, job.model, job.config.train, device)
            return
        job.run(processes)


@dataclass
class _Job:
    """Everything that a run needs, checked."""

    config: PretrainConfig
    model: MaskedAutoencoder
    images: TrainingImages
    validation: Source | None
    schedule: Schedule
    device: torch.device

    @cached_property
    def recipe(self) -> Recipe:
        order, images = self.images.order(self.config.train.batch_size), self.images
        data = {"images": len(images), "fingerprint": images.source.fingerprint()}
        if self.validation is not None:
            data["held_out"] = len(self.validation)
        if isinstance(order, StreamOrder):
            data["open_at_once"] = order.open_at_once
        options = {name: x for name, x in flat(self.config).items() if name not in _NOT_OF_THE_RECIPE}
        return Recipe(options, data, self.schedule)

    def plan(self) -> str:
        config, schedule, model = self.config, self.schedule, self.model
        epochs = schedule.steps / schedule.steps_per_epoch
        pixels, patch = (" x ".join(map(str, size)) for size in (model.config.image_size, model.config.patch_size))
        words = (
            f"Pre-training {config.model} ({pixels} pixels in patches of {patch}, {self.device}) on "
            f"{counted(len(self.images), 'image')} from {printable(config.data)}: "
            f"{counted(schedule.steps, 'step')} of {config.train.batch_size} images, {rounded(epochs)} epochs, "
            f"learning rate up to {schedule.peak_lr:.2g}"
        )
        if self.validation is not None:
            words += f"; {counted(len(self.validation), 'image')} held out"
        at_once, blocks = self.recipe.data.get("open_at_once"), self.images.source.blocks
        if at_once and blocks is not None:
            groups = int((blocks.sizes > 0).sum())
            words += f". The stream mixes {min(at_once, groups)} of its {groups} row groups at a time"
        if others := unpublished(flat(config)):
            words += f"\nNot the published method: {', '.join(others)}"
        return words

    def foretell(self, seconds: float, steps: int) -> str:
        """How long the steps that are left will take, and what would be shorter."""
        left = seconds * steps
        words = f"A step takes {duration(seconds)}, and what is left of the run {duration(left)}"
        if left < _SOON:
            return words
        words += ". It ends earlier with fewer --steps"
        if self.config.recipe is None and self.device.type == "cpu":
            words += "; --recipe cpu is for a first look"
        config: MAEConfig = self.model.config
        shorter = replace(config, decoder_depth=1, decoder_embed_dim=128, decoder_num_heads=1)
        whole, part = (training_flops(x, self.config.train.mask_ratio) for x in (config, shorter))
        if part > 0.5 * whole:
            return words
        return (
            f"{words}. The decoder is {1 - part / whole:.0%} of the arithmetic: with --decoder-depth 1 --decoder-width "
            f"128, which is another model, the run takes {duration(left * part / whole)} at best"
        )

    def run(self, processes: Processes) -> None:
        config, reading, device = self.config, self.images.reading, self.device
        bfloat16 = uses_bfloat16(config.train.precision, device)
        validate = None
        if self.validation is not None:
            validate = Validation(
                self.validation,
                reading,
                config.train.strategy,
                processes,
                seed=config.train.seed,
                batch_size=max(1, config.train.batch_size // processes.count),
                autocast=torch.bfloat16 if bfloat16 else None,
            )
        drawing = Drawing(self.validation or self.images.source, reading, config.train.strategy, config.out)
        try:
            history = train(
                self.model,
                self.images,
                replace(config.train, device=str(device), workers=started_workers(config.train.workers, processes)),
                config.out,
                config.start.mode,
                processes=processes,
                looks=Looks(validate, drawing, self.foretell),
                recipe=self.recipe,
            )
        except Exception:
            if processes.leads:
                with suppress(Exception):  # what went wrong first is said
                    drawing.finish()
            raise
        if processes.leads:
            drawing.finish()
            if history:  # a person may have removed metrics.jsonl
                print(_result(history[-1]))
            print(f"The model is in {printable(config.out)}, and {REPORT} there shows its curves and pictures. Try it:")
            print(f"  python -m mae reconstruct --checkpoint {printable(config.out)} --images FOLDER")


def _prepare(config: PretrainConfig, device: torch.device, processes: Processes) -> _Job:
    if processes.leads and not config.data_benchmark:
        refuse_run(config.out, config.start.mode != "new")
    decoder: dict[str, Any] = {"decoder_depth": config.decoder_depth, "decoder_embed_dim": config.decoder_width}
    decoder |= {"decoder": config.decoder, "predicted_share": config.predicted_share}
    if config.train.masking == "grid" and config.predicted_share < 1:
        raise ValueError("masking grid has so few masks that with a predicted_share some patches are never predicted")
    assert config.model is not None
    sizes = config.sizes.config(config.model, norm_pix_loss=config.norm_pix_loss, **decoder)
    config.train.strategy(0, sizes.grid.grid)  # refuses a ratio that this grid cannot have
    source, validation = _without(config.out, open_source(config.data)), None
    if config.val is not None:
        validation = open_source(config.val)
    elif config.val_share:
        count = max(1, round(config.val_share * len(source)))
        if count >= len(source):
            raise ValueError(
                f"val_share {config.val_share:g} leaves none of {counted(len(source), 'image')} to train on"
            )
        source, validation = held_out(source, count, config.train.seed)
    if validation is not None:
        refuse_unreadable(validation, config.reading.reading(sizes))
    images = TrainingImages(source, config.reading.reading(sizes), config.train.seed)
    schedule = config.train.schedule(len(images))
    torch.manual_seed(config.train.seed)
    model = MaskedAutoencoder(sizes, torch.bfloat16 if config.residual == "bfloat16" else None)
    if config.init is not None and not (config.start.resume and steps_on_disk(config.out)):
        _take_weights(model, config.init)
    job = _Job(config, model, images, validation, schedule, device)
    if config.start.resume:
        job.recipe.refuse_another(config.out)
    return job


def _without(out: Path, source: Source) -> Source:
    """Pictures that a run has drawn into its own folder are not of the images that it is trained on."""
    if not isinstance(source, ImageFiles) or source.root is None:
        return source
    if not out.resolve().is_relative_to(source.root.resolve()):
        return source
    return ImageFiles([file for file in source.files if not file.resolve().is_relative_to(out.resolve())], source.root)


def _take_weights(model: MaskedAutoencoder, checkpoint: Path) -> None:
    config: MAEConfig = model.config
    loaded = load_checkpoint(checkpoint, image_size=config.image_size)
    if not isinstance(loaded, MaskedAutoencoder):
        raise CheckpointError(f"{checkpoint} holds the encoder alone, and pre-training needs the decoder too")
    other = [name for name, x in vars(config).items() if x != getattr(loaded.config, name) and name != "norm_pix_loss"]
    if other:
        pairs = (f"{name} {getattr(loaded.config, name)} and not {getattr(config, name)}" for name in other)
        raise CheckpointError(f"{checkpoint} is of another model: it has {', '.join(pairs)}")
    model.load_state_dict(loaded.state_dict())


def _result(entry: dict[str, Any]) -> str:
    loss = "no finite loss" if entry["loss"] is None else f"loss {entry['loss']:.4f}"
    held_out = f", {entry['val_loss']:.4f} on held-out images" if "val_loss" in entry else ""
    return f"Trained for {duration(entry['seconds'])}: {loss}{held_out}"
