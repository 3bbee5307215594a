"""The loss: value and gradient in float32 whatever the precision around it, over the masked patches only."""

import pytest
import torch
from cases import (
    BF16,
    F16,
    F32,
    F64,
    IMAGE_STRIDES,
    TOKEN_STRIDES,
    cast,
    compare,
    images,
    loss_inputs,
    run,
    tokens,
)
from torch.utils._python_dispatch import TorchDispatchMode

from mae_kernels import masked_mse, patchify, reference

pytestmark = pytest.mark.usefixtures("poisoned_empty", "backend")

U8 = torch.uint8


def check(inputs, grad=1.0):
    """Against the reference in the precision of the loss: half precision must not cost more than its final rounding."""
    dtype = F64 if inputs["pred"].dtype == F64 else F32
    result = compare(
        masked_mse, reference.masked_mse, inputs, torch.tensor(grad, dtype=dtype), ("pred",), peer=cast(inputs, dtype)
    )
    assert result["value"].dtype == dtype
    assert result["pred"].dtype == inputs["pred"].dtype
    return result


@pytest.mark.parametrize(
    ("n", "grid", "patch", "c", "by", "masked", "layout", "norm_pix", "dtype"),
    [
        (1, (1, 1), (16, 16), 3, "mask", 1, "channels_last", True, F32),
        (1, (1, 1), (8, 8), 1, "ids_mask", 1, "channels_first", True, F32),
        (3, (3, 5), (14, 14), 3, "mask", 11, "channels_last", True, F32),
        (3, (7, 7), (8, 16), 4, "ids_mask", 17, "channels_last", False, F32),
        (1, (7, 7), (16, 16), 3, "ids_mask", 37, "channels_last", True, F32),
        (3, (3, 5), (8, 8), 13, "float mask", 11, "channels_first", True, F32),
        (1, (197, 1), (4, 2), 3, "mask", 100, "channels_first", False, F32),
        (1, (1, 197), (2, 4), 4, "float mask", 196, "channels_last", True, F32),
        (3, (28, 56), (2, 4), 1, "ids_mask", 1412, "channels_last", True, F32),
        (1, (28, 56), (2, 2), 3, "mask", 1, "channels_last", False, F32),
        (3, (3, 5), (14, 14), 3, "ids_mask", 15, "channels_last", True, F32),
        (3, (7, 7), (8, 16), 13, "mask", 37, "channels_last", True, F64),
        (1, (5, 3), (16, 16), 3, "ids_mask", 11, "channels_first", True, F64),
        (3, (3, 5), (16, 16), 3, "mask", 11, "channels_last", True, BF16),
        (3, (5, 3), (16, 8), 4, "ids_mask", 11, "channels_first", False, BF16),
        (1, (14, 14), (8, 8), 3, "mask", 147, "channels_first", True, F16),
        (3, (7, 7), (8, 8), 1, "ids_mask", 37, "channels_last", True, F16),
    ],
)
def test_sizes(n, grid, patch, c, by, masked, layout, norm_pix, dtype):
    check(loss_inputs(n, grid, patch, c, by=by, masked=masked, layout=layout, norm_pix=norm_pix, dtype=dtype))


@pytest.mark.parametrize(
    ("by", "pixels", "layout"),
    [
        ("mask", U8, "channels_first"),
        ("ids_mask", F32, "channels_last"),
    ],
)
@pytest.mark.parametrize("image_strides", IMAGE_STRIDES)
def test_image_strides(image_strides, by, pixels, layout):
    check(
        loss_inputs(3, (3, 2), (4, 8), 3, by=by, pixels=pixels, image_strides=image_strides, layout=layout, norm=True)
    )


