"""Weights on disk: our run folders, and checkpoints of the published code, Hugging Face and timm."""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mae.checkpoints.configs import from_hugging_face_config, from_timm_config
from mae.checkpoints.files import listed, shorten
from mae.checkpoints.foreign import Weights, read_weights
from mae.checkpoints.heads import find_head, says_classifier
from mae.checkpoints.layouts import CheckpointError, from_layout, is_decoder, published_names, to_layout
from mae.checkpoints.saving import write_folder
from mae.checkpoints.shapes import blocks_in, from_settings, from_weights
from mae.fields import check_fields, unknown_statistics
from mae.model import (
    MODELS,
    Classifier,
    HeadConfig,
    MAEConfig,
    MaskedAutoencoder,
    VisionTransformer,
    pos_embed_for,
)
from mae.run_files import CONFIG, WEIGHTS
from mae_kernels.patch_grid import Sizes

_TABLES = ("pos_embed", "decoder_pos_embed")
_PREPROCESSOR = "preprocessor_config.json"


class CheckpointWarning(UserWarning):
    """What was done to a file to read it, and what the model does differently."""


class Checkpoint(NamedTuple):
    """What a file holds, every key and shape checked."""

    state: dict[str, Tensor]  # published keys in the model's order, dtypes as in the file
    config: MAEConfig
    encoder_only: bool  # no decoder
    mask_ratio: float  # of its training where the file says so, else 0.75
    head: HeadConfig | None  # of a classifier

    def network(self) -> VisionTransformer:
        """The model of these weights, with initial ones."""
        return _network(self.config, self.encoder_only, self.head)


def save_checkpoint(model: VisionTransformer, folder: str | Path) -> None:
    """Write ``model.safetensors`` and ``config.json`` into folder; a crash in between leaves the old files whole.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written to.
    """
    save_weights(model.state_dict(), model.description(), folder)


def save_weights(state: dict[str, Tensor], description: dict[str, Any], folder: str | Path) -> None:
    """The same for a state dict that is at hand already, and the ``description()`` of its model."""
    state = {name: x.detach().cpu().contiguous() for name, x in state.items()}
    write_folder(Path(folder), state, {CONFIG: description})


def load_checkpoint(
    path: str | Path, model: str | None = None, *, ema: bool = False, image_size: Sizes | None = None, **overrides: Any
) -> VisionTransformer:
    """Build the model of a checkpoint and load its weights, every key and shape checked.

    Args: as of :func:`read_checkpoint`.

    Returns:
        The model in evaluation mode, on the CPU, in float32: a :class:`MaskedAutoencoder`, a
        :class:`VisionTransformer` for a file that holds the encoder alone, or a :class:`Classifier`, which is one too:
        with ``fc_norm`` its ``forward_features`` have no norm behind them.

    Raises: as :func:`read_checkpoint`.
    """
    checkpoint = read_checkpoint(path, model, ema=ema, image_size=image_size, **overrides)
    network = checkpoint.network()
    network.load_state_dict(checkpoint.state)
    if checkpoint.mask_ratio != 0.75:
        warnings.warn(
            f"{path} was trained with mask_ratio {checkpoint.mask_ratio:g}, which this model takes in each call",
            CheckpointWarning,
            stacklevel=2,
        )
    return network.eval()


