"""``python -m mae``: pre-train, reconstruct, probe, convert, profile, demo."""

# ruff: noqa: E402 (the packages that the modules below import are asked for first)
from mae.requirements import require

require("matplotlib", "PIL", "sklearn", "tqdm", "tyro")

import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from mae.checkpoint import CheckpointError, CheckpointWarning, load_checkpoint
from mae.convert import TARGETS, convert_checkpoint
from mae.data import (
    Batches,
    DataError,
    DataWarning,
    TrainingImages,
    find_images,
    find_labelled_images,
    is_sound,
    printable,
    read_pictures,
)
from mae.demo import DemoConfig, run_demo
from mae.fields import COUNT, RATIO, SEED, check, is_whole
from mae.figures import View, default_count, picture_file, save_loss, save_reconstructions
from mae.model import MaskedAutoencoder, VisionTransformer
from mae.options import ModelName, ReadingOptions, SizeOptions, Sizes
from mae.probe import extract_features, linear_probe
from mae.profile import Phase, profile_step, training_flops
from mae.run import RunError, open_run, refuse_file, refuse_run
from mae.saving import write_json
from mae.step import MaskStrategy, StrategyName, adamw
from mae.train import TrainConfig, TrainingStopped, choose_device, train, uses_bfloat16
from mae_kernels import Masking

_RESULTS = "results.json"


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


@dataclass(frozen=True)
class ReconstructConfig:
    """Hide patches of images, predict them, and save masked | reconstruction | original."""

    checkpoint: Path
    """Run folder, or a checkpoint file of any layout that convert reads."""
    images: tuple[Path, ...]
    """Image files, or folders of them."""
    out: Path = Path("reconstructions.png")
    """Picture to write, a .png unless its name ends otherwise."""
    model: ModelName | None = None
    """Architecture, for a checkpoint file that does not tell it by a config.json, its settings or its shapes."""
    norm_pix_loss: bool | Literal["channel"] | None = None
    """Whether the model was trained on normalised pixels, or channels of them, for such a file."""
    ema: bool = False
    """Take the averaged weights, of a file that holds them beside the plain ones."""
    image_size: Sizes | None = None
    """Height and width, one number for both, or frames, height and width, where they are not those of the training."""
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
    reading: Annotated[ReadingOptions, tyro.conf.arg(name="")] = field(default_factory=ReadingOptions)


def reconstruct(config: ReconstructConfig) -> None:
    check(vars(config), {"mask_ratio": RATIO, "most": (lambda x: x is None or COUNT[0](x), COUNT[1]), "seed": SEED})
    config.reading.reading()
    out = picture_file(config.out)
    model = _loaded(config)
    if not isinstance(model, MaskedAutoencoder):
        raise CheckpointError(
            f"{config.checkpoint} holds the encoder alone, so there is nothing to reconstruct with; take a checkpoint "
            "that holds the decoder too (published ones are called *_full or mae_visualize_*)"
        )
    model = model.to(choose_device(config.device))
    reading = config.reading.reading(model.config)
    files = [f for path in config.images for f in (find_images(path) if path.is_dir() else [path])]
    pictures, indices = zip(
        *read_pictures(files, reading, config.most or default_count(reading.image_size)), strict=True
    )
    images = torch.stack(pictures).to(model.cls_token.device)
    strategy, generator = MaskStrategy(config.masking, config.mask_ratio), torch.Generator().manual_seed(config.seed)
    masking = strategy(len(images), model.config.grid.grid, generator=generator)
    result = model.reconstruct(images, masking=Masking(*(x.to(images.device) for x in masking)))
    out.parent.mkdir(parents=True, exist_ok=True)
    save_reconstructions(result, out, view="sound" if all(is_sound(files[i]) for i in indices) else config.view)
    print(f"Wrote {len(images)} reconstructions to {printable(out)}")
    if result.uses_true_statistics:
        print("The model was trained on normalised pixels: hidden patches take mean and contrast from the original.")


def _loaded(config: "ReconstructConfig | LinprobeConfig") -> VisionTransformer:
    fields = {name: getattr(config, name, None) for name in ("image_size", "norm_pix_loss")}
    fields = {name: value for name, value in fields.items() if value is not None}
    return load_checkpoint(config.checkpoint, config.model, ema=config.ema, **fields)


