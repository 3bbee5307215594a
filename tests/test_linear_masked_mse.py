"""Head and loss in one: what the two ops give, gradients included, without predictions of full width."""

import sys

import pytest
import torch
import torch.nn.functional as F
from cases import (
    BF16,
    F16,
    F32,
    F64,
    IMAGE_STRIDES,
    TOKEN_STRIDES,
    cast,
    compare,
    head_inputs,
    in_turn,
    run,
)
from conftest import DEVICE
from torch.utils._python_dispatch import TorchDispatchMode

from mae_kernels import linear_masked_mse, masked_mse, reference

pytestmark = pytest.mark.usefixtures("poisoned_empty", "backend")

U8 = torch.uint8
ALL = ("hidden", "weight", "bias")
MODULE = sys.modules["mae_kernels.linear_masked_mse"]  # in the package the function has its name


@pytest.fixture
def chunks_of(monkeypatch):
    """Sets the number of samples in a chunk: the library's own is far larger than a test can afford."""
    return lambda step: monkeypatch.setattr(MODULE, "chunk_samples", lambda *sizes: step)


def two_ops(hidden, weight, bias, images, ids_mask, **options):
    return masked_mse(F.linear(hidden, weight, bias), images, ids_mask=ids_mask, **options)


def published(hidden, weight, bias, images, ids_mask, **options):
    """The reference, its loss in the precision of ours: half precision must cost no more than the products do."""
    pred = F.linear(hidden, weight, bias)
    pred = pred.to(F64 if pred.dtype == F64 else F32)
    return reference.masked_mse(pred, images, ids_mask=ids_mask, **options)


def check(inputs, grad=1.0, wrt=ALL):
    dtype = F64 if inputs["hidden"].dtype == F64 else F32
    wrt = tuple(name for name in wrt if inputs[name] is not None)
    result = compare(linear_masked_mse, published, inputs, torch.tensor(grad, dtype=dtype), wrt)
    assert result["value"].dtype == dtype
    return result


@pytest.mark.parametrize(
    ("n", "step", "grid", "patch", "c", "d", "masked", "layout", "norm_pix", "bias", "dtype"),
    [
        (1, 1, (1, 1), (8, 8), 1, 1, 1, "channels_last", True, True, F32),
        (1, 4, (5, 7), (14, 14), 3, 24, 26, "channels_first", True, False, F32),
        (3, 1, (7, 7), (8, 8), 4, 100, 17, "channels_last", False, True, F32),
        (3, 2, (7, 7), (8, 16), 3, 64, 17, "channels_last", True, True, F32),
        (5, 2, (3, 4), (8, 8), 13, 192, 3, "channels_first", False, False, F32),
        (5, 5, (3, 4), (16, 16), 3, 512, 3, "channels_last", True, True, F32),
        (7, 3, (2, 3), (8, 8), 3, 33, 6, "channels_last", True, True, F32),
        (5, 2, (3, 4), (8, 8), 3, 64, 9, "channels_last", True, True, F64),
        (5, 2, (3, 4), (8, 8), 3, 64, 9, "channels_first", False, False, F64),
        (5, 2, (3, 4), (16, 16), 3, 192, 5, "channels_last", True, True, BF16),
        (8, 1, (3, 4), (8, 8), 3, 64, 5, "channels_last", False, False, BF16),
        (3, 8, (7, 7), (8, 8), 3, 100, 17, "channels_first", True, True, BF16),
        (5, 2, (3, 4), (16, 16), 3, 192, 5, "channels_last", True, True, F16),
        (8, 1, (3, 4), (8, 8), 3, 64, 5, "channels_first", False, False, F16),
    ],
)
def test_sizes(n, step, grid, patch, c, d, masked, layout, norm_pix, bias, dtype, chunks_of):
    chunks_of(step)
    options = {"masked": masked, "layout": layout, "norm_pix": norm_pix, "dtype": dtype, "bias": bias}
    check(head_inputs(n, grid, patch, c, d, **options))


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_equals_the_two_ops(dtype):
    inputs = head_inputs(3, (2, 3), (8, 8), 3, 24, dtype=dtype, pixels=U8, norm=True)
    ours, theirs = (run(op, inputs, torch.tensor(1.0), ALL) for op in (linear_masked_mse, two_ops))
    assert torch.equal(ours["value"], theirs["value"])  # one chunk: the very same steps
    for name in ALL:
        assert ours[name].dtype == theirs[name].dtype == dtype
        atol = 16 * torch.finfo(dtype).eps * theirs[name].abs().max().item()
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=atol)


@pytest.mark.parametrize(("strides", "step"), in_turn(TOKEN_STRIDES, (2, 3)))
def test_hidden_strides(strides, step, chunks_of):
    chunks_of(step)
    check(head_inputs(3, (2, 3), (4, 4), 3, 24, strides=strides))


