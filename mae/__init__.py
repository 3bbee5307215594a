"""A thin masked autoencoder on the ops of mae_kernels: pre-train, reconstruct, probe."""

import importlib

# What a name is imported from when it is first asked for: importing PyTorch takes seconds, in which Ctrl-C would end a
# command with a traceback.
_MODULES = {
    "mae.checkpoints.checkpoint": ("CheckpointError", "CheckpointWarning", "load_checkpoint", "save_checkpoint"),
    "mae.checkpoints.convert": ("convert_checkpoint",),
    "mae.model": (
        "MODELS",
        "Classifier",
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
    ),
    "mae.training.optimizers": ("adamw", "muon"),
    "mae.training.step": ("TrainingStep",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mae.requirements import require

    require("safetensors")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
