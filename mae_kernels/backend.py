"""Which implementation an op takes, and why not another one."""

import importlib.util
import os
from functools import cache
from typing import Any

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

# Triton then runs its kernels in NumPy, on CPU tensors: slow, and exact enough to prove them without a GPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


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

    def __init__(self, name: str) -> None:
        global _selected
        self._previous = _selected
        _selected = _checked(name, "use_backend: name")

    def __enter__(self) -> "use_backend":
        return self

    def __exit__(self, *exc_info: object) -> None:
        global _selected
        _selected = self._previous


def why_not_triton(*tensors: Tensor) -> list[str]:
    """Every reason why an op on these tensors does not take its Triton kernel; empty when it does.

    Args:
        tensors: the arguments of the call in question, any shape, dtype and device.

    Returns:
        One sentence per reason, each with the value that caused it.
    """
    reasons = []
    if _selected == "eager":
        reasons.append("the selected back-end is 'eager'")
    if not _triton_is_installed():
        reasons.append("the package triton is not installed")
    for i, x in enumerate(tensors):
        if x.device.type == "cuda":
            if not is_recent_gpu(x.device):
                capability = _capability(x.device)
                reasons.append(f"tensor {i} is on {x.device}, of compute capability {capability}, below (8, 0)")
        elif not (x.device.type == "cpu" and _selected == "triton" and INTERPRETED):
            reasons.append(f"tensor {i} is on {x.device}, not on a CUDA or ROCm device")
        if x.dtype == torch.float64:
            reasons.append(f"tensor {i} is torch.float64, but the kernels compute in float32")
    return reasons


def is_recent_gpu(device: torch.device) -> bool:
    """Whether it is a GPU of compute capability 8.0 or more: those run the kernels, and compute in bfloat16."""
    return device.type == "cuda" and _capability(device) >= (8, 0)


def is_eager(x: Tensor) -> bool:
    """Whether eager PyTorch is what was chosen for x, not what is left where the kernels cannot run."""
    return _selected == "eager" or (_selected == "auto" and x.device.type != "cuda")


def takes_triton(op: str, *args: Any) -> bool:
    """Whether a call of the op takes its Triton kernels.

    Raises:
        RuntimeError: it cannot, but ``"triton"`` was asked for: there is no fall-back in silence.
    """
    if is_eager(args[0]):
        return False
    first, tensors = args[0], [x for x in args if isinstance(x, Tensor)]
    others = [x for x in tensors if x.dtype == torch.float64 or x.device != first.device]
    if not why_not_triton(first, *others):  # those that are like the first need no look
        return True
    if _selected == "triton":
        reasons = "; ".join(why_not_triton(*tensors))
        raise RuntimeError(f"{op}: use_backend('triton') was asked for, but {reasons}")
    return False


@cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    # ROCm reports its gfx number here: (9, 4) for gfx942.
    return torch.cuda.get_device_capability(device)
