"""Weights on disk: our own run folders, and files of the published code."""

import argparse
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mae.model import MODELS, MAEConfig, MaskedAutoencoder

_WEIGHTS, _CONFIG = "model.safetensors", "config.json"


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message says why and what would help."""


def save_checkpoint(model: MaskedAutoencoder, folder: str | Path) -> None:
    """Write ``model.safetensors`` and ``config.json`` into folder; a crash in between leaves the old files whole."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: x.detach().cpu().contiguous() for name, x in model.state_dict().items()}
    config = json.dumps(dataclasses.asdict(model.config), indent=2) + "\n"
    _replace(folder / _CONFIG, lambda path: path.write_text(config, encoding="utf-8"))
    _replace(folder / _WEIGHTS, lambda path: save_file(state, path))


def load_checkpoint(path: str | Path, model: str | None = None, **overrides) -> MaskedAutoencoder:
    """Build the model of a checkpoint and load its weights, every key and shape checked.

    Args:
        path: a run folder, its ``model.safetensors``, or a ``.pth`` file of the published code
            (a state dict, or one under the key ``"model"``).
        model: the factory's name, such as ``"mae_vit_base_patch16"``, for files without a ``config.json`` beside them.
        overrides: fields of :class:`MAEConfig` that the checkpoint does not fix, such as ``norm_pix_loss=False`` for
            the published ``mae_visualize_*`` files.

    Returns:
        The model in evaluation mode, on the CPU. A file that holds the encoder alone loads too; its model gives
        features and refuses to reconstruct.

    Raises:
        CheckpointError: missing file, unreadable file, or weights that do not fit the model.
    """
    path = Path(path)
    file = path / _WEIGHTS if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"there is no checkpoint at {file}")
    network = _build(file, model, overrides)
    state = _read(file)
    expected = network.state_dict()
    missing = [name for name in expected if name not in state]
    network.encoder_only = bool(missing) and set(missing) == {name for name in expected if _is_decoder(name)}
    problems = [] if network.encoder_only else [f"{name} is missing" for name in missing]
    problems += [f"{name} is not part of this model" for name in state if name not in expected]
    problems += [
        f"{name} has shape {tuple(x.shape)}, the model expects {tuple(expected[name].shape)}"
        for name, x in state.items()
        if name in expected and x.shape != expected[name].shape
    ]
    if problems:
        shown = "\n  ".join(problems[:20]) + (f"\n  and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise CheckpointError(f"{file} does not fit the model:\n  {shown}")
    network.load_state_dict(state, strict=not network.encoder_only)
    return network.eval()


def _is_decoder(name: str) -> bool:
    return name.startswith("decoder_") or name == "mask_token"


def _build(file: Path, model: str | None, overrides: dict) -> MaskedAutoencoder:
    config_file = file.parent / _CONFIG
    if model is not None:
        if model not in MODELS:
            raise CheckpointError(f"there is no model called {model!r}; choose one of {', '.join(MODELS)}")
        return MODELS[model](**overrides)
    if file.suffix != ".safetensors" or not config_file.is_file():
        raise CheckpointError(f"{file} has no {_CONFIG} beside it; name the model, one of {', '.join(MODELS)}")
    try:
        config = MAEConfig(**{**json.loads(config_file.read_text(encoding="utf-8")), **overrides})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{config_file} is not the configuration of a model: {error}") from error
    return MaskedAutoencoder(config)


def _read(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # Training checkpoints of the published code carry their command line as an argparse.Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles raise anything from EOFError to IndexError
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{file} is not a readable checkpoint: {reason}") from error
    state = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
        raise CheckpointError(f"{file} holds no state dict, neither at its top nor under the key 'model'")
    return state


def _replace(target: Path, write: Callable[[Path], object]) -> None:
    temporary = target.with_name(target.name + ".tmp")
    temporary.touch()
    mode = temporary.stat().st_mode
    write(temporary)
    temporary.chmod(mode)  # safetensors makes its files private, whatever the umask says
    os.replace(temporary, target)
