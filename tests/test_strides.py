"""Every tensor that reaches an op in every layout of memory: graphs and exported programs call the ops directly."""

from collections.abc import Iterator

import pytest
import torch
from cases import F64, OPS_BY_NAME, assert_no_worse, dispatcher_calls, run
from conftest import DEVICE
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from mae_kernels import use_backend

pytestmark = pytest.mark.usefixtures("backend")

CROP = torch.ops.mae_kernels.random_resized_crop


def small(op, args):
    """At most two samples, and crops of a few pixels in two channels: the interpreter takes its time."""
    if op is CROP:
        pictures, starts, sizes, boxes, flips = (x if x is None else x[:2] for x in args[:-1])
        boxes[:, 2:].clamp_(max=3)
        return [pictures if starts is not None else pictures[:, :2], starts, sizes, boxes, flips, [2, 5]]
    return [x[:2] if isinstance(x, Tensor) and x.ndim > 1 and len(x) == 3 else x for x in args]


with torch.random.fork_rng(devices=()):
    torch.manual_seed(0)
    CALLS = [
        pytest.param(
            op, small(op, args), id=f"{i} {op.__name__}",
            marks=pytest.mark.eager if any(isinstance(x, Tensor) and x.dtype == F64 for x in args) else (),
        )
        for i, (op, *args) in enumerate(dispatcher_calls())
    ]  # fmt: skip


def poison(x: Tensor, *shape: int) -> Tensor:
    """Memory in the dtype of x that spoils whatever is computed from it."""
    if x.dtype == torch.bool:
        return x.new_ones(shape)
    return x.new_full(shape, float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max)


def every_second(x: Tensor) -> Tensor:
    buffer = poison(x, *x.shape[:-1], 2 * x.shape[-1])[..., ::2]
    return buffer.copy_(x)


def transposed(x: Tensor) -> Tensor:
    order = tuple(reversed(range(x.ndim)))
    return x.permute(order).contiguous().permute(order)


def inside_a_buffer(x: Tensor) -> Tensor:
    before = 1025  # an odd number: the pointer is not aligned to more than one element
    buffer = poison(x, x.numel() + 2 * before)[before : before + x.numel()].view(x.shape)
    return buffer.copy_(x)


def layouts(op, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Tensors of the shape of x. Ids, boxes and sizes are repeated over samples alone, and stay valid."""
    for dim in range(1 if x.dtype == torch.int64 else x.ndim):
        if x.shape[dim] > 1:
            first = x.amin(dim, keepdim=True) if op is CROP else x.narrow(dim, 0, 1)
            yield f"stride 0 in dimension {dim}", first.expand_as(x)
    yield "inside a buffer", inside_a_buffer(x)
    if x.ndim:
        yield "every second value", every_second(x)
    if x.ndim > 1:
        yield "transposed", transposed(x)


def results(op, args) -> list[Tensor]:
    return tree_leaves(op(*args))


def in_float64(args):
    args = tree_map(lambda x: F64 if isinstance(x, torch.dtype) else x, args)
    return [x.to(F64) if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]


def assert_same(ours: Tensor, eager: Tensor, gold: Tensor, name: str) -> None:
    assert ours.dtype == eager.dtype, name
    assert ours.shape == eager.shape, name
    if ours.dtype == torch.uint8:  # a sum halfway between two levels may be rounded either way
        assert (ours.int() - eager.int()).abs().max() <= 1, name
    elif not ours.is_floating_point() or "gather" in name:
        assert torch.equal(ours, eager), name
    elif ours.numel():
        assert_no_worse(ours, eager, gold, name)


@pytest.mark.parametrize(("op", "args"), CALLS)
def test_every_layout_of_every_argument(op, args):
    """Held against the eager implementation on contiguous copies of the same values."""
    args = [x.to(DEVICE) if isinstance(x, Tensor) else x for x in args]
    contiguous = tree_map(lambda x: x.contiguous() if isinstance(x, Tensor) else x, args)
    for i, argument in enumerate(args):
        if not isinstance(argument, Tensor):
            continue
        for layout, x in layouts(op, argument):
            contiguous[i] = x.contiguous()
            with use_backend("eager"):
                eager, gold = results(op, contiguous), results(op, in_float64(contiguous))
            ours = results(op, [*args[:i], x, *args[i + 1 :]])
            for j, result in enumerate(zip(ours, eager, gold, strict=True)):
                assert_same(*result, f"{op.__name__}, argument {i} with {layout}, result {j}")
        contiguous[i] = argument.contiguous()


@pytest.mark.parametrize("name", ["embed", "loss, mask", "head and loss"])
@pytest.mark.parametrize("layout", ["one value", "column of a table", "shape [1, C, 1, 1]"])
def test_mean_and_std_of_any_layout(name, layout):
    op, build, wrt = OPS_BY_NAME[name]
    inputs = build(1)
    if layout == "one value":
        given = {"mean": torch.tensor([0.5]).expand(3), "std": torch.tensor([0.25]).expand(3)}
    else:
        given = {key: every_second(torch.tensor(inputs[key])) for key in ("mean", "std")}
    expected_inputs = inputs | {key: x.contiguous() for key, x in given.items()}
    if layout == "shape [1, C, 1, 1]":
        given = {key: x[None, :, None, None] for key, x in given.items()}
    grad = torch.randn_like(op(**expected_inputs))
    ours, expected = run(op, inputs | given, grad, wrt), run(op, expected_inputs, grad, wrt)
    for key, x in expected.items():
        assert x.isfinite().all()
        assert torch.equal(ours[key], x), key