@pytest.mark.parametrize(
    ("dtype", "pixels", "c", "norm_pix"),
    [
        (F32, U8, 1, False),
        (F32, U8, 3, True),
        (BF16, U8, 4, False),
        (BF16, U8, 13, True),
        (F64, U8, 3, False),
        (F64, U8, 3, True),
        (BF16, F32, 1, True),
        (F32, F32, 3, False),
        (F32, F32, 4, True),
        (BF16, F32, 13, False),
        (F16, F16, 3, True),
        (F64, F64, 4, False),
    ],
)
def test_pixels_are_normalised_first(dtype, pixels, c, norm_pix):
    inputs = loss_inputs(3, (3, 2), (4, 8), c, dtype=dtype, pixels=pixels, norm_pix=norm_pix, norm=True)
    plain = {name: x for name, x in inputs.items() if name not in ("mean", "std")}
    value = check(inputs)["value"]
    assert not torch.equal(value, check(plain)["value"])
    as_tensors = {name: torch.tensor(inputs[name], dtype=F64 if dtype == F64 else F32) for name in ("mean", "std")}
    assert torch.equal(value, masked_mse(**{**inputs, **as_tensors}))


@pytest.mark.parametrize("by", ["mask", "ids_mask"])
@pytest.mark.parametrize("strides", TOKEN_STRIDES)
def test_pred_strides(strides, by):
    check(loss_inputs(3, (3, 4), (4, 4), 3, by=by, strides=strides))


@pytest.mark.parametrize("by", ["mask", "ids_mask"])
def test_pred_behind_a_class_token(by):
    inputs = loss_inputs(3, (3, 3), (8, 8), 3, by=by)
    full = torch.randn(3, 1 + inputs["pred"].shape[1], 192, requires_grad=True)
    masked_mse(**{**inputs, "pred": full[:, 1:]}).backward()
    expected = run(masked_mse, {**inputs, "pred": full.detach()[:, 1:]}, torch.tensor(1.0), ("pred",))["pred"]
    assert torch.equal(full.grad[:, 1:], expected)
    assert full.grad[:, 0].count_nonzero() == 0


@pytest.mark.parametrize("grad", [1.0, -0.37, 65536.0])
@pytest.mark.parametrize("by", ["mask", "ids_mask"])
def test_gradient_of_a_scaled_loss(by, grad):
    check(loss_inputs(3, (3, 3), (8, 8), 3, by=by), grad)


@pytest.mark.parametrize("by", ["mask", "ids_mask"])
def test_gradients_from_graphs(by):
    inputs = loss_inputs(3, (3, 3), (8, 8), 3, by=by)

    def ours(**kwargs):
        return torch.stack([masked_mse(**kwargs), masked_mse(**{**kwargs, "norm_pix": False})]).expand(4, 2).sum()

    def published(**kwargs):
        first, second = reference.masked_mse(**kwargs), reference.masked_mse(**{**kwargs, "norm_pix": False})
        return torch.stack([first, second]).expand(4, 2).sum()

    compare(ours, published, inputs, torch.tensor(1.0), ("pred",))


def test_backward_twice():
    inputs = loss_inputs(3, (3, 3), (8, 8), 3)
    pred = inputs["pred"].requires_grad_()
    loss = masked_mse(**inputs)
    first, second = (torch.autograd.grad(loss, pred, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_no_gradient_arrives():
    class Drop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    inputs = loss_inputs(3, (3, 3), (8, 8), 3)
    pred = inputs["pred"].requires_grad_()
    Drop.apply(masked_mse(**inputs)).backward()
    assert pred.grad is None or pred.grad.count_nonzero() == 0


@pytest.mark.eager
def test_mask_and_ids_agree():
    by_ids = loss_inputs(3, (7, 7), (8, 8), 3, by="ids_mask", masked=37, dtype=F64)
    chosen = by_ids.pop("ids_mask")
    rows = chosen[..., None].expand(-1, -1, 192)
    full = torch.randn(3, 49, 192, dtype=F64).scatter_(1, rows, by_ids["pred"])
    mask = torch.zeros(3, 49, dtype=torch.bool).scatter_(1, chosen, True)
    first = run(masked_mse, {**by_ids, "ids_mask": chosen}, torch.tensor(1.0, dtype=F64), ("pred",))
    second = run(masked_mse, {**by_ids, "pred": full, "mask": mask}, torch.tensor(1.0, dtype=F64), ("pred",))
    torch.testing.assert_close(first["value"], second["value"], rtol=1e-14, atol=0)
    torch.testing.assert_close(first["pred"], second["pred"].gather(1, rows), rtol=1e-14, atol=0)
    assert second["pred"][~mask].count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.bool, F32, F16, F64])
