"""From one system's checkpoint to another's, on disk."""

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mae.checkpoints.checkpoint import Checkpoint, CheckpointWarning, read_checkpoint
from mae.checkpoints.configs import to_hugging_face_config, to_preprocessor_config, to_timm_config
from mae.checkpoints.heads import classifier_kind, to_classifier_config
from mae.checkpoints.layouts import LAYOUTS, CheckpointError, is_decoder, to_layout
from mae.checkpoints.saving import write_files, write_folder, write_pickle, write_safetensors

TARGETS = ("mae", *LAYOUTS)
_TORCH_FILES = (".pth", ".pt", ".bin")


class Conversion(NamedTuple):
    files: list[Path]  # written
    left_out: list[str]  # published keys that the checkpoint holds and the files do not
    encoder_only: bool  # whether the files hold the encoder alone
    classes: int  # of a classifier, else 0
    is_beit: bool  # whether it became Hugging Face's BEiT, and its keys lost their bias


def convert_checkpoint(
    source: str | Path, to: str, out: str | Path, model: str | None = None, *, ema: bool = False, **options: Any
) -> Conversion:
    """Write a checkpoint as another system lays it out; tensors keep their dtype and every bit.

    Args:
        source, model, ema, options: as of :func:`mae.checkpoints.checkpoint.read_checkpoint`.
        to: ``"mae"`` (a run folder), ``"published"``, ``"huggingface-4"`` (loads with transformers 4.x and 5.x),
            ``"huggingface-5"`` (its own names, which 4.x does not know), or ``"timm"`` (the encoder alone, or with the
            head of a classifier). Of classifiers Hugging Face gets a ViT where the class token is pooled, and a BEiT
            that computes the same where the mean is, behind ``fc_norm``; the bias of the keys, which changes no result,
            is left out there.
        out: a folder for ``model.safetensors`` and what describes the model (``from_pretrained(out)``,
            ``timm.create_model("local-dir:out")``); or one file, ``.pth`` or ``.safetensors``, with the weights alone.
            The published code knows only files; its ``.pth`` holds them under ``"model"``, and a ``norm_pix_loss``
            that is not True under ``"args"``.

    Raises:
        CheckpointError: the source cannot be used, or the target cannot hold it or be written.

    Warns:
        CheckpointWarning: as of :func:`mae.checkpoints.checkpoint.read_checkpoint`.
    """
    out = Path(out)
    if to not in TARGETS:
        raise CheckpointError(f"there is no layout called {to!r}; choose one of {', '.join(TARGETS)}")
    if out.resolve() in (Path(source).resolve(), Path(source).resolve().parent):
        raise CheckpointError(f"{out} is where the checkpoint itself is; choose another place")
    is_file = out.suffix in (*_TORCH_FILES, ".safetensors")
    if to == "published" and not is_file:
        raise CheckpointError(f"a published checkpoint is one file; let the name {out} end in .pth")
    if out.is_dir() if is_file else out.is_file():
        raise CheckpointError(f"{out} is a {'folder, not a file' if is_file else 'file, not a folder'}")
    checkpoint = read_checkpoint(source, model, ema=ema, **options)
    head, layout = checkpoint.head, "published" if to == "mae" else to
    try:
        if head is not None and to.startswith("huggingface") and classifier_kind(head) == "BEiT":
            layout = f"{to}, BEiT"
        descriptions = {} if is_file else _descriptions(checkpoint, to)
    except ValueError as error:
        raise CheckpointError(f"{source} has no counterpart in {to}: {error}") from error
    if to not in ("mae", "timm") and checkpoint.config.decoder == "cross" and not checkpoint.encoder_only:
        raise CheckpointError(f"{source} has no counterpart in {to}: its decoder is 'cross', which no other system has")
    if checkpoint.mask_ratio != 0.75 and not any("mask_ratio" in values for values in descriptions.values()):
        ratio = f"{checkpoint.mask_ratio:g}"
        warnings.warn(
            f"mask_ratio {ratio} has no place in {out}: the model takes it in each call",
            CheckpointWarning,
            stacklevel=2,
        )
    state = to_layout(checkpoint.state, layout)
    # No shape tells it, and True is what is taken for a file that does not say it.
    norm_pix_loss = checkpoint.config.norm_pix_loss
    untold = to == "published" and norm_pix_loss is not True and not checkpoint.encoder_only
    settings = {"args": {"norm_pix_loss": norm_pix_loss}} if untold else {}
    files = _write(out, state, descriptions, settings, under_model=to == "published")
    left_out = [name for name in checkpoint.state if to == "timm" and is_decoder(name)]
    classes = 0 if head is None else len(head.classes)
    encoder_only = not classes and (checkpoint.encoder_only or bool(left_out))
    return Conversion(files, left_out, encoder_only, classes, layout.endswith("BEiT"))


def _descriptions(checkpoint: Checkpoint, to: str) -> dict[str, dict[str, Any]]:
    config, head = checkpoint.config, checkpoint.head
    if to == "mae":
        with torch.device("meta"):
            return {"config.json": checkpoint.network().description()}
    if to == "timm":
        return {"config.json": to_timm_config(config, head)}
    if head is not None:
        theirs = to_classifier_config(config, head)
    else:
        theirs = {
            "architectures": ["ViTMAEModel" if checkpoint.encoder_only else "ViTMAEForPreTraining"],
            "model_type": "vit_mae",
            **to_hugging_face_config(config, checkpoint.mask_ratio),
        }
    return {"config.json": theirs, "preprocessor_config.json": to_preprocessor_config(config)}


def _write(
    out: Path,
    state: dict[str, Tensor],
    descriptions: dict[str, dict[str, Any]],
    settings: dict[str, dict[str, Any]],
    under_model: bool,
) -> list[Path]:
    if descriptions:
        write_folder(out, state, descriptions)
        return [*(out / name for name in descriptions), out / "model.safetensors"]
    if out.suffix == ".safetensors":
        write_files(out.parent, {out.name: lambda path: write_safetensors(path, state)})
    else:
        content = ({"model": state} if under_model else state) | settings
        write_files(out.parent, {out.name: lambda path: write_pickle(path, content)})
    return [out]
