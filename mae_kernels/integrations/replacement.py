"""What a family of models offers to fused ops, and how a module comes to use them: by a subclass of its own class."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Replacement:
    """One method of a module that can run on fused ops."""

    method: str
    # Called in its place. Returns NotImplemented, having changed nothing, for calls that the ops do not cover.
    function: Callable[..., Any]
    ops: tuple[str, ...]
    example: Callable[[], tuple[Any, ...]]  # arguments of a call, to see whether both do the same


def fused_class(cls: type, functions: dict[str, Callable]) -> type:
    """A subclass of cls under the same name, with these methods. Instances copy and pickle as those of cls do."""
    return _fused_class(cls, tuple(functions.items()))


def original_class(module: nn.Module) -> type | None:
    """The class that a module had before it became one of a :func:`fused_class`; None if it did not."""
    return getattr(type(module), "mae_kernels_original", None)


@cache
def _fused_class(cls: type, functions: tuple[tuple[str, Callable], ...]) -> type:
    def reduce(self, protocol):
        # The class cannot be found by its name: pickle would take the original, which has the same.
        reduced = super(fused, self).__reduce_ex__(protocol)
        return (_blank, (cls, functions), *reduced[2:])

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    methods = {method: _method(getattr(cls, method), function) for method, function in functions}
    fused = type(cls.__name__, (cls,), {**names, **methods, "__reduce_ex__": reduce, "mae_kernels_original": cls})
    return fused


def _blank(cls: type, functions: tuple[tuple[str, Callable], ...]):
    fused = _fused_class(cls, functions)
    return fused.__new__(fused)


def _method(original: Callable, function: Callable) -> Callable:
    @functools.wraps(original)  # with its signature, by which trainers choose the columns of a data set
    def run(self, *args, **kwargs):
        result = function(self, *args, **kwargs)
        return original(self, *args, **kwargs) if result is NotImplemented else result

    return run