def read_checkpoint(
    path: str | Path, model: str | None = None, *, ema: bool = False, image_size: Sizes | None = None, **overrides: Any
) -> Checkpoint:
    """The weights of a checkpoint under their published names, and the configuration of their model.

    Args:
        path: a folder with a ``config.json`` and ``model.safetensors`` (or ``pytorch_model.bin``), of ours, of Hugging
            Face's ViTMAE, ViT or BEiT (where that computes the same), or of timm's; the file in such a folder; or any
            file of ``torch.save`` or safetensors that holds such weights, under whatever names and prefixes, in one of
            these layouts, which is found by its keys. It is a classifier where the ``config.json`` says so, and without
            one where it has a head, ``fc_norm`` and no ``norm``; any other head is left out.
        model: the factory's name, such as ``"mae_vit_base_patch16"``, for files without a ``config.json`` beside them
            whose settings and shapes do not tell it.
        ema: take the averaged weights, where the file holds them beside the plain ones.
        image_size: pixels of the images that the model is to take, where they are others than those of its training:
            position embeddings are resampled, or computed anew where they are of sines and cosines. Frames that are not
            given stay as many as they were. It also says the size of a file whose positions are those of no square.
        overrides: fields of :class:`MAEConfig` that the checkpoint does not fix, such as ``norm_pix_loss=False`` for
            the published ``mae_visualize_*`` files.

    Raises:
        CheckpointError: missing file, unreadable file, unknown layout, a configuration that this model cannot have, or
            weights that do not fit it.

    Warns:
        CheckpointWarning: once, what was taken from where, left out or assumed, and what this model does differently,
            such as another epsilon.
    """
    path = Path(path)
    file = _find(path) if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"there is no checkpoint at {file}{_others(path)}")
    if model is not None and model not in MODELS:
        raise CheckpointError(f"there is no model called {model!r}; choose one of {', '.join(MODELS)}")
    described = file.parent / CONFIG
    if model is not None or file.suffix not in (".safetensors", ".bin") or not described.is_file():
        described = None
    description = _read_json(described) if described else {}
    ours = described is not None and not description.keys() & {"model_type", "architecture"}
    weights = read_weights(file, ema, exact=ours or says_classifier(description))
    names = published_names(weights.state, weights.layout)
    shaped = {names[key]: x for key, x in weights.state.items() if key in names}
    encoder_only = not any(map(is_decoder, shaped))
    settings, notes = from_settings(weights.arguments)
    try:
        if described:
            fields, mask_ratio, more = _fields(description, described.parent / _PREPROCESSOR, encoder_only)
            fields |= overrides
        else:
            fields, more = from_weights(shaped, settings, model, overrides, image_size)
            mask_ratio = settings.get("mask_ratio", 0.75)
            if weights.layout.startswith("huggingface"):
                more.append("no config.json was read: norms get the epsilon 1e-06, blocks gelu and no dropout")
        config, pixels = _config(fields)
        head, named = find_head(description, shaped)
        if described:
            _check_depths(config, shaped, encoder_only)
    except CheckpointError as error:
        raise CheckpointError(f"{described or file}: {error}") from error
    except ValueError as error:
        what = "is not the configuration of a model" if described else "is not a model that can be built"
        raise CheckpointError(f"{described or file} {what}: {error}") from error
    asked = _resized(config, image_size, file)
    with torch.device("meta"):
        expected = _network(config, encoder_only, head).state_dict()
    _check(file, weights, to_layout(expected, weights.layout))
    published = from_layout(weights.state, weights.layout)
    broken = [name for name, x in published.items() if not x.float().sum().isfinite()]
    if broken:
        more.append(f"there is NaN or infinity in {listed(broken, 3)}")
    if notes := [*weights.notes, *notes, *more, *pixels, *named]:
        warnings.warn(f"{path}: {'; '.join(notes)}", CheckpointWarning, stacklevel=3)
    state = {name: published[name] for name in expected}
    for name in [name for name in _TABLES if name in state]:
        state[name] = pos_embed_for(state[name], config.sides, asked.sides)
    return Checkpoint(state, asked, encoder_only, mask_ratio, head)


def _network(config: MAEConfig, encoder_only: bool, head: HeadConfig | None) -> VisionTransformer:
    if head is not None:
        return Classifier(config, head)
    return VisionTransformer(config) if encoder_only else MaskedAutoencoder(config)


