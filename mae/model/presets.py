"""The models by their names; each factory takes fields of MAEConfig, and ``residual_dtype``."""

from collections.abc import Callable
from typing import Any

from mae.model.autoencoder import MaskedAutoencoder
from mae.model.sizes import MAEConfig


def mae_vit_tiny_patch16(**options: Any) -> MaskedAutoencoder:
    return _build({"embed_dim": 192, "depth": 12, "num_heads": 3}, options)


def mae_vit_small_patch16(**options: Any) -> MaskedAutoencoder:
    return _build({"embed_dim": 384, "depth": 12, "num_heads": 6}, options)


def mae_vit_base_patch16(**options: Any) -> MaskedAutoencoder:
    return _build({"embed_dim": 768, "depth": 12, "num_heads": 12}, options)


def mae_vit_large_patch16(**options: Any) -> MaskedAutoencoder:
    return _build({"embed_dim": 1024, "depth": 24, "num_heads": 16}, options)


def mae_vit_huge_patch14(**options: Any) -> MaskedAutoencoder:
    return _build({"patch_size": 14, "embed_dim": 1280, "depth": 32, "num_heads": 16}, options)


def mae_vit_small_video(**options: Any) -> MaskedAutoencoder:
    return _video({"embed_dim": 384, "num_heads": 6}, options)


def mae_vit_base_video(**options: Any) -> MaskedAutoencoder:
    return _video({"embed_dim": 768, "num_heads": 12}, options)


def mae_vit_large_video(**options: Any) -> MaskedAutoencoder:
    return _video({"embed_dim": 1024, "depth": 24, "num_heads": 16}, options)


def _video(encoder: dict[str, Any], options: dict[str, Any]) -> MaskedAutoencoder:
    """Clips of 16 frames, two of them in a patch, and a decoder of four blocks and half the width, as VideoMAE."""
    decoder = {name: encoder[name] // 2 for name in ("embed_dim", "num_heads")}
    clip = {"image_size": (16, 224, 224), "patch_size": (2, 16, 16), "decoder_depth": 4}
    return _build(clip | encoder | {f"decoder_{name}": x for name, x in decoder.items()}, options)


def mae_vit_base_volume(**options: Any) -> MaskedAutoencoder:
    """Volumes of one channel, such as CT, as cubes of 96 voxels: 216 patches."""
    volume = {"image_size": (96, 96, 96), "in_chans": 1, "pixel_mean": (0.5,), "pixel_std": (0.5,)}
    return _build(volume | {"embed_dim": 768, "num_heads": 12}, options)


def mae_vit_demo_patch7(**options: Any) -> MaskedAutoencoder:
    """0.5 M parameters for 28x28 grey images: small enough to learn within minutes on a CPU."""
    demo = {
        "image_size": 28,
        "patch_size": 7,
        "in_chans": 1,
        "embed_dim": 96,
        "depth": 4,
        "num_heads": 4,
        "decoder_embed_dim": 48,
        "decoder_depth": 1,
        "decoder_num_heads": 4,
        "pixel_mean": (0.286,),
        "pixel_std": (0.353,),
    }
    return _build(demo, options)


def _build(architecture: dict[str, Any], options: dict[str, Any]) -> MaskedAutoencoder:
    """``options`` are fields of :class:`MAEConfig`, and ``residual_dtype``."""
    residual_dtype = options.pop("residual_dtype", None)
    return MaskedAutoencoder(MAEConfig(**{**architecture, **options}), residual_dtype)


MODELS: dict[str, Callable[..., MaskedAutoencoder]] = {
    factory.__name__: factory
    for factory in (
        mae_vit_tiny_patch16,
        mae_vit_small_patch16,
        mae_vit_base_patch16,
        mae_vit_large_patch16,
        mae_vit_huge_patch14,
        mae_vit_small_video,
        mae_vit_base_video,
        mae_vit_large_video,
        mae_vit_base_volume,
        mae_vit_demo_patch7,
    )
}
