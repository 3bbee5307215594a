"""The patch embedding: a matrix product on the visible patches, the only op with gradients of five inputs."""

from itertools import chain, combinations

import pytest
import torch
from cases import (
    BF16,
    F16,
    F32,
    F64,
    IMAGE_STRIDES,
    TOKEN_STRIDES,
    compare,
    ids,
    images,
    in_turn,
    mean_std,
    patch_embed_inputs,
    run,
    tokens,
)

from mae_kernels import patch_embed, reference
from mae_kernels.backend import INTERPRETED
from mae_kernels.patch_grid import PatchGrid

pytestmark = pytest.mark.usefixtures("poisoned_empty", "backend")

U8 = torch.uint8
ALL = ("images", "weight", "bias", "pos_embed", "prefix")


def check(inputs, grad_dtype=F32, grad_strides="contiguous", exact=()):
    """Value and every gradient that the inputs have, against the reference."""
    n, d = len(inputs["images"]), len(inputs["weight"])
    num_patches = PatchGrid.of("test", inputs["images"], tuple(inputs["weight"].shape[2:])).num_patches
    r = len(inputs["prefix"]) if inputs.get("prefix") is not None else 0
    k = num_patches if inputs["ids_keep"] is None else inputs["ids_keep"].shape[1]
    wrt = [name for name in ALL if inputs.get(name) is not None and inputs[name].is_floating_point()]
    grad = tokens(n, r + k, d, grad_dtype, grad_strides)
    return compare(patch_embed, reference.patch_embed, inputs, grad, tuple(wrt), exact=exact)


@pytest.mark.parametrize(
    ("n", "grid", "patch", "c", "d", "k", "r", "dtype"),
    [
        (1, (1, 1), (16, 16), 3, 64, None, 0, F32),
        (1, (1, 1), (8, 8), 1, 64, 1, 1, F32),
        (3, (7, 7), (16, 16), 3, 768, 12, 1, F32),
        (3, (7, 7), (8, 16), 4, 100, None, 2, F32),
        (1, (14, 14), (14, 14), 3, 192, 49, 1, F32),
        (3, (14, 14), (8, 8), 13, 64, 20, 0, F32),
        (1, (197, 1), (16, 8), 1, 100, 49, 2, F32),
        (1, (1, 197), (8, 8), 3, 64, None, 1, F32),
        (3, (28, 56), (8, 8), 1, 64, 156, 1, F32),
        (3, (7, 7), (14, 14), 4, 100, 12, 1, F64),
        (1, (5, 3), (8, 16), 13, 64, None, 2, F64),
        (3, (7, 7), (16, 16), 3, 192, 12, 1, BF16),
        (1, (14, 14), (8, 8), 4, 100, None, 0, BF16),
        (3, (7, 7), (8, 8), 3, 64, 12, 1, F16),
    ],
)
def test_sizes(n, grid, patch, c, d, k, r, dtype):
    check(patch_embed_inputs(n, grid, patch, c, d, dtype=dtype, k=k, r=r), dtype)


@pytest.mark.parametrize(
    ("strides", "norm", "k", "pixels", "c"),
    [
        ("contiguous", False, None, F32, 13),
        ("contiguous", False, None, U8, 3),
        ("contiguous", True, 4, F32, 3),
        ("contiguous", True, 4, U8, 1),
        ("contiguous", True, 4, F64, 3),
        ("channels_last", False, 4, U8, 3),
        ("channels_last", False, 4, BF16, 3),
        ("channels_last", True, None, F32, 13),
        ("channels_last", True, None, U8, 1),
        ("channels_last", True, None, U8, 3),
        ("channels_last", True, None, F64, 3),
    ],
)
def test_pixels(strides, pixels, c, norm, k):
    dtype = F32 if pixels == U8 else pixels
    inputs = patch_embed_inputs(3, (3, 4), (8, 14), c, 64, dtype=dtype, pixels=pixels, strides=strides, k=k, norm=norm)
    check(inputs, dtype)


@pytest.mark.parametrize(("strides", "pixels", "k"), in_turn(IMAGE_STRIDES, (F32, U8), (None, 4)))
def test_image_strides(strides, pixels, k):
    check(patch_embed_inputs(3, (3, 2), (8, 16), 3, 64, pixels=pixels, strides=strides, k=k, r=1, norm=True))


