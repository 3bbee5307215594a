"""Weights on disk: run folders, and checkpoints of the published code, Hugging Face and timm."""
