"""The models by their names; each factory takes fields of MAEConfig, and ``residual_dtype``."""

from collections.abc import Callable

from mae.model.autoencoder import MaskedAutoencoder
from mae.model.sizes import MAEConfig


def mae_vit_tiny_patch16(**options) -> MaskedAutoencoder:
    return _build({"embed_dim": 192, "depth": 12, "num_heads": 3}, options)


def mae_vit_small_patch16(**options) -> MaskedAutoencoder:
    return _build({"embed_dim": 384, "depth": 12, "num_heads": 6}, options)


def mae_vit_base_patch16(**options) -> MaskedAutoencoder:
    return _build({"embed_dim": 768, "depth": 12, "num_heads": 12}, options)


def mae_vit_large_patch16(**options) -> MaskedAutoencoder:
    return _build({"embed_dim": 1024, "depth": 24, "num_heads": 16}, options)


def mae_vit_huge_patch14(**options) -> MaskedAutoencoder:
    return _build({"patch_size": 14, "embed_dim": 1280, "depth": 32, "num_heads": 16}, options)


def mae_vit_demo_patch7(**options) -> MaskedAutoencoder:
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


def _build(architecture: dict, options: dict) -> MaskedAutoencoder:
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
        mae_vit_demo_patch7,
    )
}