@dataclass(frozen=True)
class LinprobeConfig:
    """Train a linear classifier on frozen features and compare with an untrained encoder."""

    checkpoint: Path
    """Run folder, or a checkpoint file of any layout that convert reads."""
    data: Path
    """Training images, one sub-folder per class."""
    test: Path
    """Test images, the same sub-folders."""
    model: ModelName | None = None
    """Architecture, for a checkpoint file that does not tell it by a config.json, its settings or its shapes."""
    ema: bool = False
    """Take the averaged weights, of a file that holds them beside the plain ones."""
    image_size: Sizes | None = None
    """Height and width, one number for both, or frames, height and width, where they are not those of the training."""
    batch_size: int = 64
    """Images per forward pass."""
    out: Path | None = None
    """Folder for results.json, to which the result is added; by default the run folder, if there is one."""
    seed: int = 0
    """Of the untrained encoder."""
    device: str = "auto"
    """auto, cpu, cuda, mps."""
    reading: Annotated[ReadingOptions, tyro.conf.arg(name="")] = field(default_factory=ReadingOptions)


def linprobe(config: LinprobeConfig) -> None:
    check(vars(config), {"batch_size": COUNT, "seed": SEED})
    config.reading.reading()
    device = choose_device(config.device)
    trained = _loaded(config).to(device)
    torch.manual_seed(config.seed)
    untrained = MaskedAutoencoder(trained.config).to(device)
    *fit, classes = find_labelled_images(config.data)
    *test, test_classes = find_labelled_images(config.test)
    if classes != test_classes:
        only = sorted(set(classes) ^ set(test_classes))
        raise DataError(
            f"{printable(config.data)} and {printable(config.test)} do not hold the same classes; only in one: "
            f"{', '.join(map(printable, only))}"
        )
    folder = config.out or (config.checkpoint if config.checkpoint.is_dir() else None)
    if folder is not None:  # what cannot be written is better known before minutes of work
        refuse_file(folder)
        earlier = _results(folder)
    print(f"Linear probe: {len(fit[0])} images to fit, {len(test[0])} to test, {len(classes)} classes")
    top1 = {"chance (largest class)": max(Counter(test[1]).values()) / len(test[1])}
    print(f"  {'chance (largest class)':<24}{top1['chance (largest class)']:>8.1%}")
    for name, model in {"untrained encoder": untrained, "pre-trained encoder": trained}.items():
        features = [_features(model, files, labels, config) for files, labels in (fit, test)]
        top1[name] = linear_probe(*features[0], *features[1])
        print(f"  {name:<24}{top1[name]:>8.1%}")
    if folder is not None:
        counts = {"images": len(fit[0]), "test_images": len(test[0]), "classes": len(classes)}
        where = {name: str(getattr(config, name)) for name in ("checkpoint", "data", "test")}
        result = {"command": "linprobe", **where, **counts, "top1": top1}
        write_json(folder, {_RESULTS: [*earlier, result]})
        print(f"Added to {printable(folder / _RESULTS)}")


def _results(folder: Path) -> list[dict]:
    file = folder / _RESULTS
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    except ValueError:
        found = None
    if not isinstance(found, list):
        raise ValueError(f"{file} is no list of results; give another --out")
    return found


def _features(model: VisionTransformer, files: list[Path], labels: list[int], config: LinprobeConfig):
    kept: list[int] = []

    def batches() -> Iterator[Tensor]:
        reading = config.reading.reading(model.config)
        waiting = []
        for picture, index in read_pictures(files, reading):
            waiting.append(picture)
            kept.append(labels[index])
            if len(waiting) == config.batch_size:
                yield torch.stack(waiting)
                waiting.clear()
        if waiting:
            yield torch.stack(waiting)

    return extract_features(model, batches()), kept


@dataclass(frozen=True)
class ConvertConfig:
    """Write a checkpoint as Hugging Face's transformers, timm, the published code or this project lays it out."""

    checkpoint: Path
    """Folder or file in any of these layouts, found by its keys."""
    to: Literal[TARGETS]
    """huggingface-4 loads with transformers 4 and 5, huggingface-5 with 5 alone; timm gets the encoder."""
    out: Path
    """Folder to write, or a file that ends in .safetensors or .pth, which holds the weights alone."""
    model: ModelName | None = None
    """Architecture, for a checkpoint file that does not tell it by a config.json, its settings or its shapes."""
    norm_pix_loss: bool | Literal["channel"] | None = None
    """Whether the model was trained on normalised pixels, or channels of them, for such a file."""
    ema: bool = False
    """Take the averaged weights, of a file that holds them beside the plain ones."""


def convert(config: ConvertConfig) -> None:
    overrides = {} if config.norm_pix_loss is None else {"norm_pix_loss": config.norm_pix_loss}
    result = convert_checkpoint(config.checkpoint, config.to, config.out, config.model, ema=config.ema, **overrides)
    print(f"Wrote {', '.join(map(str, result.files))}")
    if result.left_out:
        print(f"Left out, the {len(result.left_out)} tensors of the decoder: {', '.join(result.left_out)}")
    elif result.encoder_only:
        print("The checkpoint holds the encoder alone, and so does this")
    if len(result.files) == 1:
        print("Left out: the configuration. Whoever loads this file has to know the architecture")


