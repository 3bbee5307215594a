"""How an op reaches PyTorch's dispatcher: one schema, one eager implementation, one fake."""

from collections.abc import Callable
from functools import wraps

import torch

_LIBRARY = torch.library.Library("mae_kernels", "DEF")


def define(schema: str, *, eager: Callable, fake: Callable) -> torch._ops.OpOverload:
    """Register ``mae_kernels::<name>`` and return its overload.

    The eager implementation serves every device; a kernel registered for one device key takes precedence there.
    The op has no autograd of its own: the ``torch.autograd.Function`` beside it calls it with gradients disabled,
    so that compilers and selective checkpointing see the op and the host pays for the dispatcher only once.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, _outside_autocast(eager), "CompositeExplicitAutograd")
    torch.library.register_fake(f"mae_kernels::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.mae_kernels, name).default


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