def test_the_published_crop():
    inputs = patch_embed_inputs(3, (14, 14), (16, 16), 3, 64, k=49, r=1, norm=True)
    inputs["images"] = images(3, 3, 240, 224)[:, :, 8:232, :]
    check(inputs)


@pytest.mark.parametrize(("strides", "k"), in_turn(TOKEN_STRIDES, (None, 5)))
def test_gradient_strides(strides, k):
    check(patch_embed_inputs(3, (3, 4), (8, 8), 3, 64, k=k, r=1), grad_strides=strides)


@pytest.mark.parametrize("k", [None, 5])
@pytest.mark.parametrize("strides", ["sum", "slice", "permute"])
def test_gradient_strides_without_prefix(strides, k):
    check(patch_embed_inputs(3, (3, 4), (8, 8), 3, 64, k=k, pos=False), grad_strides=strides)


@pytest.mark.parametrize(
    "reduce",
    [
        lambda x: x.sum(),
        lambda x: (torch.cat([x, 2 * x], dim=1)[:, 3:] ** 2).sum(),
        lambda x: (x.permute(2, 0, 1) ** 2).sum(),
        lambda x: (x[:, 1:] ** 2).sum(),
    ],
    ids=["sum", "cat", "permute", "slice"],
)
def test_gradients_from_graphs(reduce):
    def ours(**kwargs):
        return reduce(patch_embed(**kwargs))

    def published(**kwargs):
        return reduce(reference.patch_embed(**kwargs))

    compare(ours, published, patch_embed_inputs(3, (7, 7), (8, 8), 3, 64, k=12, r=1), torch.tensor(1.0), ALL)


def test_parameter_strides():
    inputs = patch_embed_inputs(3, (3, 4), (8, 16), 3, 64, k=5, r=2)
    inputs["weight"] = inputs["weight"].to(memory_format=torch.channels_last)
    inputs["bias"] = torch.randn(128)[::2]
    inputs["pos_embed"] = torch.randn(13, 64)[1:].t().contiguous().t()
    inputs["prefix"] = torch.randn(1, 64).expand(2, 64)
    inputs["ids_keep"] = ids(3, 12, 12).t().contiguous().t()[:, 2:7]
    check(inputs)


@pytest.mark.parametrize("k", [None, 12])
@pytest.mark.parametrize(
    "given", [(), ("bias",), ("pos_embed",), ("prefix",), ("bias", "prefix"), ("pos_embed", "prefix")]
)
def test_optional_arguments(given, k):
    inputs = patch_embed_inputs(3, (7, 7), (8, 8), 3, 64, k=k, r=2)
    check({name: x for name, x in inputs.items() if name in ("images", "weight", "ids_keep", *given)})


def test_tables_with_a_leading_one():
    inputs = patch_embed_inputs(3, (7, 7), (8, 8), 3, 64, k=12, r=2)
    grad = tokens(3, 14, 64)
    flat = run(patch_embed, inputs, grad, ALL)
    inputs |= {name: inputs[name][None] for name in ("pos_embed", "prefix")}
    leading = run(patch_embed, inputs, grad, ALL)
    assert leading["prefix"].shape == (1, 2, 64)
    assert leading["pos_embed"].shape == (1, 49, 64)
    assert all(torch.equal(leading[name].view_as(flat[name]), flat[name]) for name in flat)


def test_prefix_rows_are_copies(backend):
    inputs = patch_embed_inputs(3, (7, 7), (8, 8), 3, 64, k=12, r=2)
    out = patch_embed(**inputs)
    assert torch.equal(out[:, :2], inputs["prefix"].expand(3, 2, 64))
    # The last bits of a product by NumPy, which the interpreter takes, depend on where in it a row stands.
    ulps = 4 if backend == "triton" and INTERPRETED else 0
    allowed = ulps * torch.finfo(F32).eps * out.abs().max().item()
    torch.testing.assert_close(out[:, 2:], patch_embed(**{**inputs, "prefix": None}), rtol=0, atol=allowed)


