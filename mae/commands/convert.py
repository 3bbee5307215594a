"""``python -m mae convert``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mae.checkpoints.convert import TARGETS, convert_checkpoint
from mae.commands.options import ModelName, given


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
    overrides = given(norm_pix_loss=config.norm_pix_loss)
    result = convert_checkpoint(config.checkpoint, config.to, config.out, config.model, ema=config.ema, **overrides)
    print(f"Wrote {', '.join(map(str, result.files))}")
    if result.left_out:
        print(f"Left out, the {len(result.left_out)} tensors of the decoder: {', '.join(result.left_out)}")
    elif result.encoder_only:
        print("The checkpoint holds the encoder alone, and so does this")
    if len(result.files) == 1:
        print("Left out: the configuration. Whoever loads this file has to know the architecture")
