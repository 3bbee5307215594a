"""Which modules a fused path may pass over, and which it must call."""

from typing import TypeGuard, TypeVar

from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules import module as of_all
from torch.utils.module_tracker import ModuleTracker

_Module = TypeVar("_Module", bound=nn.Module)

# torch.func hands plain tensors in, torch.export the next two. DTensors, quantised tensors and other subclasses have
# products of their own.
_ORDINARY = (nn.Parameter, Tensor, FakeTensor, FunctionalTensor)
_OF_EVERY_MODULE = (
    of_all._global_forward_hooks,
    of_all._global_forward_pre_hooks,
    of_all._global_backward_hooks,
    of_all._global_backward_pre_hooks,
)
_METHODS = ("forward", "_conv_forward")  # that somebody may set on an instance


def untouched(module: nn.Module, cls: type[_Module]) -> TypeGuard[_Module]:
    """Whether nobody would notice that the module, a ``cls`` by its making, is not called, and its parts used instead.

    An adapter, a parametrisation, a subclass, a pruned, quantised or sharded layer, and one with a hook have to be
    called.
    """
    return type(module) is cls and quiet(module)


def quiet(module: nn.Module) -> bool:
    """Whether a call of the module does what its class says and no more: no hook, no forward and tensors of its own."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    for name in _METHODS:
        if name in module.__dict__:
            return False
    # Plain loops: a model asks this of a hundred layers in every step, and generators would take twice as long.
    for name, parameter in module._parameters.items():
        if type(parameter) not in _ORDINARY and (parameter is not None or name == "weight"):
            return False
    return not (any(_OF_EVERY_MODULE) and _every_call_is_watched())


def _every_call_is_watched() -> bool:
    """Whether a hook of all modules does more than PyTorch's FlopCounterMode, which keeps a list of who is running."""
    hooks = [hook for hooks in _OF_EVERY_MODULE for hook in hooks.values()]
    return not all(isinstance(getattr(hook, "__self__", None), ModuleTracker) for hook in hooks)


def projects_patches(layer: nn.Module) -> TypeGuard[nn.Conv2d | nn.Conv3d]:
    """Whether the layer is a :func:`quiet` convolution, without padding, of patches that lie side by side."""
    return (
        (type(layer) is nn.Conv2d or type(layer) is nn.Conv3d)
        and quiet(layer)
        and layer.stride == layer.kernel_size
        and layer.padding == (0,) * len(layer.stride)
        and layer.dilation == (1,) * len(layer.stride)
        and layer.groups == 1
    )