@pytest.mark.eager
def test_a_patch_alone_and_among_others():
    inputs = patch_embed_inputs(3, (7, 7), (8, 8), 3, 64, k=49, r=0, dtype=F64)
    every, order = patch_embed(**{**inputs, "ids_keep": None}), inputs["ids_keep"]
    torch.testing.assert_close(
        patch_embed(**inputs), every.gather(1, order[..., None].expand(-1, -1, 64)), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize("k", [None, 1])
def test_one_patch_image_is_not_normalised_in_place(c, k):
    inputs = patch_embed_inputs(1, (1, 1), (8, 8), c, 64, k=k, norm=True)  # its patches are a view of the image
    check(inputs)
    inputs["mean"], inputs["std"] = (torch.tensor(inputs[name]) for name in ("mean", "std"))
    check(inputs)


@pytest.mark.parametrize("dtype", [F32, F64, BF16])
def test_mean_and_std_as_tensors(dtype):
    inputs = patch_embed_inputs(3, (3, 4), (8, 16), 3, 64, pixels=U8, k=5, norm=True)
    grad = tokens(3, 5, 64)
    expected = run(patch_embed, inputs, grad, ("weight",))
    inputs["mean"], inputs["std"] = (
        torch.tensor([0.5, 0.25, 0.375], dtype=dtype),
        torch.tensor([0.25, 0.5, 1.0], dtype=dtype),
    )
    check(inputs)
    inputs["mean"], inputs["std"] = ([0.5, 0.25, 0.375], [0.25, 0.5, 1.0])
    exact = run(patch_embed, inputs, grad, ("weight",))
    inputs["mean"], inputs["std"] = (
        torch.tensor(inputs[name], dtype=dtype).view(1, 3, 1, 1) for name in ("mean", "std")
    )
    assert all(torch.equal(x, exact[name]) for name, x in run(patch_embed, inputs, grad, ("weight",)).items())
    assert not torch.equal(exact["value"], expected["value"])


def test_half_precision_pixels_are_normalised_in_float32():
    inputs = patch_embed_inputs(3, (7, 7), (8, 8), 3, 64, dtype=BF16, pixels=U8, k=12, norm=True)
    ready = reference.normalize(inputs["images"], inputs["mean"], inputs["std"], F32).to(BF16)
    same = patch_embed(**{**inputs, "images": ready, "mean": None, "std": None})
    assert torch.equal(patch_embed(**inputs), same)


@pytest.mark.parametrize("k", [None, 12])
def test_mixed_dtypes_promote(k):
    inputs = patch_embed_inputs(3, (7, 7), (8, 8), 3, 64, dtype=BF16, pixels=U8, table=F32, k=k, r=1)
    result = check(inputs, F32)
    assert result["value"].dtype == F32
    assert [result[name].dtype for name in ALL[1:]] == [BF16, BF16, F32, F32]


@pytest.mark.parametrize(("dtype", "table", "out_dtype"), [(BF16, F32, BF16), (F32, F32, BF16), (BF16, BF16, F32)])
@pytest.mark.parametrize("k", [None, 12])
def test_out_dtype(k, dtype, table, out_dtype):
    inputs = patch_embed_inputs(3, (7, 7), (8, 8), 3, 64, dtype=dtype, table=table, k=k, r=1)

    def ours(**kwargs):
        return patch_embed(**kwargs, out_dtype=out_dtype)

    def published(**kwargs):
        out = reference.patch_embed(**kwargs)
        return out if kwargs["weight"].dtype == F64 else out.to(out_dtype)

    result = compare(ours, published, inputs, tokens(3, (k or 49) + 1, 64, out_dtype), ALL)
    assert result["value"].dtype == out_dtype
    assert [result[name].dtype for name in ALL] == [dtype, dtype, dtype, table, table]


def test_out_dtype_without_tables():
    inputs = patch_embed_inputs(3, (7, 7), (8, 8), 3, 64, k=12, pos=False)
    assert torch.equal(patch_embed(**inputs, out_dtype=BF16), patch_embed(**inputs).to(BF16))


@pytest.mark.parametrize("k", [None, 147])
def test_parameter_gradients_are_summed_in_float32(k):
    inputs = patch_embed_inputs(3, (14, 14), (8, 8), 1, 64, dtype=F16, table=F32, k=k, r=1)
    inputs["bias"] = inputs["bias"].float()
    grad = (tokens(3, (k or 196) + 1, 64, F16)) + 1000  # each bias gradient is beyond float16

    def ours(**kwargs):
        return patch_embed(**kwargs, out_dtype=F16)

    result = run(ours, inputs, grad, ("bias", "pos_embed", "prefix"))
    gold = run(
        reference.patch_embed,
        {**inputs, "images": inputs["images"].float(), "weight": inputs["weight"].float()},
        grad.float(),
        ("bias", "pos_embed", "prefix"),
    )
    for name in ("bias", "pos_embed", "prefix"):
        torch.testing.assert_close(result[name], gold[name], rtol=2e-6, atol=0)


def test_gradients_of_some_inputs_only(backend):
    inputs, grad = patch_embed_inputs(2, (3, 4), (8, 16), 3, 64, k=5, r=1), tokens(2, 6, 64)
    full = run(patch_embed, inputs, grad, ALL)
    for wrt in chain.from_iterable(combinations(ALL, size) for size in range(5)):
        leaves = {name: x.detach().requires_grad_(name in wrt) if name in ALL else x for name, x in inputs.items()}
        out = patch_embed(**leaves)
        assert out.requires_grad == bool(wrt)
        if wrt:
            out.backward(grad)
        for name in ALL:
            if name not in wrt:
                assert leaves[name].grad is None
            elif name == "bias" and "weight" not in wrt and backend == "triton":  # otherwise summed beside the weight's
                torch.testing.assert_close(leaves[name].grad, full[name], rtol=1e-6, atol=1e-6)
            else:
                assert torch.equal(leaves[name].grad, full[name])


@pytest.mark.parametrize("strides", ["contiguous", "channels_last"])
def test_hidden_patches_are_not_read(strides):
    inputs = patch_embed_inputs(2, (3, 4), (8, 16), 3, 64, k=5, r=1, strides=strides, norm=True)
    expected = patch_embed(**inputs)
    hidden = torch.ones(2, 12, dtype=torch.bool).scatter_(1, inputs["ids_keep"], False).view(2, 1, 3, 1, 4, 1)
    inputs["images"].unflatten(3, (4, 16)).unflatten(2, (3, 8)).masked_fill_(hidden, float("nan"))
    assert torch.equal(patch_embed(**inputs), expected)
    leaf = inputs["images"].detach().requires_grad_()
    patch_embed(**{**inputs, "images": leaf}).sum().backward()
    g_patches = reference.patchify(leaf.grad, (8, 16))
    assert torch.equal((g_patches == 0).all(dim=2), hidden.view(2, 12))


def test_non_finite_pixels_reach_their_own_token_only():
    inputs = patch_embed_inputs(1, (2, 2), (8, 8), 3, 64, r=1)
    inputs["images"][0, 1, 9, 3] = float("nan")
    assert patch_embed(**inputs).isfinite().all(dim=2).tolist() == [[True, True, True, False, True]]


@pytest.mark.eager
@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("norm", [False, True])
def test_gradcheck(norm, k):
    inputs = patch_embed_inputs(2, (2, 2), (1, 2), 2, 3, dtype=F64, k=k, r=2)
    statistics = mean_std(2) if norm else {}

    def op(images, weight, bias, pos_embed, prefix):
        return patch_embed(images, weight, bias, pos_embed, inputs["ids_keep"], prefix=prefix, **statistics)

    assert torch.autograd.gradcheck(op, tuple(inputs[name].requires_grad_() for name in ALL))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_two_runs_are_bitwise_equal(dtype):
    inputs = patch_embed_inputs(3, (7, 7), (8, 8), 3, 192, dtype=dtype, k=24, r=1, norm=True)
    grad = tokens(3, 25, 192, dtype)
    first, second = (run(patch_embed, inputs, grad, ALL) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.eager
def test_accuracy_at_the_size_of_a_real_batch():
    # With two threads and 1568 rows, a projection that PyTorch has to copy first sums in an order twice as far off.
    threads = torch.get_num_threads()
    torch.set_num_threads(max(2, threads))
    try:
        inputs = patch_embed_inputs(32, (14, 14), (16, 16), 3, 768, k=49, r=1)
        compare(patch_embed, reference.patch_embed, inputs, tokens(32, 50, 768), ("weight", "bias", "prefix"))
    finally:
        torch.set_num_threads(threads)
