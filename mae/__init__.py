"""A thin masked autoencoder on the ops of mae_kernels: pre-train, reconstruct, probe."""

import ast
import importlib
from pathlib import Path
from typing import Any

# Where each name of the stub, which type checkers read too, comes from. It is imported when it is first asked for:
# importing PyTorch takes seconds, in which Ctrl-C would end a command with a traceback.
_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
_HOMES = {name.name: line.module for line in _STUB.body if isinstance(line, ast.ImportFrom) for name in line.names}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mae.requirements import require

    require("safetensors")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
