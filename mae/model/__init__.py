"""The models: the Vision Transformer, and the masked autoencoder that pre-trains it."""

from mae.model.autoencoder import MAEOutput, MaskedAutoencoder, Reconstruction
from mae.model.block import Block
from mae.model.classifier import Classifier, HeadConfig
from mae.model.cross import CrossBlock
from mae.model.positions import pos_embed_for, resample_pos_embed, sincos_pos_embed
from mae.model.presets import (
    MODELS,
    mae_vit_base_patch16,
    mae_vit_base_video,
    mae_vit_base_volume,
    mae_vit_demo_patch7,
    mae_vit_huge_patch14,
    mae_vit_large_patch16,
    mae_vit_large_video,
    mae_vit_small_patch16,
    mae_vit_small_video,
    mae_vit_tiny_patch16,
)
from mae.model.sizes import MAEConfig
from mae.model.vit import VisionTransformer

__all__ = [
    "MODELS",
    "Block",
    "Classifier",
    "CrossBlock",
    "HeadConfig",
    "MAEConfig",
    "MAEOutput",
    "MaskedAutoencoder",
    "Reconstruction",
    "VisionTransformer",
    "mae_vit_base_patch16",
    "mae_vit_base_video",
    "mae_vit_base_volume",
    "mae_vit_demo_patch7",
    "mae_vit_huge_patch14",
    "mae_vit_large_patch16",
    "mae_vit_large_video",
    "mae_vit_small_patch16",
    "mae_vit_small_video",
    "mae_vit_tiny_patch16",
    "pos_embed_for",
    "resample_pos_embed",
    "sincos_pos_embed",
]
