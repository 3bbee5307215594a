"""``apply(model)``: the fused ops in a model that somebody else wrote, and ``unapply(model)``, the way back."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mae_kernels.integrations import hugging_face, lightly, published, timm
from mae_kernels.integrations.replacement import Replacement, fused_class, original_class

_FAMILIES = (hugging_face, published, timm, lightly)

# Largest error of a replaced method, relative to the norm of the original's result. Both compute in that dtype, in
# another order; the losses, where a variance with another divisor hides at 1e-3, always in float32 at least.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}


class Change(NamedTuple):
    """One method of one module."""

    module: str  # its path in the model, "" for the model itself
    method: str
    ops: tuple[str, ...]  # of mae_kernels, that run instead
    why_not: str = ""  # the reason, where it was left alone

    def __str__(self) -> str:
        where = f"{self.module}.{self.method}" if self.module else self.method
        return f"{where}: {self.why_not or ', '.join(self.ops)}"


class Report(NamedTuple):
    """What :func:`apply` did; print it."""

    replaced: tuple[Change, ...]
    left: tuple[Change, ...]

    def __str__(self) -> str:
        lines = [f"replaced  {change}" for change in self.replaced] + [f"left      {change}" for change in self.left]
        return "\n".join(lines)


def apply(model: nn.Module) -> Report:
    """Make a model that you already have run on the fused ops, in place.

    Known are Hugging Face's ``ViTMAEForPreTraining`` and ``ViTMAEModel`` (transformers 4 and 5), models built like the
    published class (by their parts, whatever their name), timm's ``VisionTransformer`` with patch dropout, and
    lightly's ``MaskedVisionTransformerTIMM``; alone or anywhere inside a model, DistributedDataParallel included.

    Parameters, buffers, their names, hooks, modes and the random stream stay as they are: checkpoints load, optimizers
    made before keep working, the same seed gives the same masks. A module changes its class for a subclass of the same
    name, which copies and pickles. Before that, each method is tried on random input, in training and in evaluation
    mode: where a subclass does something else than the ops, that method is left alone, and the report says so.

    Calls that the ops do not cover run the original code as before: other image sizes, interpolated positions, a mask
    ratio of 0, images that require grad, and parts with hooks of their own, such as one on ``patch_embed.proj``.

    Args:
        model: with its weights, on any device, in any precision.

    Returns:
        :class:`Report`: what was replaced, and what was left and why.

    Raises:
        ValueError: nothing in the model is known, or none of what is known can be replaced.
    """
    unapply(model)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"apply: {name} is on the meta device; apply once the weights have their memory")
        if _is_sharded(parameter):
            raise ValueError(f"apply: {name} is sharded; apply before fully_shard")
    changes = []
    for name, module in model.named_modules():
        for family in _FAMILIES:
            changes += _replace(name, module, family.replacements(module))
    replaced = tuple(change for change in changes if not change.why_not)
    left = tuple(change for change in changes if change.why_not)
    if not changes:
        raise ValueError(_nothing_known(model))
    if not replaced:
        raise ValueError("apply: nothing was replaced:\n  " + "\n  ".join(map(str, left)))
    return Report(replaced, left)


def unapply(model: nn.Module) -> None:
    """Give every module of the model its original class back. Nothing else had changed.

    Args:
        model: any; one without applied modules is left as it is.

    Raises:
        ValueError: a module was sharded since; its class is FSDP's.
    """
    for name, module in model.named_modules():
        original = original_class(module)
        if original is not None:
            if "mae_kernels_original" not in vars(type(module)):
                raise ValueError(f"unapply: {name or 'the model'} has become a {type(module).__name__} since")
            module.__class__ = original


def _replace(name: str, module: nn.Module, replacements: list[Replacement]) -> list[Change]:
    original, functions, changes = type(module), {}, []
    for new in replacements:
        tried = {**functions, new.method: new.function}
        why_not = _difference(module, new, fused_class(original, tried))
        if not why_not:
            functions = tried
        changes.append(Change(name, new.method, new.ops, why_not))
    if functions:
        module.__class__ = fused_class(original, functions)
    return changes


def _difference(module: nn.Module, new: Replacement, cls: type) -> str:
    """Why the method of cls may not be taken: what it does differently on random input; empty if it does the same."""
    if new.method in vars(module):
        return f"the method {new.method} was set on the instance"
    original, tried = type(module), 0
    with torch.no_grad(), _undisturbed(module):
        for training in (True, False):
            for part in module.modules():
                part.training = training
            try:
                expected = _outcome(module, getattr(original, new.method), new.example)
            except Exception as error:  # of somebody else's code: any
                return f"the original fails on random input: {_sentence(error)}"
            try:
                module.__class__ = cls
                ours = _outcome(module, new.function, new.example)
            except Exception as error:
                return f"the ops do not cover it: {_sentence(error)}"
            finally:
                module.__class__ = original
            if ours[0] is not NotImplemented:
                tried += 1
                difference = _compare(ours, expected)
                if difference:
                    return f"{difference} in {'training' if training else 'evaluation'}"
    return "" if tried else "the ops do not cover its options"


def _outcome(module: nn.Module, method: Callable, example: Callable[[], tuple]) -> list[Any]:
    """What the method returns, flat, and a random number of each stream, which must have come as far."""
    with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        result = tree_leaves(method(module, *example()))
        return [*result, torch.rand((), device=next(module.parameters()).device), torch.rand(())]


def _compare(ours: list[Any], expected: list[Any]) -> str:
    if len(ours) != len(expected):
        return f"it returns {len(expected)} tensors, not {len(ours)},"
    for x, y in zip(ours[:-2], expected[:-2], strict=True):
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            continue
        if x.shape != y.shape or x.dtype != y.dtype:
            return f"it returns {y.dtype} {tuple(y.shape)}, not {x.dtype} {tuple(x.shape)},"
        if not x.is_floating_point():
            if not torch.equal(x, y):
                return "it chooses other patches"
            continue
        error = ((x.double() - y.double()).norm() / y.double().norm()).item()
        if not error <= _TOLERANCE[y.dtype]:  # NaN included
            return f"its result is {error:.0e} away from that of the ops"
    return (
        ""
        if all(torch.equal(x, y) for x, y in zip(ours[-2:], expected[-2:], strict=True))
        else ("it draws other random numbers")
    )


@contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """Modes, buffers and hooks of the module and its parts are afterwards as they were; no hook sees the trial."""
    parts = list(module.modules())
    modes = [part.training for part in parts]
    buffers = [(x, x.clone()) for x in module.buffers()]
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    hooks = [(part, kind, getattr(part, kind)) for part in parts for kind in kinds]
    try:
        for part, kind, held in hooks:
            setattr(part, kind, type(held)())
        yield
    finally:
        for part, kind, held in hooks:
            setattr(part, kind, held)
        for x, saved in buffers:
            x.copy_(saved)
        for part, mode in zip(parts, modes, strict=True):
            part.training = mode


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _is_sharded(parameter: Tensor) -> bool:
    return hasattr(parameter, "placements")  # a DTensor


def _nothing_known(model: nn.Module) -> str:
    lines = [f"apply: nothing in {type(model).__name__} is known. Looked for:"]
    lines += [f"  {family.LOOKED_FOR}" for family in _FAMILIES]
    lines.append(f"Of a published-style model it lacks: {', '.join(published.missing(model))}")
    return "\n".join(lines)
