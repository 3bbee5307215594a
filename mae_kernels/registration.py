"""How an op reaches PyTorch's dispatcher: one schema, one eager implementation, one fake."""

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("mae_kernels", "DEF")


def define(schema: str, *, eager: Callable, fake: Callable) -> torch._ops.OpOverload:
    """Register ``mae_kernels::<name>`` and return its overload.

    The eager implementation serves every device; a kernel registered for one device key takes precedence there.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, _outside_autocast(eager), "CompositeExplicitAutograd")
    torch.library.register_fake(f"mae_kernels::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.mae_kernels, name).default


def differentiable(op: torch._ops.OpOverload, function: type[torch.autograd.Function]) -> None:
    """Give the op itself the gradient of the Function beside it.

    The public functions apply the Function, which torch.func needs. Graphs that hold the bare op, such as exported
    programs, find its gradient here.
    """
    torch.library.register_autograd(op, function.backward, setup_context=function.setup_context, lib=_LIBRARY)


def once(op: torch._ops.OpOverload, *args) -> Tensor | tuple[Tensor, ...]:
    """Call a backward op; differentiating its result, a second derivative, is refused."""
    return _Once.apply(op, *args) if torch.is_grad_enabled() else op(*args)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(op, *args):
        return op(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(f"{ctx.op.name()} cannot be differentiated: second derivatives are not supported")


def _outside_autocast(implementation: Callable) -> Callable:
    # The public functions decide the dtypes; without this, autocast would cast again inside the implementation.
    @wraps(implementation)
    def run(first, *rest):
        device_type = first.device.type
        if not torch.is_autocast_enabled(device_type):
            return implementation(first, *rest)
        with torch.autocast(device_type, enabled=False):
            return implementation(first, *rest)

    return run