def test_weight_and_ids_strides(chunks_of):
    chunks_of(2)
    inputs = head_inputs(3, (2, 3), (8, 8), 3, 24)
    check({**inputs, "weight": inputs["weight"].t().contiguous().t()})
    check({**inputs, "weight": torch.randn(192, 48)[:, ::2] / 5})
    check({**inputs, "bias": torch.randn(()).expand(192)})
    check({**inputs, "ids_mask": inputs["ids_mask"].t().contiguous().t()})


@pytest.mark.parametrize(("image_strides", "pixels"), in_turn(IMAGE_STRIDES, (F32, U8)))
def test_image_strides(image_strides, pixels, chunks_of):
    chunks_of(2)
    check(head_inputs(3, (3, 2), (4, 8), 3, 24, pixels=pixels, image_strides=image_strides, norm=True))


@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize(("dtype", "pixels"), [(F32, U8), (BF16, U8), (F16, U8), (F64, U8), (BF16, F32), (F16, F16)])
def test_pixels_are_normalised_first(dtype, pixels, norm_pix, chunks_of):
    chunks_of(2)
    inputs = head_inputs(3, (3, 2), (4, 8), 3, 24, dtype=dtype, pixels=pixels, norm_pix=norm_pix, norm=True)
    plain = {name: x for name, x in inputs.items() if name not in ("mean", "std")}
    assert not torch.equal(check(inputs)["value"], check(plain)["value"])


@pytest.mark.parametrize("grad", [-0.37, 65536.0])
def test_gradient_of_a_scaled_loss(grad, chunks_of):
    chunks_of(2)
    check(head_inputs(3, (2, 3), (8, 8), 3, 24), grad)


def test_gradients_from_graphs(chunks_of):
    chunks_of(2)

    def expanded(op):
        def run_twice(**kwargs):
            return torch.stack([op(**kwargs), op(**{**kwargs, "norm_pix": False})]).expand(4, 2).sum()

        return run_twice

    inputs = head_inputs(3, (2, 3), (8, 8), 3, 24)
    compare(expanded(linear_masked_mse), expanded(published), inputs, torch.tensor(1.0), ALL)


def products(inputs):
    """Elements of the gradients that each mae_kernels::linear_masked_mse computed, in the order of ALL."""
    sizes = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.mae_kernels.linear_masked_mse.default:
                sizes.append([x.numel() for x in out[1:4]])
            return out

    with Recorder():
        linear_masked_mse(**inputs)
    return sizes