@dataclass(frozen=True)
class ProfileConfig:
    """Show where a training step's time, memory and launches go, on random images."""

    model: ModelName = "mae_vit_base_patch16"
    """Architecture."""
    batch_size: int = 16
    """Images of a step."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 autocast on GPUs of compute capability 8.0 or more, float32 elsewhere."""
    rounds: int = 5
    """Timed steps, of which the medians are shown."""
    device: str = "auto"
    """auto, cpu, cuda, mps."""
    sizes: Annotated[SizeOptions, tyro.conf.arg(name="")] = field(default_factory=SizeOptions)


def profile(config: ProfileConfig) -> None:
    check(vars(config), {"batch_size": COUNT, "rounds": COUNT})
    device = choose_device(config.device)
    bfloat16 = uses_bfloat16(config.precision, device)
    model = MaskedAutoencoder(config.sizes.config(config.model)).to(device)
    size = (config.batch_size, model.config.in_chans, *model.config.image_size)
    images = torch.randint(0, 256, size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    phases = profile_step(model, images, adamw(model, lr=1e-4), bfloat16=bfloat16, rounds=config.rounds)
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device}, {torch.get_num_threads()} threads"
    )
    print(
        f"{config.model}, {config.batch_size} images, {'bfloat16 autocast' if bfloat16 else 'float32'}, {name}, "
        f"torch {torch.__version__}\nEager steps, cut at the borders of their phases; medians of {config.rounds}\n"
    )
    total = Phase(*(sum(column) for column in zip(*map(astuple, phases.values()), strict=True)))
    milliseconds = total.forward_ms + total.backward_ms
    print(f"{'phase':<10}{'forward ms':>12}{'backward ms':>13}{'share':>8}{'launches':>10}{'saved MB/image':>16}")
    for phase, cost in {**phases, "all": total}.items():
        share = (cost.forward_ms + cost.backward_ms) / milliseconds
        saved = cost.saved_bytes / config.batch_size / 1e6
        print(
            f"{phase:<10}{cost.forward_ms:>12.2f}{cost.backward_ms:>13.2f}{share:>8.1%}{cost.launches:>10}{saved:>16.2f}"
        )
    flops = training_flops(model.config) * config.batch_size
    print(
        f"\n{config.batch_size / milliseconds * 1e3:.1f} images/s, {flops / milliseconds / 1e9:.2f} TFLOP/s "
        f"at {flops / config.batch_size / 1e9:.1f} GFLOP an image; "
        f"{images.nbytes / config.batch_size / 1e3:.0f} kB an image from host to device"
    )


def main(arguments: list[str] | None = None) -> None:
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show
            config = tyro.cli(
                Annotated[PretrainConfig, tyro.conf.subcommand("pretrain")]
                | Annotated[ReconstructConfig, tyro.conf.subcommand("reconstruct")]
                | Annotated[LinprobeConfig, tyro.conf.subcommand("linprobe")]
                | Annotated[ConvertConfig, tyro.conf.subcommand("convert")]
                | Annotated[ProfileConfig, tyro.conf.subcommand("profile")]
                | Annotated[DemoConfig, tyro.conf.subcommand("demo")],
                args=arguments,
                prog="python -m mae",
                description="Pre-train masked autoencoders, look at reconstructions, probe features, convert "
                "checkpoints, profile a training step.",
                config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes),
            )
            _COMMANDS[type(config)](config)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        sys.exit(f"mae: {printable(place)}{error.strerror or printable(error)}")
    except KeyboardInterrupt:
        sys.exit("mae: stopped")
    except (CheckpointError, DataError, RunError, TrainingStopped, ValueError) as error:
        sys.exit("\n".join(map(printable, f"mae: {error}".splitlines())))


_COMMANDS = {
    PretrainConfig: pretrain,
    ReconstructConfig: reconstruct,
    LinprobeConfig: linprobe,
    ConvertConfig: convert,
    ProfileConfig: profile,
    DemoConfig: run_demo,
}


def _show(message: Warning, category: type[Warning], filename: str, line: int, *_) -> None:
    place = "" if issubclass(category, CheckpointWarning | DataWarning) else f" ({filename}:{line})"
    tqdm.write(f"Warning: {message}{place}", file=sys.stderr)  # above the progress bar, where there is one


if __name__ == "__main__":
    main()
