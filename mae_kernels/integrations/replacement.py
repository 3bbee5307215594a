"""What a family of models offers to fused ops, and how a module comes to use them: by a subclass of its own class."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..untouched import projects_patches, quiet


@dataclass(frozen=True)
class Replacement:
    """One method of a module that can run on fused ops, in one way; a family may offer several ways.

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
    methods: tuple[str, ...] = ()  # paths of the methods that it does not call, or calls with something else
    options: str = ""  # why the module's options keep it from doing the same, if they do

    def obstacle(self, module: nn.Module) -> str:
        """Why the module, as it is now, cannot run on the ops; empty if nothing is known to be in the way."""
        if self.method in vars(module):
            return f"the method {self.method} was set on the instance"
        missing = [path for path in (*self.passed_over, *self.tensors) if reach(module, path) is None]
        if missing:
            return f"it has no {missing[0]}"
        conv = reach(module, self.projection) if self.projection else None
        if self.projection and getattr(type(conv), "forward", None) not in (nn.Conv2d.forward, nn.Conv3d.forward):
            what = "missing" if conv is None else f"a {type(conv).__name__}"
            return f"{self.projection} is {what}, not a convolution of patches"
        return self.options

    def guarded(self, module: nn.Module) -> "Guarded":
        """The function, and what has to be as it is now for it to be called."""
        paths = (*self.passed_over, self.projection) if self.projection else self.passed_over
        methods = (("", self.method), *((path, "forward") for path in paths))
        methods += tuple(path.rpartition(".")[::2] for path in self.methods)
        stands_for = tuple((path, type(reach(module, path)), name) for path, name in methods)
        return Guarded(self.function, stands_for, self.projection, self.tensors)


class Guarded(NamedTuple):
    """A function in a method's place, called while nobody would notice; the original method at all other times."""

    function: Callable[..., Any]
    stands_for: tuple[tuple[str, type, str], ...]  # paths of modules, their classes, and methods that it does not call
    projection: str
    tensors: tuple[str, ...]

    def replaced(self) -> tuple[Callable[..., Any] | None, ...]:
        """The functions that it stands for, as the classes define them now."""
        return tuple(getattr(cls, name, None) for _, cls, name in self.stands_for)

    def fits(self, module: nn.Module, replaced: tuple[Callable[..., Any] | None, ...]) -> bool:
        """Whether no part and no method was exchanged, hooked or emptied since those were replaced."""
        for (path, _, name), function in zip(self.stands_for, replaced, strict=True):
            part = reach(module, path)
            if _defined(part, name) is not function or (path and name == "forward" and not quiet(part)):
                return False
        if self.projection and not projects_patches(reach(module, self.projection)):
            return False
        for path in self.tensors:
            tensor = reach(module, path)
            if not isinstance(tensor, Tensor) or not tensor.numel():
                return False
        return True


def reach(module: Any, path: str) -> Any:
    """The attribute of an attribute, None where one is missing; the module itself for no path."""
    for name in path.split(".") if path else ():
        module = getattr(module, name, None)
    return module


def _defined(owner: nn.Module | None, name: str) -> Callable[..., Any] | None:
    """The function that its class defines under this name, seen through ours; None where the instance has its own."""
    if owner is None or name in vars(owner):
        return None
    function = getattr(type(owner), name, None)
    original = getattr(function, "mae_kernels_original", None)
    return function if original is None else getattr(original, name)


def fused_class(cls: type, functions: dict[str, Guarded]) -> type:
    """A subclass of cls under the same name, with these methods. Instances copy and pickle as those of cls do."""
    return _fused_class(cls, *((name, guarded, guarded.replaced()) for name, guarded in functions.items()))


def original_class(module: nn.Module) -> type | None:
    """The class that a module had before it became one of a :func:`fused_class`; None if it did not."""
    return getattr(type(module), "mae_kernels_original", None)


@cache
def _fused_class(cls: type, *functions: tuple[str, Guarded, tuple[Callable[..., Any] | None, ...]]) -> type:
    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        # The class cannot be found by its name: pickle would take the original, which has the same.
        make, arguments, *state = super(fused, self).__reduce_ex__(protocol)
        plain = tuple(cls if x is fused else x for x in arguments)
        return (_made, (cls, {name: guarded for name, guarded, _ in functions}, make, plain), *state)

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    methods = {name: _method(cls, name, guarded, replaced) for name, guarded, replaced in functions}
    fused: Any = type(cls.__name__, (cls,), {**names, **methods, "__reduce_ex__": reduce, "mae_kernels_original": cls})
    return fused


def _made(cls: type, functions: dict[str, Guarded], make: Callable[..., Any], arguments: tuple[Any, ...]) -> nn.Module:
    module = make(*arguments)
    module.__class__ = fused_class(cls, functions)
    return module


def _method(
    cls: type, name: str, guarded: Guarded, replaced: tuple[Callable[..., Any] | None, ...]
) -> Callable[..., Any]:
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = guarded.function(self, *args, **kwargs) if guarded.fits(self, replaced) else NotImplemented
        return getattr(cls, name)(self, *args, **kwargs) if result is NotImplemented else result

    # With the signature of the original, by which trainers choose the columns of a data set.
    fused: Any = functools.wraps(getattr(cls, name))(run)
    fused.mae_kernels_original = cls
    return fused
