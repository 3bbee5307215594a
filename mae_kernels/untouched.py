"""Which modules a fused path may pass over, and which it must call."""

from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules import module as of_all
from torch.utils.module_tracker import ModuleTracker

# torch.func hands plain tensors in, torch.export the next two. DTensors, quantised tensors and other subclasses have
# products of their own.
_ORDINARY = (nn.Parameter, Tensor, FakeTensor, FunctionalTensor)
_LAYERS = (nn.Linear.forward, nn.Conv2d.forward, nn.LayerNorm.forward)


def quiet(module: nn.Module) -> bool:
    """Whether a call of the module does what its class says and no more: no hook, no forward and tensors of its own."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    if "forward" in module.__dict__:
        return False
    if (of_all._global_forward_hooks or of_all._global_forward_pre_hooks) and _every_call_is_watched():
        return False
    for parameter in module._parameters.values():
        if parameter is not None and type(parameter) not in _ORDINARY:
            return False
    return True


def _every_call_is_watched() -> bool:
    """Whether a hook of all modules does more than PyTorch's FlopCounterMode, which keeps a list of who is running."""
    hooks = (*of_all._global_forward_hooks.values(), *of_all._global_forward_pre_hooks.values())
    return not all(isinstance(getattr(hook, "__self__", None), ModuleTracker) for hook in hooks)


def untouched(*layers: nn.Module) -> bool:
    """Whether nobody would notice that these layers are not called, and their parameters used instead.

    So it is where each runs the forward of ``nn.Linear``, ``nn.Conv2d`` or ``nn.LayerNorm`` and is :func:`quiet`.
    An adapter, a parametrisation, a pruned, quantised or sharded layer, and one with a hook have to be called.
    """
    # Plain loops: a model asks this of a hundred layers in every step, and generators would take twice as long.
    for layer in layers:
        if type(layer).forward not in _LAYERS or layer._parameters.get("weight") is None or not quiet(layer):
            return False
    return True


def projects_patches(layer: nn.Module) -> bool:
    """Whether the layer is an :func:`untouched` convolution, without padding, of patches that lie side by side."""
    return (
        type(layer).forward is nn.Conv2d.forward
        and layer.stride == layer.kernel_size
        and layer.padding == (0, 0)
        and layer.dilation == (1, 1)
        and layer.groups == 1
        and untouched(layer)
    )


def is_own(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether nobody would notice that the module, a ``cls`` by its making, is not called but its parts are."""
    return type(module).forward is cls.forward and quiet(module)
