"""Configurations of other systems, as their ``config.json`` holds them, and ours: pure functions on dictionaries.

Fields were read in transformers 4.57.6 and 5.23.0 (``ViTMAEConfig``) and in timm 1.0.31. What our model cannot be is
refused; what changes a result is said.
"""

import math
import re
from collections.abc import Callable
from typing import Any

from mae.layouts import CheckpointError
from mae.model import MAEConfig

_LAYER_NORM_EPS = 1e-6  # of every norm of our model

# Fields of ViTMAEConfig: ours -> theirs, and the defaults that a config.json may leave out.
_HUGGING_FACE_FIELDS = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "in_chans": "num_channels",
    "embed_dim": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "decoder_embed_dim": "decoder_hidden_size",
    "decoder_depth": "decoder_num_hidden_layers",
    "decoder_num_heads": "decoder_num_attention_heads",
    "norm_pix_loss": "norm_pix_loss",
}
_HUGGING_FACE_DEFAULTS = {
    "image_size": 224, "patch_size": 16, "num_channels": 3, "hidden_size": 768, "num_hidden_layers": 12,
    "num_attention_heads": 12, "intermediate_size": 3072, "decoder_hidden_size": 512, "decoder_num_hidden_layers": 8,
    "decoder_num_attention_heads": 16, "decoder_intermediate_size": 2048, "norm_pix_loss": False, "mask_ratio": 0.75,
    "layer_norm_eps": 1e-12, "hidden_act": "gelu", "qkv_bias": True, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip

_MOST_BLOCKS, _LARGEST = 1000, 1 << 16  # which no model comes near, and which build within seconds


def is_whole(x: Any, lowest: int = 1, highest: int = _LARGEST) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and lowest <= x <= highest


def is_number(x: Any, lowest: float = -math.inf) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and lowest < x < math.inf


def are_all(values: Any, test: Callable[..., bool], *arguments) -> bool:
    return isinstance(values, (list, tuple)) and all(test(x, *arguments) for x in values)


_SIZE = (
    lambda x: is_whole(x) or (are_all(x, is_whole) and len(x) in (2, 3)),
    f"a whole number of 1 to {_LARGEST}, or a list of one a side",
)
_SHARE = (lambda x: is_number(x) and 0 <= x < 1, "a number from 0 to below 1")
_WIDTH = (is_whole, f"a whole number of 1 to {_LARGEST}")
_BLOCKS = (lambda x: is_whole(x, 0, _MOST_BLOCKS), f"a whole number of 0 to {_MOST_BLOCKS}")
_RULES = {
    "image_size": _SIZE, "patch_size": _SIZE, "in_chans": _WIDTH, "embed_dim": _WIDTH, "depth": _BLOCKS,
    "num_heads": _WIDTH, "decoder_embed_dim": _WIDTH, "decoder_depth": _BLOCKS, "decoder_num_heads": _WIDTH,
    "mlp_ratio": (lambda x: is_number(x, 0) and x < _LARGEST, "a number above 0"),
    "norm_pix_loss": (lambda x: isinstance(x, bool), "true or false"),
    "pixel_mean": (lambda x: are_all(x, is_number), "a list of numbers"),
    "pixel_std": (lambda x: are_all(x, is_number, 0), "a list of numbers above 0"),
}  # fmt: skip


def check_fields(values: dict) -> None:
    """Types and ranges of fields of :class:`MAEConfig`, before anything is built from them.

    Raises:
        ValueError: the field, what was expected and what came.
    """
    for name in values:
        if name not in _RULES:
            raise ValueError(f"{name} is no field of MAEConfig, which has {', '.join(_RULES)}")
    _check(values, _RULES)
    sides = {name: len(values[name]) for name in ("image_size", "patch_size") if are_all(values.get(name), is_whole)}
    if len({*sides.values()}) > 1:
        raise ValueError(f"image_size has {sides['image_size']} sides, and patch_size {sides['patch_size']}")


def _check(values: dict, rules: dict) -> None:
    for name, (fits, expected) in rules.items():
        if name in values and not fits(values[name]):
            raise ValueError(f"{name} must be {expected}, got {repr(values[name])[:60]}")


_HUGGING_FACE_RULES = {theirs: _RULES[ours] for ours, theirs in _HUGGING_FACE_FIELDS.items()} | {
    "intermediate_size": _WIDTH,
    "decoder_intermediate_size": _WIDTH,
    "layer_norm_eps": (lambda x: is_number(x, 0), "a number above 0"),
    "hidden_dropout_prob": _SHARE,
    "attention_probs_dropout_prob": _SHARE,
    "mask_ratio": _SHARE,
}


def to_hugging_face_config(config: MAEConfig, mask_ratio: float = 0.75) -> dict:
    """Arguments of ``transformers.ViTMAEConfig``, 4.x and 5.x, for the same model.

    Raises:
        ValueError: images or patches that are not square, which theirs does not take.
    """
    for name in ("image_size", "patch_size"):
        height, width = getattr(config, name)
        if height != width:
            raise ValueError(
                f"Hugging Face's ViTMAE takes square images and patches alone, this {name} is {height}x{width}"
            )
    values = {theirs: getattr(config, ours) for ours, theirs in _HUGGING_FACE_FIELDS.items()}
    return values | {
        "image_size": config.image_size[0],
        "patch_size": config.patch_size[0],
        "intermediate_size": int(config.embed_dim * config.mlp_ratio),
        "decoder_intermediate_size": int(config.decoder_embed_dim * config.mlp_ratio),
        "layer_norm_eps": _LAYER_NORM_EPS,
        "hidden_act": "gelu",
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "mask_ratio": mask_ratio,
    }


def to_preprocessor_config(config: MAEConfig) -> dict:
    """A ``preprocessor_config.json`` for images resized and normalised as ours are, with Hugging Face's own resize."""
    height, width = config.image_size
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": config.pixel_mean,
        "image_std": config.pixel_std,
    }


