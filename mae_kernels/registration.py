"""How an op reaches PyTorch's dispatcher: one schema, an eager and a Triton implementation, one fake, one gradient."""

from collections.abc import Callable, Sequence
from inspect import Parameter, Signature
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from . import backend

# "mae_kernels" of the installed package. A copy under another name, as get_kernel loads one, has ops of its own.
_NAMESPACE = __package__.replace(".", "_")
_LIBRARY = torch.library.Library(_NAMESPACE, "DEF")


def register_op(
    schema: str,
    *,
    eager: Callable[..., Any],
    fake: Callable[..., Any],
    check: Callable[..., Any] | None = None,
    has_kernels: bool = True,
) -> torch._ops.OpOverload:
    """Register ``<the package>::<name>`` and return its overload.

    Each call takes an implementation as :func:`implementation` does; an op without kernels is made of others. Before
    that, ``check`` refuses wrong values: on a CPU always, elsewhere only with MAE_KERNELS_DEBUG=1, since reading them
    waits for the device.

    The first argument holds the batch. Where that is empty nothing runs: the results have the fake's shapes, and are
    the zeros that a sum over nothing gives.
    """
    name = schema.partition("(")[0]

    def run(first: Tensor, *rest: Any) -> Any:
        if first.shape[0] == 0:
            return tree_map(Tensor.zero_, fake(first, *rest))
        if check is not None and (first.is_cpu or backend.DEBUG):
            check(first, *rest)
        if has_kernels and backend.takes_triton(name, first, *rest):
            return _run_kernels(name, first, *rest)
        return _outside_autocast(eager, first, *rest)

    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_NAMESPACE}::{name}", fake, lib=_LIBRARY)
    return overload(name)


def overload(name: str) -> torch._ops.OpOverload:
    """The registered op of that name."""
    return getattr(getattr(torch.ops, _NAMESPACE), name).default


def implementation(name: str, eager: Callable[..., Any]) -> Callable[..., Any]:
    """Runs the function of that name in ``mae_kernels.kernels`` where a call takes Triton, and the eager one elsewhere.

    For ops that are made of another one, without its checks and the dispatcher.
    """

    def run(first: Tensor, *rest: Any) -> Any:
        if backend.takes_triton(name, first, *rest):
            return _run_kernels(name, first, *rest)
        return _outside_autocast(eager, first, *rest)

    return run


def differentiable(
    op: torch._ops.OpOverload, setup_context: Callable[..., Any], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """Give the op a gradient and return the function that calls it.

    ``backward`` returns the gradients of the op's first arguments; the rest have none. Calls go through a Function,
    which torch.func needs; vmap maps its two ops, sample by sample. Graphs that hold the bare op, such as exported
    programs, find the same gradient there.
    """
    names = [argument.name for argument in op._schema.arguments]
    nothing = [None] * len(names)

    def forward(*args: Any) -> Any:
        return op(*args)

    # torch.compile counts the parameters to know whether forward takes a context.
    parameters = [Parameter(name, Parameter.POSITIONAL_ONLY) for name in names]
    forward.__signature__ = Signature(parameters)  # type: ignore[attr-defined]  # what inspect looks for

    def padded(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        found = backward(ctx, *grads)
        return *found, *nothing[len(found) :]

    members = {"forward": forward, "setup_context": setup_context, "backward": padded}
    members = {name: staticmethod(member) for name, member in members.items()}
    base: Any = torch.autograd.Function
    function = type(base)(op._opname, (base,), {**members, "generate_vmap_rule": True})
    torch.library.register_autograd(op, padded, setup_context=setup_context, lib=_LIBRARY)

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return decomposed(op, *args) if in_onnx_export() else apply(function, *args)
        # Function.apply without two things that only torch.func and torch.compile need, at a third of its cost: it
        # inspects the signature of every call, and the op would ask once more whether to record a gradient.
        with torch._C._AutoDispatchBelowAutograd():
            return super(base, function).apply(*args)

    return call


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)``, whose ctx.needs_input_grad says the truth under torch.compile of torch.func too."""
    return function.apply(*(map(_seen_anew, args) if _is_compiled_in_a_transform() else args))


def _is_compiled_in_a_transform() -> bool:
    return torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _seen_anew(x: Any) -> Any:
    """A view of a tensor, whatever else as it is.

    When torch.func.grad wraps what it differentiates, Dynamo (torch 2.13) notes that it wants no gradient, and the mark
    that it does is set behind that: a Function would compute none. Of a view Dynamo asks anew.
    """
    return x.view_as(x) if isinstance(x, Tensor) else x


def in_onnx_export() -> bool:
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


def decomposed(op: torch._ops.OpOverload, *args: Any) -> Any:
    """The op's result by PyTorch's own ops, which other runtimes know."""
    from . import decompositions

    return decompositions.BY_NAME[op._opname](*args)


def once_differentiable(op: torch._ops.OpOverload, *args: Any) -> Any:
    """Call a backward op; differentiating its result, a second derivative, is refused."""
    return _Once.apply(op, *args) if torch.is_grad_enabled() else op(*args)


def only_needed(
    like: Tensor, needs: list[bool], shapes: Sequence[Sequence[int]], dtypes: list[torch.dtype]
) -> tuple[Tensor, ...]:
    """Memory for each result; of what is not needed an empty tensor, since ops cannot return None."""
    each = zip(needs, shapes, dtypes, strict=True)
    return tuple(like.new_empty(shape, dtype=dtype) if need else like.new_empty(0) for need, shape, dtype in each)


def wants_gradient(x: Tensor | None) -> bool:
    """Whether autograd may ask for the gradient of x. Inside vmap a tensor does not tell: it may."""
    if x is None or not torch.is_grad_enabled():
        return False
    if _is_compiled_in_a_transform():
        x = _seen_anew(x)
    return x.requires_grad or torch._C._functorch.is_batchedtensor(x)


class _Once(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(op: torch._ops.OpOverload, *args: Any) -> Any:
        return op(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(f"{ctx.op.name()} cannot be differentiated: second derivatives are not supported")


def _run_kernels(name: str, first: Tensor, *rest: Any) -> Any:
    from . import kernels  # needs Triton, which machines without a GPU need not have

    implementation = getattr(kernels, name)
    if first.device.type == "cpu" or first.device.index == torch.cuda.current_device():
        return _outside_autocast(implementation, first, *rest)
    with torch.cuda.device(first.device):  # Triton launches on the current device
        return _outside_autocast(implementation, first, *rest)


def _outside_autocast(implementation: Callable[..., Any], first: Tensor, *rest: Any) -> Any:
    # The public functions decide the dtypes; without this, autocast would cast again inside the implementation.
    device_type = first.device.type
    if not torch.is_autocast_enabled(device_type):
        return implementation(first, *rest)
    with torch.autocast(device_type, enabled=False):
        return implementation(first, *rest)
