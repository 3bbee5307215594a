"""A thin masked autoencoder on the ops of mae_kernels: pre-train, reconstruct, probe."""

# ruff: noqa: E402 (the packages that the modules below import are asked for first)
from mae.requirements import require

require("safetensors")

from mae.checkpoints.checkpoint import CheckpointError, CheckpointWarning, load_checkpoint, save_checkpoint
from mae.checkpoints.convert import convert_checkpoint
from mae.model import (
    MODELS,
    MAEConfig,
    MAEOutput,
    MaskedAutoencoder,
    Reconstruction,
    VisionTransformer,
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
from mae.training.step import TrainingStep, adamw

__all__ = [
    "MODELS",
    "CheckpointError",
    "CheckpointWarning",
    "MAEConfig",
    "MAEOutput",
    "MaskedAutoencoder",
    "Reconstruction",
    "TrainingStep",
    "VisionTransformer",
    "adamw",
    "convert_checkpoint",
    "load_checkpoint",
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
    "save_checkpoint",
]
