"""``python -m mae convert``."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mae.checkpoints.convert import TARGETS, convert_checkpoint
from mae.commands.options import LoadOptions
from mae.data import counted


@dataclass(frozen=True)
class ConvertConfig:
    """Write a checkpoint as Hugging Face's transformers, timm, the published code or this project lays it out."""

    checkpoint: Path
    """Folder or file in any of these layouts, found by its keys."""
    to: Literal[TARGETS]  # type: ignore[valid-type]  # choices, which no checker evaluates
    """huggingface-4 loads with transformers 4 and 5, huggingface-5 with 5 alone; timm gets encoders and classifiers."""
    out: Path
    """Folder to write, or a file that ends in .safetensors or .pth, which holds the weights alone."""
    loading: Annotated[LoadOptions, tyro.conf.arg(name="")] = field(default_factory=LoadOptions)


def convert(config: ConvertConfig) -> None:
    result = convert_checkpoint(config.checkpoint, config.to, config.out, **config.loading.arguments)
    print(f"Wrote {', '.join(map(str, result.files))}")
    if result.left_out:
        print(f"Left out, the {len(result.left_out)} tensors of the decoder: {', '.join(result.left_out)}")
    elif result.encoder_only:
        print("The checkpoint holds the encoder alone, and so does this")
    elif result.classes:
        print(f"The classifier of {counted(result.classes, 'class', 'classes')} is in it")
    if result.is_beit:
        print("It is written as BeitForImageClassification, with the same logits, because ViTForImageClassification")
        print("cannot average patch tokens")
        print("Left out: the biases of the keys, which BEiT does not have and which change no result")
    if len(result.files) == 1:
        names = " and the names of the classes" if result.classes else ""
        print(f"Left out: the configuration{names}. Whoever loads this file has to know the architecture")
