"""The configuration of weights that come without one: by the settings of their training, and by their shapes."""

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from mae.checkpoints.configs import mlp_ratio
from mae.checkpoints.layouts import CheckpointError, is_decoder
from mae.fields import are_all, is_number, is_whole
from mae.model import MODELS, MAEConfig
from mae_kernels.patch_grid import Sizes

# Settings of other people's trainings: ours -> what they call it.
_SETTINGS = {
    "model": ("model", "model_name", "arch"),
    "norm_pix_loss": ("norm_pix_loss", "norm_pix"),
    "image_size": ("input_size", "img_size", "image_size"),
    "num_frames": ("num_frames",),
    "mask_ratio": ("mask_ratio",),
    "num_heads": ("num_heads",),
    "decoder_num_heads": ("decoder_num_heads",),
}
_HEADS = ("num_heads", "decoder_num_heads")


def from_settings(places: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """What the settings of a training say of its model, as plain values, and a clause for each that is not taken.

    Args:
        places: settings by where they lie. What two places contradict each other about is not taken.

    Returns:
        Any of ``"model"`` (a name of :data:`mae.model.MODELS`), ``"mask_ratio"``, and the fields
        ``"norm_pix_loss"``, ``"image_size"`` (height and width), ``"num_frames"``, ``"num_heads"`` and
        ``"decoder_num_heads"``.
    """
    result, notes = {}, []
    for ours, names in _SETTINGS.items():
        found = {}
        for place, values in places.items():
            for name in names:
                if name not in values:
                    continue
                value = values[name].item() if hasattr(values[name], "item") else values[name]  # scalars of NumPy
                understood = _READ[ours](value)
                if understood is None:
                    notes.append(f"its settings say {name} {repr(value)[:60]}, which is passed over")
                else:
                    found.setdefault(understood, f"{name} {_text(understood)}" + (f" in {place}" if place else ""))
                    break
        if len(found) == 1:
            result[ours] = next(iter(found))
        elif found:
            notes.append(f"its settings say {' and '.join(found.values())}, of which none is taken")
    return result, notes


def _model_name(value: Any) -> str | None:
    """``"mae_vit_base_patch16_dec512d8b"`` and ``"vit_base_patch16"`` are names of the published code too."""
    name = re.sub(r"_dec512d8b$", "", str(value))
    return next((x for x in (name, f"mae_{name}") if x in MODELS), None)


def _sides(value: Any) -> tuple[int, int] | None:
    """An edge, ``(height, width)``, or timm's ``(channels, height, width)``."""
    sides = (value, value) if is_whole(value) else value
    return tuple(sides[-2:]) if are_all(sides, is_whole) and len(sides) in (2, 3) else None


_READ = {
    "model": _model_name,
    "norm_pix_loss": lambda x: x if x == "channel" else bool(x) if isinstance(x, int) and x in (0, 1) else None,
    "image_size": _sides,
    "mask_ratio": lambda x: float(x) if is_number(x, 0) and x < 1 else None,
} | dict.fromkeys((*_HEADS, "num_frames"), lambda x: x if is_whole(x) else None)


def from_weights(
    state: dict[str, Tensor],
    settings: dict[str, Any],
    model: str | None,
    overrides: dict[str, Any],
    image_size: Sizes | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Fields of :class:`MAEConfig` for weights without a configuration.

    What the caller names comes first, then the shapes, then the settings, and last the published model of that width.

    Args:
        state: published keys; others are passed over.
        settings: as of :func:`from_settings`.
        model: a name of :data:`mae.model.MODELS`, to whose sizes the weights will be held.
        overrides: fields that are not to be looked up.
        image_size: what the size is where nothing else tells it.

    Returns:
        The fields, and a clause for each that is a choice.

    Raises:
        CheckpointError: sizes that cannot be told.
    """
    notes, shapes = [], _shapes(state)
    fixed = ("embed_dim", "depth", "patch_size")
    base = model or settings.get("model")
    said = {}
    for name, width in zip(_HEADS, ("embed_dim", "decoder_embed_dim"), strict=True):
        if name in settings and not model:
            if shapes.get(width, 0) % settings[name]:
                notes.append(f"its settings say {name} {settings[name]}, which does not divide {width} {shapes[width]}")
            else:
                said[name] = settings[name]
    if not model:
        missing = [name for name in ("embed_dim", "patch_size", "depth", "mlp_ratio") if name not in shapes]
        if missing:
            raise CheckpointError(f"its shapes do not tell {', '.join(missing)}; {NAME_THE_MODEL}")
        if base and any(shapes[name] != _factory(base)[name] for name in fixed):
            told = ", ".join(f"{name} {_text(shapes[name])}" for name in fixed if shapes[name] != _factory(base)[name])
            notes.append(f"its settings say {base} and its shapes {told}, which are taken")
        if not base or not _is_like(_factory(base), shapes):
            base = next((name for name in MODELS if _is_like(_factory(name), shapes)), None)
            heads = [name for name in _HEADS if name not in overrides and name not in said]
            if base is None and heads:
                raise CheckpointError(f"it has no config.json beside it; {NAME_THE_MODEL}")
            if heads:
                taken = " and ".join(f"{name} {_factory(base)[name]}" for name in heads)
                notes.append(f"it does not say its heads, and {taken} are those of {base}")
    known = dict(_factory(base)) if base else {}
    # No shape tells whether these are right.
    notes += [f"its settings say {name} {x}" for name, x in said.items() if x != known.get(name, x)]
    told = {"decoder"} if model else shapes.keys() - {"tokens"}  # no name of a model tells its decoder
    result = known | {k: x for k, x in shapes.items() if k in told} | said | overrides
    result["image_size"], more = _image_size(result, shapes.get("tokens"), settings, image_size)
    notes += more
    if "norm_pix_loss" not in overrides:
        result["norm_pix_loss"] = settings.get("norm_pix_loss", True)
        if (target := settings.get("norm_pix_loss", True)) is not True:
            notes.append(f"its settings say norm_pix_loss {target}")
        elif "norm_pix_loss" not in settings and any(is_decoder(name) for name in state):
            notes.append("it does not say norm_pix_loss, and True is assumed")
    if not model and len(result.get("pixel_mean", (0,) * 3)) != result["in_chans"]:
        result = {name: x for name, x in result.items() if name not in ("pixel_mean", "pixel_std") or name in overrides}
    return result, notes


NAME_THE_MODEL = f"name the model, one of {', '.join(MODELS)}"


def _text(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else f"{value}"


@functools.cache
def _factory(name: str) -> dict[str, Any]:
    with torch.device("meta"):
        return asdict(MODELS[name]().config)


def _shapes(state: dict[str, Tensor]) -> dict[str, Any]:
    """Fields that the shapes of weights fix, and ``tokens``, the rows of the position embedding."""
    shape = {name: tuple(x.shape) for name, x in state.items()}
    result: dict[str, Any] = {}
    if len(shape.get("patch_embed.proj.weight", ())) in (4, 5):
        dim, channels, *patch = shape["patch_embed.proj.weight"]
        result |= {"embed_dim": dim, "in_chans": channels, "patch_size": tuple(patch)}
    if len(shape.get("pos_embed", ())) == 3:
        result["tokens"] = shape["pos_embed"][1]
    if len(shape.get("decoder_embed.weight", ())) == 2:
        result |= {"decoder_embed_dim": shape["decoder_embed.weight"][0], "decoder_depth": 0}
    if "decoder_blocks.0.attn.kv.weight" in shape:
        result["decoder"] = "cross"
    widths = {}
    for prefix, blocks in (("", "blocks"), ("decoder_", "decoder_blocks")):
        if len(mlp := shape.get(f"{blocks}.0.mlp.fc1.weight", ())) == 2 and all(mlp):
            result[f"{prefix}depth"] = blocks_in(state, blocks)
            widths |= {f"{prefix}hidden_size": mlp[1], f"{prefix}intermediate_size": mlp[0]}
    if "hidden_size" in widths:
        result["mlp_ratio"] = mlp_ratio(widths, encoder_only="decoder_hidden_size" not in widths)
    return result


def blocks_in(state: dict[str, Tensor], blocks: str) -> int:
    """How many ``"blocks"`` or ``"decoder_blocks"`` published keys name."""
    return len({name.split(".")[1] for name in state if name.startswith(f"{blocks}.")})


def _is_like(model: dict[str, Any], shapes: dict[str, Any]) -> bool:
    return model["embed_dim"] == shapes["embed_dim"] and len(model["patch_size"]) == len(shapes["patch_size"])


def _image_size(
    known: dict[str, Any], tokens: int | None, settings: dict[str, Any], asked: Sizes | None
) -> tuple[tuple[int, ...], list[str]]:
    """Of the settings if as many patches fit as there are positions, else a square or cube of them, else as asked."""
    said, usual, patch = settings.get("image_size"), known.get("image_size"), known["patch_size"]
    patch = (patch, patch) if is_whole(patch) else patch
    if tokens is None or not are_all(patch, is_whole):
        return said or usual or MAEConfig.image_size, []
    if said and len(patch) == 3:
        said = (settings.get("num_frames", 16), *said)
    for size in filter(None, (said, usual)):
        if _patches(size, patch) == tokens - 1:
            return size, [] if size == usual else [f"its settings say image_size {_text(said)}"]
    edge = round(max(tokens - 1, 0) ** (1 / len(patch)))
    if edge >= 1 and edge ** len(patch) == tokens - 1:
        size = tuple(edge * p for p in patch)
        note = f"its positions are those of image_size {_text(size)}"
        return size, [note + (f", and not {_text(said)} as its settings say" if said else "")]
    asked = (asked, asked) if is_whole(asked) else asked
    if are_all(asked, is_whole) and _patches(asked, patch) == tokens - 1:
        return tuple(asked), []
    kind = "cube" if len(patch) == 3 else "square image"
    raise CheckpointError(f"its {tokens - 1} positions are those of no {kind}; pass the image_size of its training")


def _patches(size: Sequence[int], patch: Sequence[int]) -> int | None:
    """How many patches fit, None where some are cut."""
    if len(size) != len(patch) or any(x % p for x, p in zip(size, patch, strict=True)):
        return None
    return math.prod(x // p for x, p in zip(size, patch, strict=True))
