"""Weights on disk: our run folders, and checkpoints of the published code, Hugging Face and timm."""

import argparse
import dataclasses
import json
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mae.configs import from_hugging_face_config, from_timm_config
from mae.layouts import CheckpointError, find_layout, from_layout, is_decoder, to_layout
from mae.model import MODELS, MAEConfig, MaskedAutoencoder

_WEIGHTS, _CONFIG, _PREPROCESSOR = "model.safetensors", "config.json", "preprocessor_config.json"


class CheckpointWarning(UserWarning):
    """Something in a checkpoint that the model does differently."""


class Checkpoint(NamedTuple):
    """What a file holds, every key and shape checked."""

    state: dict[str, Tensor]  # published keys in the model's order, dtypes as in the file
    config: MAEConfig
    encoder_only: bool
    mask_ratio: float  # of its training where the file says so, else 0.75


def save_checkpoint(model: MaskedAutoencoder, folder: str | Path) -> None:
    """Write ``model.safetensors`` and ``config.json`` into folder; a crash in between leaves the old files whole."""
    state = {name: x.detach().cpu().contiguous() for name, x in model.state_dict().items()}
    write_folder(Path(folder), state, {_CONFIG: dataclasses.asdict(model.config)})


def write_folder(folder: Path, state: dict[str, Tensor], descriptions: dict[str, dict]) -> None:
    """``model.safetensors`` and JSON files by their names, each replaced whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in descriptions.items():
        text = json.dumps(values, indent=2) + "\n"
        replace_file(folder / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))
    write_safetensors(folder / _WEIGHTS, state)


def write_safetensors(file: Path, state: dict[str, Tensor]) -> None:
    """With the format in its metadata, where transformers looks for it."""
    replace_file(file, lambda path: save_file(state, path, metadata={"format": "pt"}))


def load_checkpoint(path: str | Path, model: str | None = None, **overrides) -> MaskedAutoencoder:
    """Build the model of a checkpoint and load its weights, every key and shape checked.

    Args: as of :func:`read_checkpoint`.

    Returns:
        The model in evaluation mode, on the CPU, in float32. A file that holds the encoder alone loads too; its model
        gives features and refuses to reconstruct.

    Raises: as :func:`read_checkpoint`.
    """
    checkpoint = read_checkpoint(path, model, **overrides)
    network = MaskedAutoencoder(checkpoint.config)
    network.encoder_only = checkpoint.encoder_only
    network.load_state_dict(checkpoint.state, strict=not network.encoder_only)
    if checkpoint.mask_ratio != 0.75:
        warnings.warn(
            f"{path} was trained with mask_ratio {checkpoint.mask_ratio:g}, which this model takes in each call",
            CheckpointWarning,
            stacklevel=2,
        )
    return network.eval()


def read_checkpoint(path: str | Path, model: str | None = None, **overrides) -> Checkpoint:
    """The weights of a checkpoint under their published names, and the configuration of their model.

    Args:
        path: a folder with a ``config.json`` and ``model.safetensors`` (or ``pytorch_model.bin``), of ours, of Hugging
            Face's ViTMAE or of timm's; the file in such a folder; or a ``.pth`` or ``.safetensors`` file with a state
            dict in any of these layouts, which is found by its keys.
        model: the factory's name, such as ``"mae_vit_base_patch16"``, for files without a ``config.json`` beside them.
        overrides: fields of :class:`MAEConfig` that the checkpoint does not fix, such as ``norm_pix_loss=False`` for
            the published ``mae_visualize_*`` files.

    Raises:
        CheckpointError: missing file, unreadable file, unknown layout, a configuration that this model cannot have, or
            weights that do not fit it.

    Warns:
        CheckpointWarning: the configuration asks for something that this model does differently, such as another
            epsilon.
    """
    path = Path(path)
    file = _find(path) if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"there is no checkpoint at {file}")
    if model is not None and model not in MODELS:
        raise CheckpointError(f"there is no model called {model!r}; choose one of {', '.join(MODELS)}")
    if model is None and (file.suffix not in (".safetensors", ".bin") or not (file.parent / _CONFIG).is_file()):
        raise CheckpointError(f"{file} has no {_CONFIG} beside it; name the model, one of {', '.join(MODELS)}")
    state = _read(file)
    try:
        layout = find_layout(state)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error
    encoder_only = not any(name.startswith("decoder") or name == "mask_token" for name in state)
    mask_ratio, notes = 0.75, []
    with torch.device("meta"):
        if model is None:
            config, mask_ratio, notes = _configuration(file.parent / _CONFIG, encoder_only, overrides)
            network = MaskedAutoencoder(config)
        else:
            network = MODELS[model](**overrides)
            if layout.startswith("huggingface"):
                notes = ["no config.json was read: norms get the epsilon 1e-06, blocks gelu and no dropout"]
    expected = {k: x for k, x in network.state_dict().items() if not (encoder_only and is_decoder(k))}
    _check(file, state, to_layout(expected, layout))
    for note in notes:
        warnings.warn(f"{path}: {note}", CheckpointWarning, stacklevel=3)
    published = from_layout(state, layout)
    return Checkpoint({name: published[name] for name in expected}, network.config, encoder_only, mask_ratio)


def _check(file: Path, state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    problems = [f"{name} is missing" for name in expected if name not in state]
    problems += [f"{name} is not part of this model" for name in state if name not in expected]
    problems += [
        f"{name} has shape {tuple(x.shape)}, the model expects {tuple(expected[name].shape)}"
        for name, x in state.items()
        if name in expected and x.shape != expected[name].shape
    ]
    if problems:
        raise CheckpointError("\n  ".join([f"{file} does not fit the model:", *problems]))


def _find(folder: Path) -> Path:
    if (folder / f"{_WEIGHTS}.index.json").is_file():
        raise CheckpointError(f"{folder} holds its weights in several files; save them as one")
    other = folder / "pytorch_model.bin"
    return other if other.is_file() and not (folder / _WEIGHTS).is_file() else folder / _WEIGHTS


def _configuration(file: Path, encoder_only: bool, overrides: dict) -> tuple[MAEConfig, float, list[str]]:
    mask_ratio, notes = 0.75, []
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        if "model_type" in fields:
            mask_ratio = fields.get("mask_ratio", mask_ratio)
            fields, notes = from_hugging_face_config(fields, encoder_only)
            if (file.parent / _PREPROCESSOR).is_file():
                pixels = json.loads((file.parent / _PREPROCESSOR).read_text(encoding="utf-8"))
                fields |= {f"pixel_{name}": pixels[f"image_{name}"] for name in ("mean", "std")}
        elif "architecture" in fields:
            fields = from_timm_config(fields)
        fields |= overrides
        channels = fields.get("in_chans", 3)
        if channels != 3 and "pixel_mean" not in fields:
            fields |= {"pixel_mean": (0.5,) * channels, "pixel_std": (0.5,) * channels}
            notes.append("pixel_mean and pixel_std are not known: 0.5 is taken for uint8 images")
        return MAEConfig(**fields), mask_ratio, notes
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} is not the configuration of a model: {error}") from error


def _read(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return _unwrapped(load_file(file))
        # Training checkpoints of the published code carry their command line as an argparse.Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles raise anything from EOFError to IndexError
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{file} is not a readable checkpoint: {reason}") from error
    state = content.get("model", content.get("state_dict", content)) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
        raise CheckpointError(f"{file} holds no state dict, neither at its top nor under 'model' or 'state_dict'")
    return _unwrapped(state)


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without what DistributedDataParallel and torch.compile put before every key."""
    wrapper = re.match(r"(module\.|_orig_mod\.)*", next(iter(state), ""))[0]
    return (
        {name[len(wrapper) :]: x for name, x in state.items()} if all(k.startswith(wrapper) for k in state) else state
    )


def replace_file(target: Path, write: Callable[[Path], object]) -> None:
    """Write beside target, then put it in its place: a crash leaves the old file whole."""
    temporary = target.with_name(target.name + ".tmp")
    temporary.touch()
    mode = temporary.stat().st_mode
    write(temporary)
    temporary.chmod(mode)  # safetensors makes its files private, whatever the umask says
    os.replace(temporary, target)