def test_rows_may_differ_in_their_count(dtype):
    inputs = loss_inputs(3, (3, 3), (8, 8), 3)
    inputs["mask"] = (torch.arange(9) < torch.tensor([[3], [0], [9]])).to(dtype)
    check(inputs)


def test_mask_strides():
    inputs = loss_inputs(3, (3, 3), (8, 8), 3)
    inputs["mask"] = inputs["mask"].t().contiguous().t()
    check(inputs)
    inputs["mask"] = inputs["mask"][:1].expand(3, -1)
    check(inputs)
    by_ids = loss_inputs(3, (3, 3), (8, 8), 3, by="ids_mask", masked=5)
    check({**by_ids, "ids_mask": by_ids["ids_mask"].t().contiguous().t()})


@pytest.mark.parametrize(
    ("dtype", "kind", "norm", "layout", "image_strides"),
    [
        (F32, torch.bool, False, "channels_last", "contiguous"),
        (F32, F32, True, "channels_first", "channels_last"),
        (BF16, torch.bool, True, "channels_first", "channels_last"),
        (BF16, F32, False, "channels_first", "channels_last"),
        (BF16, F32, True, "channels_last", "contiguous"),
    ],
)
def test_nothing_masked_is_zero(dtype, kind, norm, layout, image_strides):
    inputs = loss_inputs(
        3, (3, 3), (8, 8), 3, dtype=dtype, pixels=U8, layout=layout, image_strides=image_strides, norm=norm
    )
    inputs["mask"] = torch.zeros(3, 9, dtype=kind)
    result = run(masked_mse, inputs, torch.tensor(1.0), ("pred",))
    assert result["value"].item() == 0
    assert torch.equal(result["pred"], torch.zeros_like(inputs["pred"]))


@pytest.mark.parametrize("by", ["mask", "ids_mask"])
@pytest.mark.parametrize("layout", ["channels_last", "channels_first"])
def test_nearly_flat_patches(layout, by):
    inputs = loss_inputs(3, (3, 3), (8, 8), 3, by=by, layout=layout)
    inputs["images"] = 2.2 + 1e-3 * (2 * torch.rand_like(inputs["images"]) - 1)  # variance and eps are alike
    check(inputs)


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_flat_patches(dtype):
    inputs = loss_inputs(3, (2, 2), (8, 8), 3, dtype=dtype, pixels=F32)
    inputs["images"].fill_(0.75)  # its mean is exact: the target is zero
    result = check(inputs)
    torch.testing.assert_close(
        result["value"], (inputs["pred"][inputs["mask"]].double() ** 2).mean().float(), rtol=1e-6, atol=0
    )


@pytest.mark.eager
@pytest.mark.parametrize("eps", [1e-6, 1e-2, 1.0])
def test_eps_is_inside_the_root(eps):
    inputs = loss_inputs(1, (1, 1), (8, 8), 1, masked=1, dtype=F64)
    inputs["images"] = torch.tensor([0.5, 1.5], dtype=F64).repeat(1, 1, 8, 4)
    inputs["pred"].zero_()
    variance = 64 / 63 * 0.25  # unbiased
    expected = torch.tensor(0.25 / (variance + eps), dtype=F64)
    torch.testing.assert_close(masked_mse(**inputs, eps=eps), expected, rtol=1e-14, atol=0)
    check(inputs)


def test_half_precision_pred_beyond_its_range():
    inputs = loss_inputs(3, (3, 3), (8, 8), 3, dtype=F16, pixels=U8)
    inputs["pred"] *= 100  # a squared residual alone overflows float16 from 256 on, the sum of a patch at once
    assert check(inputs)["value"].item() > 1000


@pytest.mark.parametrize("by", ["mask", "ids_mask"])
@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_pixels_are_not_hidden(value, norm_pix, by):
    inputs = loss_inputs(2, (3, 4), (8, 8), 3, by=by, norm_pix=norm_pix, masked=12)
    inputs["images"][1, 2, 9, 9] = value
    loss = masked_mse(**inputs)
    assert loss.isnan() if norm_pix or value != value else loss.isinf()