def _resized(config: MAEConfig, image_size: Sizes | None, file: Path) -> MAEConfig:
    """The same model for images of another size; frames that are not given stay as many as they were."""
    if image_size is None:
        return config
    size = image_size if isinstance(image_size, (tuple, list)) else (image_size, image_size)
    try:
        if len(size) > len(config.image_size):
            raise ValueError("its patches have no frames")
        return replace(config, image_size=(*config.image_size[: -len(size)], *size))
    except ValueError as error:
        raise CheckpointError(f"{file} cannot take images of size {shorten(image_size)}: {error}") from error


def _find(folder: Path) -> Path:
    if (folder / f"{WEIGHTS}.index.json").is_file():
        raise CheckpointError(f"{folder} holds its weights in several files; save them as one")
    other = folder / "pytorch_model.bin"
    return other if other.is_file() and not (folder / WEIGHTS).is_file() else folder / WEIGHTS


def _others(folder: Path) -> str:
    """The checkpoints in a folder that holds none of the names that are looked for, in a clause."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    names = [x.name for x in files if x.suffix in (".pth", ".pt", ".ckpt", ".bin", ".safetensors")]
    return f"; the folder holds {listed(names)}: name one of them" if names else ""


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        reason = "its brackets nest too deep" if isinstance(error, RecursionError) else error
        raise CheckpointError(f"{file} is not the configuration of a model: {reason}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} is not the configuration of a model: it is {shorten(values)!r}, not an object")
    return values


def _fields(
    description: dict[str, Any], preprocessor: Path, encoder_only: bool
) -> tuple[dict[str, Any], float, list[str]]:
    """Fields of a ``config.json`` of ours, Hugging Face's or timm's, and the mask ratio of the training."""
    if "model_type" in description:
        fields, notes = from_hugging_face_config(description, encoder_only)
        pixels = _read_json(preprocessor) if preprocessor.is_file() else {}
        fields |= {f"pixel_{x}": pixels[f"image_{x}"] for x in ("mean", "std") if f"image_{x}" in pixels}
        return fields, description.get("mask_ratio", 0.75), notes
    if "architecture" in description:
        return from_timm_config(description), 0.75, []
    return {name: x for name, x in description.items() if name != "head"}, 0.75, []


def _config(fields: dict[str, Any]) -> tuple[MAEConfig, list[str]]:
    notes = []
    channels = fields.get("in_chans", 3)
    if channels != 3 and "pixel_mean" not in fields:
        notes.append("pixel_mean and pixel_std are not known: 0.5 is taken for uint8 images")
    check_fields(fields)
    if notes:
        fields = fields | unknown_statistics(channels)
    return MAEConfig(**fields), notes


def _check_depths(config: MAEConfig, state: dict[str, Tensor], encoder_only: bool) -> None:
    """Before thousands of blocks are built that the file does not hold."""
    depths = {"blocks": "depth"} | ({} if encoder_only else {"decoder_blocks": "decoder_depth"})
    for blocks, name in depths.items():
        if getattr(config, name) != (held := blocks_in(state, blocks)):
            raise CheckpointError(f"{name} is {getattr(config, name)}, and the weights have {held} {blocks}")


def _check(file: Path, weights: Weights, expected: dict[str, Tensor]) -> None:
    state = weights.state
    problems = _first([f"{name} is missing" for name in expected if name not in state])
    problems += _first([f"{name} is not part of this model" for name in state if name not in expected])
    problems += _first(
        [
            f"{name} has shape {tuple(x.shape)}, the model expects {tuple(expected[name].shape)}"
            for name, x in state.items()
            if name in expected and x.shape != expected[name].shape
        ]
    )
    strange = [name for name, x in state.items() if x.is_meta or not x.is_floating_point() or x.layout != torch.strided]
    if strange:  # in a quantised file all are
        problems.append(f"{listed(strange, 3)} hold no floating-point numbers")
    if problems:
        done = f" ({'; '.join(weights.notes)})" if weights.notes else ""
        raise CheckpointError("\n  ".join([f"{file} does not fit the model{done}:", *problems]))


def _first(lines: list[str], most: int = 8) -> list[str]:
    return lines[:most] + ([f"and {len(lines) - most} more like these"] if len(lines) > most else [])
