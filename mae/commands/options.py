"""Options that several commands have: how a checkpoint is loaded, how files are read, sizes of a new model."""

from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from mae.checkpoints.checkpoint import load_checkpoint
from mae.data import Reading
from mae.fields import unknown_statistics
from mae.model import MODELS, MAEConfig, VisionTransformer
from mae.training.run import Mode

if TYPE_CHECKING:
    ModelName = str
else:  # choices, which no checker evaluates
    ModelName = Literal[tuple(MODELS)]
Sizes = int | tuple[int, int] | tuple[int, int, int]


@dataclass(frozen=True)
class LoadOptions:
    """What a checkpoint does not tell, for every command that begins with one."""

    model: ModelName | None = None
    """Architecture, for a checkpoint file that does not tell it by a config.json, its settings or its shapes."""
    norm_pix_loss: bool | Literal["channel"] | None = None
    """Whether the model was trained on normalised pixels, or channels of them, for such a file."""
    ema: bool = False
    """Take the averaged weights, of a file that holds them beside the plain ones."""
    image_size: Sizes | None = None
    """Height and width, one number for both, or frames, height and width, where they are not those of the training."""

    @property
    def arguments(self) -> dict[str, Any]:
        """Of :func:`mae.checkpoints.checkpoint.load_checkpoint`, beside the path."""
        return {"model": self.model, "ema": self.ema, "image_size": self.image_size} | given(
            norm_pix_loss=self.norm_pix_loss
        )

    def load(self, checkpoint: Path) -> VisionTransformer:
        return load_checkpoint(checkpoint, **self.arguments)


@dataclass(frozen=True)
class ReadingOptions:
    """How files become pictures, for every command that reads some."""

    value_range: tuple[float, float] | None = None
    """Values that become black and white, such as 0 4095: the same ones in every command. By default 8 bits are taken
    as they are, 16 bits as 0 to 65535 and floats between 0 and 1 as that; other values, and pictures that this leaves
    with fewer than 32 levels, are scaled by the picture's own range, and counted."""
    max_pixels: int = Reading.max_pixels
    """Pictures and frames of more pixels are passed over: decoding takes a byte or more for each channel of each."""

    frame_stride: int = Reading.frame_stride
    """For models of several frames: 2 takes every second frame of a file. In training a clip begins at a random frame,
    elsewhere it lies in the middle of the file."""

    def reading(self, model: MAEConfig | None = None) -> Reading:
        """For that model; without one the options are only checked."""
        taken: dict[str, Any] = {} if model is None else {"channels": model.in_chans, "image_size": model.image_size}
        return Reading(**taken, **vars(self))


@dataclass(frozen=True)
class SizeOptions:
    """Sizes of a model that is built anew; what is left out is as its name says."""

    image_size: int | tuple[int, int] | None = None
    """Height and width in pixels, or one number for both: multiples of the patch."""
    num_frames: int | None = None
    """Frames of a clip, or slices of a volume: a multiple of the patch's."""
    patch_size: Sizes | None = None
    """Sides of a patch in pixels: one number for all, height and width, or frames, height and width."""
    in_chans: int | None = None
    """Channels of the images. Other numbers than 1 and 3 come from multi-band TIFFs and NumPy files, and are normalised
    with mean 0.5 and standard deviation 0.5; sound has one."""

    def config(self, model: ModelName, **fields: Any) -> MAEConfig:
        """The configuration of the model of that name with these sizes, and other fields that are not None."""
        with torch.device("meta"):
            own = MODELS[model]().config
        *frames, height, width = own.image_size
        frames = frames if self.num_frames is None else [self.num_frames]
        if self.image_size is not None:
            height, width = (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size
        fields |= {"image_size": (*frames, height, width), "patch_size": self.patch_size, **_channels(self.in_chans)}
        return replace(own, **given(**fields))


@dataclass(frozen=True)
class RunOptions:
    """How a run is started and where it goes."""

    resume: bool = False
    """Go on where the run in the folder stands; at the first step if there is none yet."""
    overwrite: bool = False
    """Replace the run that the folder holds."""
    dry_run: bool = False
    """Say what would be done, and do nothing."""

    def __post_init__(self) -> None:
        if self.resume and self.overwrite:
            raise ValueError("--resume goes on with a run and --overwrite replaces it; give one of them")

    @property
    def mode(self) -> Mode:
        return "resume" if self.resume else "overwrite" if self.overwrite else "new"


HOW_STARTED = {x.name for x in fields(RunOptions)} | {"out"}  # options that are no part of what a run is


def flat(config: Any) -> dict[str, Any]:
    """The options of a command by their names, as a recipe holds them."""
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    inner = {name: x for name, x in values.items() if is_dataclass(x)}
    own = {name: str(x) if isinstance(x, Path) else x for name, x in values.items() if name not in inner}
    return own | {name: x for part in inner.values() for name, x in flat(part).items()}


def from_flat(cls: Any, values: dict[str, Any]) -> Any:
    """The inverse of :func:`flat`; what values do not say is as it is by default.

    Raises:
        ValueError: there is no option of a name.
    """
    values, arguments = dict(values), {}
    for f in fields(cls):
        if is_dataclass(f.default_factory):
            own = {name: values.pop(name) for name in [x.name for x in fields(f.default_factory)] if name in values}
            arguments[f.name] = from_flat(f.default_factory, own)
        elif f.name in values:
            x = values.pop(f.name)
            arguments[f.name] = tuple(x) if isinstance(x, list) else x
    if values:
        raise ValueError(f"the recipe has {', '.join(values)}, and there is no such option")
    return cls(**arguments)


def given(**options: Any) -> dict[str, Any]:
    """Those that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def _channels(in_chans: int | None) -> dict[str, Any]:
    """Arguments of a model with that many channels."""
    if in_chans is None:
        return {}
    if in_chans in (1, 3):  # ImageNet's, for grey the mean of its colours
        stats = {name: getattr(MAEConfig, name) for name in ("pixel_mean", "pixel_std")}
        stats = {name: x if in_chans == 3 else (round(sum(x) / 3, 3),) for name, x in stats.items()}
    else:
        stats = unknown_statistics(in_chans)
    return {"in_chans": in_chans, **stats}