@pytest.mark.parametrize("by", ["mask", "ids_mask"])
def test_visible_patches_are_not_read(by):
    inputs = loss_inputs(2, (3, 4), (8, 8), 3, by=by, masked=5)
    masked = inputs["mask"] if by == "mask" else torch.zeros(2, 12).scatter_(1, inputs["ids_mask"], 1).bool()
    expected = run(masked_mse, inputs, torch.tensor(1.0), ("pred",))
    inputs["images"].unflatten(3, (4, 8)).unflatten(2, (3, 8)).masked_fill_(
        ~masked.view(2, 1, 3, 1, 4, 1), float("nan")
    )
    if by == "mask":
        inputs["pred"][~masked] = float("nan")
    result = run(masked_mse, inputs, torch.tensor(1.0), ("pred",))
    assert all(torch.equal(result[name], expected[name]) for name in expected)


@pytest.mark.parametrize("by", ["mask", "ids_mask"])
@pytest.mark.parametrize("strides", ["contiguous", "channels_last"])
def test_one_patch_image_is_not_normalised_in_place(strides, by):
    inputs = loss_inputs(1, (1, 1), (8, 8), 3, by=by, masked=1, image_strides=strides, norm=True)
    check(inputs)
    inputs["mean"], inputs["std"] = (torch.tensor(inputs[name]) for name in ("mean", "std"))
    check(inputs)
    check({**inputs, "norm_pix": False})


def test_a_perfect_prediction():
    x = images(3, 3, 24, 32)
    mask = torch.arange(12).expand(3, 12) % 2 == 0
    pred = patchify(x, 8).requires_grad_()
    loss = masked_mse(pred, x, patch_size=8, mask=mask, norm_pix=False)
    loss.backward()
    assert loss.item() == 0
    assert pred.grad.count_nonzero() == 0


def residual_sizes(inputs):
    """Elements of the second output of every mae_kernels::masked_mse, the residual kept for the backward pass."""
    sizes = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.mae_kernels.masked_mse.default:
                sizes.append(out[1].numel())
            return out

    with Recorder():
        masked_mse(**inputs)
    return sizes


@pytest.mark.parametrize("by", ["mask", "ids_mask"])
def test_a_residual_is_kept_for_gradients_only(by, backend):
    inputs = loss_inputs(3, (1, 3), (8, 8), 3, by=by)
    with_grad = {**inputs, "pred": inputs["pred"].clone().requires_grad_()}
    assert residual_sizes(with_grad) == [inputs["pred"].numel()]
    fewer_bytes = {**with_grad, "images": images(3, 3, 8, 24, U8)}  # cheaper to read again, for the kernels
    assert residual_sizes(fewer_bytes) == [0 if backend == "triton" else inputs["pred"].numel()]
    assert residual_sizes(inputs) == [0]
    expected = masked_mse(**with_grad)
    with torch.no_grad():
        assert residual_sizes(with_grad) == [0]
        assert torch.equal(masked_mse(**with_grad), expected)
    with torch.inference_mode():
        assert residual_sizes(with_grad) == [0]
        assert torch.equal(masked_mse(**with_grad), expected)


@pytest.mark.eager
@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize(
    ("by", "layout"), [("mask", "channels_last"), ("ids_mask", "channels_first"), ("float mask", "channels_first")]
)
def test_gradcheck(by, layout, norm_pix):
    inputs = loss_inputs(2, (2, 3), (2, 3), 3, by=by, layout=layout, norm_pix=norm_pix, dtype=F64, norm=True)
    pred = inputs.pop("pred").requires_grad_()
    assert torch.autograd.gradcheck(lambda pred: masked_mse(pred, **inputs), (pred,))


@pytest.mark.parametrize("by", ["mask", "ids_mask"])
def test_two_runs_are_bitwise_equal(by):
    inputs = loss_inputs(3, (5, 7), (4, 8), 3, by=by, norm=True)
    inputs["pred"] = tokens(*inputs["pred"].shape)
    first, second = (run(masked_mse, inputs, torch.tensor(1.0), ("pred",)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