def from_hugging_face_config(values: dict, encoder_only: bool = False) -> tuple[dict, list[str]]:
    """Fields of :class:`MAEConfig` for the contents of a ``config.json``, and a sentence for each changed result.

    ``mask_ratio`` is not among them: our model takes it in each call. With encoder_only the decoder is not held to the
    encoder's mlp_ratio.

    Raises:
        CheckpointError: another model, or one that ours cannot be.
        ValueError: a value that no model can have.
    """
    values = {**_HUGGING_FACE_DEFAULTS, **values}
    for name, expected in {"model_type": "vit_mae", "hidden_act": "gelu", "qkv_bias": True}.items():
        if values.get(name, expected) != expected:
            raise CheckpointError(f"{name} is {values[name]!r}, and only {expected!r} can be converted")
    _check(values, _HUGGING_FACE_RULES)
    notes = []
    eps = values["layer_norm_eps"]
    if eps > 1e-5:
        raise CheckpointError(f"layer_norm_eps is {eps:g}, too far from the {_LAYER_NORM_EPS:g} of this model")
    if eps != _LAYER_NORM_EPS:
        notes.append(f"layer_norm_eps {eps:g} becomes {_LAYER_NORM_EPS:g}: results differ slightly")
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        if values[name]:
            notes.append(f"{name} {values[name]:g} becomes 0: training differs, results in evaluation do not")
    fields = {ours: values[theirs] for ours, theirs in _HUGGING_FACE_FIELDS.items()}
    return fields | {"mlp_ratio": mlp_ratio(values, encoder_only)}, notes


def mlp_ratio(values: dict, encoder_only: bool) -> float:
    """One ratio for encoder and decoder whose products, cut to whole numbers, are their widths."""
    prefixes = ("",) if encoder_only else ("", "decoder_")
    widths = [(values[f"{prefix}hidden_size"], values[f"{prefix}intermediate_size"]) for prefix in prefixes]
    for dim, hidden in widths:
        for ratio in (hidden / dim, math.nextafter(hidden / dim, math.inf)):
            if all(int(dim * ratio) == hidden for dim, hidden in widths):
                return ratio
    (dim, hidden), (decoder_dim, decoder_hidden) = widths
    raise CheckpointError(
        f"intermediate_size {hidden} of {dim} and decoder_intermediate_size {decoder_hidden} of {decoder_dim} are not "
        "the same ratio, and this model has one for both"
    )


_TIMM_ARGUMENTS = {
    "img_size": "image_size",
    "patch_size": "patch_size",
    "in_chans": "in_chans",
    "embed_dim": "embed_dim",
    "depth": "depth",
    "num_heads": "num_heads",
    "mlp_ratio": "mlp_ratio",
}


def to_timm_config(config: MAEConfig) -> dict:
    """A ``config.json`` with which ``timm.create_model("local-dir:FOLDER")`` builds the encoder, without a head.

    ``num_classes=10`` there puts one on the class token.
    """
    return {
        "architecture": "vit_base_patch16_224",
        "num_classes": 0,
        "global_pool": "token",
        "num_features": config.embed_dim,
        "model_args": {
            **{theirs: getattr(config, ours) for theirs, ours in _TIMM_ARGUMENTS.items()},
            "num_classes": 0,
            "global_pool": "token",
        },
        "pretrained_cfg": {
            "input_size": [config.in_chans, *config.image_size],
            "fixed_input_size": True,
            "mean": config.pixel_mean,
            "std": config.pixel_std,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def from_timm_config(values: dict) -> dict:
    """Fields of :class:`MAEConfig` for the contents of a ``config.json`` of timm's; the decoder keeps its defaults.

    Raises:
        CheckpointError: another model than a plain ViT, or one described by its name alone.
        ValueError: a value that no model can have.
    """
    for name, kind in {"architecture": str, "model_args": dict, "pretrained_cfg": dict}.items():
        if not isinstance(values.get(name, kind()), kind):
            expected = {str: "a name", dict: "an object"}[kind]
            raise ValueError(f"{name} must be {expected}, got {repr(values[name])[:60]}")
    arguments = {k: x for k, x in values.get("model_args", {}).items() if k not in ("num_classes", "global_pool")}
    if not re.fullmatch(r"vit_[a-z]+_patch\d+_\d+", values["architecture"]):
        raise CheckpointError(f"architecture {values['architecture']} is not a plain ViT")
    for name, value in arguments.items():
        if name not in _TIMM_ARGUMENTS:
            raise CheckpointError(f"model_args {name} {value!r} cannot be converted")
    missing = [name for name in _TIMM_ARGUMENTS if name not in arguments]
    if missing:
        raise CheckpointError(f"model_args do not hold {', '.join(missing)}; name the model")
    fields = {ours: arguments[theirs] for theirs, ours in _TIMM_ARGUMENTS.items()}
    pixels = values.get("pretrained_cfg", {})
    return fields | {f"pixel_{name}": pixels[name] for name in ("mean", "std") if name in pixels}
