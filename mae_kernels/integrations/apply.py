"""``apply(model)``: the fused ops in a model that somebody else wrote, and ``unapply(model)``, the way back."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from . import hugging_face, lightly, published, timm
from .replacement import Replacement, fused_class, original_class

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
    published class (by their parts, whatever their name; for images, clips or volumes), timm's ``VisionTransformer``
    with patch dropout, and lightly's ``MaskedVisionTransformerTIMM``; alone or anywhere inside a model,
    DistributedDataParallel included.

    Parameters, buffers, their names, hooks, modes and the random stream stay as they are: checkpoints load, optimizers
    made before keep working, the same seed gives the same masks. A module changes its class for a subclass of the same
    name, which copies and pickles. Before that, each method is tried on random input, in training and in evaluation
    mode: where a subclass does something else than the ops, that method is left alone, and the report says so.

    Calls that the ops do not cover run the original code as before: other image sizes, interpolated positions, a mask
    ratio of 0, pixels that are no floating numbers, images that require grad, and parts that were exchanged since or
    have hooks of their own, such as one on ``patch_embed.proj``.

    Args:
        model: with its weights, on any device, in any precision.

    Returns:
        :class:`Report`: what was replaced, and what was left and why.

    Raises:
        ValueError: nothing in the model is known, or none of what is known can be replaced.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"apply: {name} is on the meta device; apply once the weights have their memory")
        if _is_sharded(parameter):
            raise ValueError(f"apply: {name} is sharded; apply before fully_shard")
        if not parameter.numel():
            raise ValueError(f"apply: {name} is empty, as FSDP and ZeRO-3 leave parameters; apply before sharding")
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ValueError(f"apply: {name or 'the model'} is sharded; apply before FullyShardedDataParallel wraps it")
    unapply(model)
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
    original, functions, changes = type(module), {}, {}
    for new in replacements:
        why_not = new.obstacle(module)
        if not why_not:
            tried = {**functions, new.method: new.guarded(module)}
            try:
                cls = fused_class(original, tried)
            except TypeError as error:  # of an __init_subclass__ that asks for more
                why_not = f"no class can be derived from {original.__name__}: {error}"
            else:
                why_not = _difference(module, new, cls)
        if not why_not:
            functions = tried
        if not why_not or new.method not in changes:  # of several for one method, the first one's reason stays
            changes[new.method] = Change(name, new.method, new.ops, why_not)
    if functions:
        module.__class__ = fused_class(original, functions)
    return list(changes.values())


def _difference(module: nn.Module, new: Replacement, cls: type) -> str:
    """Why the method of cls may not be taken: what it does differently on random input; empty if it does the same."""
    original, tried = type(module), 0
    for training in (True, False):
        try:
            expected = _try(module, getattr(original, new.method), new.example, training)
        except Exception as error:  # of somebody else's code: any
            return f"the original fails on random input: {_sentence(error)}"
        try:
            module.__class__ = cls
            ours = _try(module, new.function, new.example, training)
        except Exception as error:
            return f"the ops do not cover it: {_sentence(error)}"
        finally:
            module.__class__ = original
        if ours.results[0] is not NotImplemented:
            tried += 1
            difference = _compare(ours, expected)
            if difference:
                return f"{difference} in {'training' if training else 'evaluation'}"
    return "" if tried else "the ops do not cover its options"


class _Trial(NamedTuple):
    results: list[Any]
    random: list[Tensor]  # a number from each random stream, which must have come as far
    assigned: set[tuple[int, str]]  # attributes that were set meanwhile: the number of the part, and the name
    buffers: list[Tensor]


@torch.no_grad()
def _try(
    module: nn.Module, method: Callable[..., Any], example: Callable[[], tuple[Any, ...]], training: bool
) -> _Trial:
    """Call the method; then everything is as it was: random streams, modes, attributes, buffers. No hook sees it."""
    parts = list(module.modules())
    before = [(vars(part).copy(), part._buffers.copy()) for part in parts]
    values = [(x, x.clone()) for x in module.buffers()]
    try:
        for part in parts:
            part.training = training
            part._forward_hooks, part._forward_pre_hooks = OrderedDict(), OrderedDict()
        quiet = [vars(part).copy() for part in parts]
        gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(gpus), _full_float32():
            results = tree_leaves(method(module, *example()))
            random = [torch.rand((), device=next(module.parameters()).device), torch.rand(())]
        assigned = {
            (i, name)
            for i, (part, old) in enumerate(zip(parts, quiet, strict=True))
            for name, value in vars(part).items()
            if name not in old or value is not old[name]
        }
        return _Trial(results, random, assigned, [x.clone() for x in module.buffers()])
    finally:
        for part, (attributes, buffers) in zip(parts, before, strict=True):
            vars(part).clear()
            vars(part).update(attributes)
            part._buffers.clear()
            part._buffers.update(buffers)
        for x, value in values:
            x.copy_(value)


def _compare(ours: _Trial, expected: _Trial) -> str:
    if len(ours.results) != len(expected.results):
        return f"it returns {len(expected.results)} values, not {len(ours.results)},"
    for x, y in zip(ours.results, expected.results, strict=True):
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            continue
        if x.shape != y.shape or x.dtype != y.dtype:
            return f"it returns {y.dtype} {tuple(y.shape)}, not {x.dtype} {tuple(x.shape)},"
        if not x.is_floating_point():
            if not torch.equal(x, y):
                return "it chooses other patches"
            continue
        error, norm = (x.double() - y.double()).norm().item(), y.double().norm().item()
        if not error <= _TOLERANCE[y.dtype] * norm:  # NaN included
            return f"its result is {error / max(norm, 1e-30):.0e} away from that of the ops"
    if not all(map(torch.equal, ours.random, expected.random)):
        return "it draws other random numbers"
    if ours.assigned != expected.assigned:
        return f"it sets {', '.join(sorted(name for _, name in ours.assigned ^ expected.assigned))}"
    if not all(map(torch.equal, ours.buffers, expected.buffers)):
        return "it changes buffers"
    return ""


# Where PyTorch keeps a precision of float32 products, outermost first: "none" is the precision of the level above.
_LEVELS = (
    ("generic", "all"), ("cuda", "all"), ("mkldnn", "all"),
    ("cuda", "matmul"), ("mkldnn", "matmul"), ("mkldnn", "conv"),
)  # fmt: skip


@contextmanager
def _full_float32() -> Iterator[None]:
    # A convolution in TF32, cuDNN's default, is further from one in float32 than a wrong variance. cuDNN is left out
    # altogether, because PyTorch cannot return to that default once another precision was set.
    read, write = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
    cudnn, before = torch.backends.cudnn.enabled, []
    for level in _LEVELS:
        before.append(read(*level))  # its own value, since those above are "none" by now
        write(*level, "none")
    matmul = torch.get_float32_matmul_precision()  # kept beside the levels, and refused where they contradict it
    try:
        torch.backends.cudnn.enabled = False
        torch.set_float32_matmul_precision("highest")
        yield
    finally:
        torch.backends.cudnn.enabled = cudnn
        torch.set_float32_matmul_precision(matmul)  # which writes to the levels of matmul
        for level, value in zip(_LEVELS, before, strict=True):
            write(*level, value)


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _is_sharded(parameter: Tensor) -> bool:
    return hasattr(parameter, "placements")  # a DTensor


def _nothing_known(model: nn.Module) -> str:
    lines = [f"apply: nothing in {type(model).__name__} is known. Looked for:"]
    lines += [f"  {family.LOOKED_FOR}" for family in _FAMILIES]
    lines.append(f"Of a published-style model it lacks: {', '.join(published.missing(model))}")
    return "\n".join(lines)