@pytest.mark.parametrize("wrt", [(), ("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("weight", "bias"), ALL])
def test_only_wanted_gradients_are_computed(wrt, chunks_of):
    chunks_of(2)
    inputs = head_inputs(3, (2, 3), (8, 8), 3, 24)
    everything = run(linear_masked_mse, inputs, torch.tensor(1.0), ALL)
    some = run(linear_masked_mse, inputs, torch.tensor(1.0), wrt)
    assert all(torch.equal(some[name], everything[name]) for name in ("value", *wrt))
    leaves = {name: x.clone().requires_grad_() if name in wrt else x for name, x in inputs.items()}
    assert products(leaves) == [[inputs[name].numel() if name in wrt else 0 for name in ALL]]


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_without_gradients_there_is_only_the_loss(without, chunks_of):
    chunks_of(2)
    inputs = head_inputs(3, (2, 3), (8, 8), 3, 24)
    leaves = {name: x.requires_grad_() if name in ALL else x for name, x in inputs.items()}
    expected = linear_masked_mse(**leaves)
    saved = []
    with without(), torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
        assert torch.equal(linear_masked_mse(**leaves), expected)
        assert products(leaves) == [[0, 0, 0]]
    assert not saved


def test_what_is_saved(chunks_of):
    chunks_of(2)
    inputs = head_inputs(3, (2, 3), (8, 8), 3, 24, dtype=BF16)
    leaves = {name: x.requires_grad_() if name in ALL else x for name, x in inputs.items()}
    saved = []

    def keep(x):
        saved.append((x.shape, x.dtype))
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        linear_masked_mse(**leaves)
    assert saved == [((3, 4, 24), BF16), ((192, 24), F32), ((192,), F32), ((), F32)]


def test_backward_twice(chunks_of):
    chunks_of(2)
    inputs = head_inputs(3, (2, 3), (8, 8), 3, 24)
    leaves = [inputs[name].requires_grad_() for name in ALL]
    loss = linear_masked_mse(**inputs)
    first = torch.autograd.grad(3 * loss, leaves, retain_graph=True)
    again = torch.autograd.grad(3 * loss, leaves, retain_graph=True)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    single = torch.autograd.grad(loss, leaves)
    for x, y in zip(first, single, strict=True):
        torch.testing.assert_close(x, 3 * y)


def test_no_gradient_arrives():
    class Drop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    inputs = head_inputs(3, (2, 3), (8, 8), 3, 24)
    leaves = [inputs[name].requires_grad_() for name in ALL]
    Drop.apply(linear_masked_mse(**inputs)).backward()
    assert all(x.grad is None or x.grad.count_nonzero() == 0 for x in leaves)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("half", [(), ("hidden",), ("weight", "bias")], ids=lambda names: " ".join(names) or "none")
def test_autocast(half, dtype, chunks_of):
    chunks_of(2)
    inputs = head_inputs(5, (2, 3), (8, 8), 3, 24, pixels=U8, norm=True)
    inputs |= {name: inputs[name].to(dtype) for name in half}

    def under_autocast(op):
        def run_inside(**kwargs):
            if kwargs["hidden"].dtype == F64:
                return op(**kwargs)
            with torch.autocast(DEVICE, dtype=dtype):
                return op(**kwargs)

        return run_inside

    ops = [under_autocast(op) for op in (linear_masked_mse, published)]
    result = compare(*ops, inputs, torch.tensor(1.0), ALL)
    assert result["value"].dtype == F32
    assert all(result[name].dtype == inputs[name].dtype for name in ALL)
    by_hand = {**inputs, **{name: inputs[name].to(dtype) for name in ALL}}
    assert torch.equal(result["value"], linear_masked_mse(**by_hand))


@pytest.mark.eager
def test_autocast_leaves_float64_alone():
    inputs = head_inputs(3, (2, 3), (8, 8), 3, 24, dtype=F64)
    with torch.autocast(DEVICE, dtype=BF16):
        assert torch.equal(linear_masked_mse(**inputs), linear_masked_mse(**cast(inputs, F64)))


def test_a_float32_bias_of_a_half_precision_head():
    inputs = head_inputs(3, (2, 3), (8, 8), 3, 24, dtype=BF16)
    wide = {**inputs, "bias": inputs["bias"].float()}
    ours, expected = (run(linear_masked_mse, x, torch.tensor(1.0), ALL) for x in (wide, inputs))
    assert torch.equal(ours["value"], expected["value"])
    assert torch.equal(ours["bias"].to(BF16), expected["bias"])


@pytest.mark.parametrize("step", [1, 8])
def test_half_precision_beyond_its_range(step, chunks_of):
    chunks_of(step)
    inputs = head_inputs(8, (2, 3), (8, 8), 3, 24, dtype=F16)
    inputs["hidden"] *= 20
    inputs["bias"] += 400  # every residual, every hidden value: their products sum to more than float16 holds
    inputs["hidden"] += 200
    result = check(inputs)
    assert result["value"].item() > 65504
    assert all(x.isfinite().all() for x in result.values())


@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_pixels_are_not_hidden(value, norm_pix, chunks_of):
    chunks_of(1)
    inputs = head_inputs(2, (2, 3), (8, 8), 3, 24, norm_pix=norm_pix, masked=6)
    inputs["images"][1, 2, 9, 9] = value
    loss = linear_masked_mse(**inputs)
    assert loss.isnan() if norm_pix or value != value else loss.isinf()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_two_runs_are_bitwise_equal(dtype, chunks_of):
    chunks_of(2)
    inputs = head_inputs(5, (2, 3), (8, 8), 3, 64, dtype=dtype, norm=True)
    first, second = (run(linear_masked_mse, inputs, torch.tensor(1.0), ALL) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.eager
@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("layout", ["channels_last", "channels_first"])
def test_gradcheck(layout, norm_pix, chunks_of):
    chunks_of(2)
    inputs = head_inputs(3, (2, 3), (2, 3), 3, 4, layout=layout, norm_pix=norm_pix, dtype=F64, norm=True)
    leaves = [inputs.pop(name).requires_grad_() for name in ALL]
    assert torch.autograd.gradcheck(lambda *args: linear_masked_mse(*args, **inputs), leaves)


def allocations(call):
    """Bytes of each tensor that a call allocates, views of it and writes into it not counted."""
    activities = torch.profiler.supported_activities()
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        call()
    sizes = (e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
    return [size for size in sizes if size > 0]


def test_predictions_never_exist_at_full_width(chunks_of):
    chunks_of(2)
    inputs = head_inputs(8, (3, 4), (8, 8), 3, 24, pixels=U8)
    full = 8 * 9 * 192 * 4
    assert max(allocations(lambda: run(linear_masked_mse, inputs, torch.tensor(1.0), ALL))) <= full / 2
    assert max(allocations(lambda: run(two_ops, inputs, torch.tensor(1.0), ALL))) >= full  # this test would notice


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize(("m", "values"), [(147, 768), (147, 588), (1412, 768), (1, 4), (20000, 4096)])
@pytest.mark.parametrize("n", [1, 2, 9, 10, 32, 257, 4096])
def test_chunks(n, m, values, device_type):
    step = MODULE.chunk_samples(n, m, values, device_type)
    number = -(-n // step)
    assert 1 <= step <= n
    assert step == 1 or step * m * values <= (2**20 if device_type == "cpu" else 2**25)
    assert number * step - n < number  # no chunk lacks more than its share of what the last one lacks
