"""Configurations of other systems, as their ``config.json`` holds them, and ours: pure functions on dictionaries.

Fields were read in transformers 4.57.6 and 5.23.0 (``ViTMAEConfig``, ``ViTConfig``, ``BeitConfig``) and in timm 1.0.31.
What our model cannot be is refused; what changes a result is said.
"""

import math
import re
from typing import Any

from mae.checkpoints.layouts import CheckpointError
from mae.fields import RULES, SHARE, WIDTH, check, is_number
from mae.model import HeadConfig, MAEConfig
from mae.model.classifier import Pool

_LAYER_NORM_EPS = 1e-6  # of every norm of our model

# Fields of ViTMAEConfig: ours -> theirs, and the defaults that a config.json may leave out. Those of the encoder are
# ViTConfig's and BeitConfig's too.
_HUGGING_FACE_ENCODER = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "in_chans": "num_channels",
    "embed_dim": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
}
_HUGGING_FACE_DECODER = {
    "decoder_embed_dim": "decoder_hidden_size",
    "decoder_depth": "decoder_num_hidden_layers",
    "decoder_num_heads": "decoder_num_attention_heads",
    "norm_pix_loss": "norm_pix_loss",
}
_HUGGING_FACE_FIELDS = _HUGGING_FACE_ENCODER | _HUGGING_FACE_DECODER
_HUGGING_FACE_DEFAULTS = {
    "image_size": 224, "patch_size": 16, "num_channels": 3, "hidden_size": 768, "num_hidden_layers": 12,
    "num_attention_heads": 12, "intermediate_size": 3072, "decoder_hidden_size": 512, "decoder_num_hidden_layers": 8,
    "decoder_num_attention_heads": 16, "decoder_intermediate_size": 2048, "norm_pix_loss": False, "mask_ratio": 0.75,
    "layer_norm_eps": 1e-12, "hidden_act": "gelu", "qkv_bias": True, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
# What makes a BEiT this model, and its defaults.
BEIT = {
    "use_mean_pooling": True, "use_absolute_position_embeddings": True, "use_relative_position_bias": False,
    "use_shared_relative_position_bias": False, "use_mask_token": False, "layer_scale_init_value": 0.0,
}  # fmt: skip
_BEIT_DEFAULTS = BEIT | {"use_absolute_position_embeddings": False, "layer_scale_init_value": 0.1}

_HUGGING_FACE_RULES = {theirs: RULES[ours] for ours, theirs in _HUGGING_FACE_FIELDS.items()} | {
    "intermediate_size": WIDTH,
    "decoder_intermediate_size": WIDTH,
    "layer_norm_eps": (lambda x: is_number(x, 0), "a number above 0"),
    "hidden_dropout_prob": SHARE,
    "attention_probs_dropout_prob": SHARE,
    "mask_ratio": SHARE,
}


def to_hugging_face_config(config: MAEConfig, mask_ratio: float = 0.75) -> dict[str, Any]:
    """Arguments of ``transformers.ViTMAEConfig``, 4.x and 5.x, for the same model.

    Raises:
        ValueError: images or patches that are not square, or a target that theirs does not have.
    """
    theirs = to_encoder_config(config, "ViTMAE")
    if config.norm_pix_loss == "channel":
        raise ValueError("Hugging Face's ViTMAE normalises whole patches, this norm_pix_loss is 'channel'")
    return theirs | {
        **{theirs: getattr(config, ours) for ours, theirs in _HUGGING_FACE_DECODER.items()},
        "decoder_intermediate_size": int(config.decoder_embed_dim * config.mlp_ratio),
        "mask_ratio": mask_ratio,
    }


def to_encoder_config(config: MAEConfig, kind: str) -> dict[str, Any]:
    """What all configurations of Hugging Face's Vision Transformers say of the encoder.

    Raises:
        ValueError: images or patches that are not square, which those of that kind are.
    """
    for name in ("image_size", "patch_size"):
        sides = getattr(config, name)
        if sides != sides[:1] * 2:
            raise ValueError(
                f"Hugging Face's {kind} takes square images and patches alone, this {name} is "
                f"{'x'.join(map(str, sides))}"
            )
    return {theirs: getattr(config, ours) for ours, theirs in _HUGGING_FACE_ENCODER.items()} | {
        "image_size": config.image_size[0],
        "patch_size": config.patch_size[0],
        "intermediate_size": int(config.embed_dim * config.mlp_ratio),
        "layer_norm_eps": _LAYER_NORM_EPS,
        "hidden_act": "gelu",
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def to_preprocessor_config(config: MAEConfig) -> dict[str, Any]:
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


def from_hugging_face_config(values: dict[str, Any], encoder_only: bool = False) -> tuple[dict[str, Any], list[str]]:
    """Fields of :class:`MAEConfig` for the contents of a ``config.json``, and a sentence for each changed result.

    ``mask_ratio`` is not among them: our model takes it in each call. With encoder_only the decoder is not held to the
    encoder's mlp_ratio. A ViT or BEiT tells nothing of a decoder.

    Raises:
        CheckpointError: another model, or one that ours cannot be.
        ValueError: a value that no model can have.
    """
    kind = values.get("model_type", "vit_mae")
    if kind not in ("vit_mae", "vit", "beit"):
        raise CheckpointError(f"model_type is {kind!r}, and only 'vit_mae', 'vit' and 'beit' can be converted")
    values = {**_HUGGING_FACE_DEFAULTS, **(_BEIT_DEFAULTS if kind == "beit" else {}), **values}
    for name, expected in {"hidden_act": "gelu", "qkv_bias": True, **(BEIT if kind == "beit" else {})}.items():
        if values[name] != expected:
            raise CheckpointError(f"{name} is {values[name]!r}, and only {expected!r} can be converted")
    check(values, _HUGGING_FACE_RULES)
    notes = []
    eps = values["layer_norm_eps"]
    if eps > 1e-5:
        raise CheckpointError(f"layer_norm_eps is {eps:g}, too far from the {_LAYER_NORM_EPS:g} of this model")
    if eps != _LAYER_NORM_EPS:
        notes.append(f"layer_norm_eps {eps:g} becomes {_LAYER_NORM_EPS:g}: results differ slightly")
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        if values[name]:
            notes.append(f"{name} {values[name]:g} becomes 0: training differs, results in evaluation do not")
    told = _HUGGING_FACE_FIELDS if kind == "vit_mae" else _HUGGING_FACE_ENCODER
    fields = {ours: values[theirs] for ours, theirs in told.items()}
    return fields | {"mlp_ratio": mlp_ratio(values, encoder_only)}, notes


def mlp_ratio(values: dict[str, Any], encoder_only: bool) -> float:
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


TIMM_POOLS: dict[str, Pool] = {"avg": "mean", "token": "token"}  # theirs -> ours


def to_timm_config(config: MAEConfig, head: HeadConfig | None = None) -> dict[str, Any]:
    """A ``config.json`` with which ``timm.create_model("local-dir:FOLDER")`` builds the encoder, or the classifier.

    Without a head, ``num_classes=10`` there puts one on the class token.

    Raises:
        ValueError: video or volumes, which theirs does not take.
    """
    if len(config.patch_size) != 2:
        raise ValueError(f"timm's ViT takes images, this image_size is {'x'.join(map(str, config.image_size))}")
    output = {"num_classes": 0, "global_pool": "token"}
    if head is not None:
        pool = next(theirs for theirs, ours in TIMM_POOLS.items() if ours == head.pool)
        output = {"num_classes": len(head.classes), "global_pool": pool}
    arguments = {theirs: getattr(config, ours) for theirs, ours in _TIMM_ARGUMENTS.items()} | output
    return {
        "architecture": "vit_base_patch16_224",
        **output,
        "num_features": config.embed_dim,
        **({} if head is None else {"label_names": head.classes}),
        "model_args": arguments if head is None else arguments | {"fc_norm": head.fc_norm},
        "pretrained_cfg": {
            "input_size": [config.in_chans, *config.image_size],
            "fixed_input_size": True,
            "mean": config.pixel_mean,
            "std": config.pixel_std,
            "crop_pct": 1.0,  # as our own commands look at pictures: all of their central part
            "interpolation": "bicubic",
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


_TIMM_HEAD = ("num_classes", "global_pool", "fc_norm")


def from_timm_config(values: dict[str, Any]) -> dict[str, Any]:
    """Fields of :class:`MAEConfig` for the contents of a ``config.json`` of timm's; the decoder keeps its defaults.

    Raises:
        CheckpointError: another model than a plain ViT, or one described by its name alone.
        ValueError: a value that no model can have.
    """
    for name, kind in {"architecture": str, "model_args": dict, "pretrained_cfg": dict}.items():
        if not isinstance(values.get(name, kind()), kind):
            expected = {str: "a name", dict: "an object"}[kind]
            raise ValueError(f"{name} must be {expected}, got {repr(values[name])[:60]}")
    arguments = {k: x for k, x in values.get("model_args", {}).items() if k not in _TIMM_HEAD}
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
