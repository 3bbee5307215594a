"""Which implementation an op takes, and why not another one."""

import importlib.util
import os

import torch
from torch import Tensor

_NAMES = ("auto", "triton", "eager")


def _checked(name: str, source: str) -> str:
    if name not in _NAMES:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, _NAMES))}, got {name!r}")
    return name


_selected = _checked(os.environ.get("MAE_KERNELS_BACKEND", "auto"), "the environment variable MAE_KERNELS_BACKEND")

# Ids are read back and checked on the GPU too, which costs a device synchronisation per op.
DEBUG = os.environ.get("MAE_KERNELS_DEBUG", "0") == "1"


class use_backend:
    """Select the back-end of every op, as a plain call or as a context manager.

    Args:
        name: ``"auto"`` takes the Triton kernels wherever they can run and eager PyTorch elsewhere,
            ``"eager"`` takes PyTorch everywhere, ``"triton"`` raises where the kernels cannot run.
            The environment variable ``MAE_KERNELS_BACKEND`` sets the initial value.

    Raises:
        ValueError: unknown name.

    Example::

        use_backend("eager")            # from here on
        with use_backend("eager"):      # inside the block
            ...
    """

    def __init__(self, name: str):
        global _selected
        self._previous = _selected
        _selected = _checked(name, "use_backend: name")

    def __enter__(self) -> "use_backend":
        return self

    def __exit__(self, *exc_info) -> None:
        global _selected
        _selected = self._previous


def why_not_triton(*tensors: Tensor) -> list[str]:
    """Every reason why an op on these tensors does not take its Triton kernel; empty when it does.

    Args:
        tensors: the arguments of the call in question, any shape, dtype and device.

    Returns:
        One sentence per reason, each with the value that caused it.
    """
    reasons = ["this version of mae_kernels has no Triton kernels yet"]
    if _selected == "eager":
        reasons.append("the selected back-end is 'eager'")
    if importlib.util.find_spec("triton") is None:
        reasons.append("the package triton is not installed")
    for i, x in enumerate(tensors):
        if x.device.type != "cuda":
            reasons.append(f"tensor {i} is on {x.device}, not on a CUDA or ROCm device")
        if x.dtype == torch.float64:
            reasons.append(f"tensor {i} is torch.float64")
    return reasons


def require(op: str, *tensors: Tensor) -> None:
    """Refuse, rather than fall back in silence, when ``"triton"`` was asked for and cannot run."""
    if _selected == "triton":
        reasons = "; ".join(why_not_triton(*tensors))
        raise RuntimeError(f"{op}: use_backend('triton') was asked for, but {reasons}")
