"""What a family of models offers to fused ops, and how a module comes to use them: by a subclass of its own class."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor, nn

from mae_kernels.untouched import projects_patches, quiet


@dataclass(frozen=True)
class Replacement:
    """One method of a module that can run on fused ops.

    Paths are those of ``get_submodule``, seen from the module.
    """

    method: str
    # Called in its place. Returns NotImplemented, having changed nothing, for calls that the ops do not cover.
    function: Callable[..., Any]
    ops: tuple[str, ...]
    example: Callable[[], tuple[Any, ...]]  # arguments of a call, to see whether both do the same
    projection: str = ""  # path of the convolution whose parameters it uses without calling it
    passed_over: tuple[str, ...] = ()  # paths of further modules that it does not call
    tensors: tuple[str, ...] = ()  # paths of the tensors that it uses
    ignored: tuple[str, ...] = ()  # methods of the module that it does not call
    options: str = ""  # why the module's options keep it from doing the same, if they do

    def obstacle(self, module: nn.Module) -> str:
        """Why the module, as it is now, cannot run on the ops; empty if nothing is known to be in the way."""
        if self.method in vars(module):
            return f"the method {self.method} was set on the instance"
        missing = [path for path in (*self.passed_over, *self.tensors) if reach(module, path) is None]
        if missing:
            return f"it has no {missing[0]}"
        conv = reach(module, self.projection) if self.projection else None
        if self.projection and getattr(type(conv), "forward", None) is not nn.Conv2d.forward:
            return f"{self.projection} is {_named(conv)}, not a convolution of patches"
        return self.options

    def guarded(self, module: nn.Module) -> "Guarded":
        """The function, and what has to be as it is now for it to be called."""
        paths = (*self.passed_over, self.projection) if self.projection else self.passed_over
        parts = tuple((path, type(reach(module, path)).forward) for path in paths)
        return Guarded(self.function, parts, self.projection, self.tensors, self.ignored)


class Guarded(NamedTuple):
    """A function in a method's place, called while nobody would notice; the original method at all other times."""

    function: Callable
    parts: tuple[tuple[str, Callable], ...]  # paths of modules that it does not call, each with its forward
    projection: str
    tensors: tuple[str, ...]
    ignored: tuple[str, ...]

    def fits(self, module: nn.Module) -> bool:
        """Whether no part was exchanged, hooked or emptied since."""
        for path, forward in self.parts:
            part = reach(module, path)
            if part is None or type(part).forward is not forward or not quiet(part):
                return False
        if self.projection and not projects_patches(reach(module, self.projection)):
            return False
        for path in self.tensors:
            tensor = reach(module, path)
            if not isinstance(tensor, Tensor) or not tensor.numel():
                return False
        return not any(name in vars(module) for name in self.ignored)


def reach(module: nn.Module, path: str) -> Any:
    """The attribute of an attribute, None where one is missing."""
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def _named(part: Any) -> str:
    return "missing" if part is None else f"a {type(part).__name__}"


def fused_class(cls: type, functions: dict[str, Guarded]) -> type:
    """A subclass of cls under the same name, with these methods. Instances copy and pickle as those of cls do."""
    return _fused_class(cls, tuple(functions.items()))


def original_class(module: nn.Module) -> type | None:
    """The class that a module had before it became one of a :func:`fused_class`; None if it did not."""
    return getattr(type(module), "mae_kernels_original", None)


@cache
def _fused_class(cls: type, functions: tuple[tuple[str, Guarded], ...]) -> type:
    def reduce(self, protocol):
        # The class cannot be found by its name: pickle would take the original, which has the same.
        reduced = super(fused, self).__reduce_ex__(protocol)
        return (_blank, (cls, functions), *reduced[2:])

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    methods = {method: _method(getattr(cls, method), function) for method, function in functions}
    fused = type(cls.__name__, (cls,), {**names, **methods, "__reduce_ex__": reduce, "mae_kernels_original": cls})
    return fused


def _blank(cls: type, functions: tuple[tuple[str, Guarded], ...]):
    fused = _fused_class(cls, functions)
    return fused.__new__(fused)


def _method(original: Callable, guarded: Guarded) -> Callable:
    @functools.wraps(original)  # with its signature, by which trainers choose the columns of a data set
    def run(self, *args, **kwargs):
        result = guarded.function(self, *args, **kwargs) if guarded.fits(self) else NotImplemented
        return original(self, *args, **kwargs) if result is NotImplemented else result

    return run
