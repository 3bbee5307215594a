"""The decoder's input: copies, one addition, and two sums over the batch in the backward pass."""

from itertools import chain, combinations

import pytest
import torch
from cases import BF16, F16, F32, F64, TOKEN_STRIDES, compare, in_turn, run, scatter_inputs, tokens

from mae_kernels import random_masking, reference, scatter_mask_tokens

pytestmark = pytest.mark.usefixtures("poisoned_empty", "backend")

ALL = ("tokens", "mask_token", "pos_embed")
WITHOUT_POS = ("tokens", "mask_token")


@pytest.mark.parametrize(
    ("n", "num_patches", "k", "d", "r", "pos", "dtype"),
    [
        (1, 2, 1, 64, 0, 2, F32),
        (3, 49, 12, 100, 1, 50, F64),
        (3, 196, 49, 192, 1, 197, F32),
        (3, 196, 49, 192, 1, 196, BF16),
        (1, 197, 20, 768, 2, 199, F32),
        (3, 197, 196, 64, 2, 197, F16),
        (1, 1568, 156, 100, 0, 1568, BF16),
        (3, 1568, 157, 64, 1, 1569, F32),
        (3, 49, 1, 64, 2, 51, F64),
        (3, 196, 49, 100, 1, None, F32),
        (1, 197, 49, 192, 0, None, BF16),
        (3, 49, 49, 64, 1, 50, F32),  # nothing masked: the mask token is never used
    ],
)
def test_sizes(n, num_patches, k, d, r, pos, dtype):
    inputs = scatter_inputs(n, num_patches, k, d, r, dtype=dtype, pos=pos)
    # One addition rounds as the reference's does.
    compare(
        scatter_mask_tokens,
        reference.scatter_mask_tokens,
        inputs,
        tokens(n, r + num_patches, d, dtype),
        WITHOUT_POS if pos is None else ALL,
        exact=("value", "tokens"),
    )


def test_every_element_by_hand():
    n, r, num_keep, num_patches = 3, 2, 3, 7
    inputs = scatter_inputs(n, num_patches, num_keep, 5, r, pos=r + num_patches)
    out = scatter_mask_tokens(**inputs)
    x, pos = inputs["tokens"], inputs["pos_embed"]
    for sample in range(n):
        for row in range(r):
            assert torch.equal(out[sample, row], x[sample, row] + pos[row])
        for patch in range(num_patches):
            place = inputs["ids_restore"][sample, patch].item()
            token = x[sample, r + place] if place < num_keep else inputs["mask_token"]
            assert torch.equal(out[sample, r + patch], token + pos[r + patch])


@pytest.mark.parametrize("leading", [(), (1,)])
@pytest.mark.parametrize("rows", [49, 51])
def test_parameters_with_a_leading_one(leading, rows):
    inputs = scatter_inputs(3, 49, 12, 64, 2, pos=rows)
    expected = run(scatter_mask_tokens, inputs, tokens(3, 51, 64, strides="one token"), ALL)
    inputs["mask_token"] = inputs["mask_token"].view(1, 1, 64)
    inputs["pos_embed"] = inputs["pos_embed"].view(*leading, rows, 64)
    grad = tokens(3, 51, 64)
    result = compare(scatter_mask_tokens, reference.scatter_mask_tokens, inputs, grad, ALL, exact=("value", "tokens"))
    assert result["mask_token"].shape == (1, 1, 64)
    assert result["pos_embed"].shape == (*leading, rows, 64)
    assert torch.equal(result["value"], expected["value"])


@pytest.mark.parametrize("strides", TOKEN_STRIDES)
def test_token_strides(strides):
    inputs = scatter_inputs(3, 20, 5, 100, 1, pos=21, strides=strides)
    grad = tokens(3, 21, 100)
    compare(scatter_mask_tokens, reference.scatter_mask_tokens, inputs, grad, ALL, exact=("value", "tokens"))


@pytest.mark.parametrize(("strides", "r", "pos"), in_turn(TOKEN_STRIDES, (2, 1), (20, 21)))
def test_gradient_strides(strides, r, pos):
    inputs = scatter_inputs(3, 20, 5, 100, r, pos=pos)
    grad = tokens(3, r + 20, 100, strides=strides)
    compare(scatter_mask_tokens, reference.scatter_mask_tokens, inputs, grad, ALL, exact=("value", "tokens"))


def test_parameter_strides():
    inputs = scatter_inputs(3, 49, 12, 64, 1)
    inputs["mask_token"] = torch.randn(128)[::2]
    inputs["pos_embed"] = torch.randn(64, 50).t()
    inputs["ids_restore"] = inputs["ids_restore"].t().contiguous().t()
    grad = tokens(3, 50, 64)
    compare(scatter_mask_tokens, reference.scatter_mask_tokens, inputs, grad, ALL, exact=("value", "tokens"))


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
    inputs = scatter_inputs(3, 49, 12, 64, 1, pos=50)

    def ours(**kwargs):
        return reduce(scatter_mask_tokens(**kwargs))

    def published(**kwargs):
        return reduce(reference.scatter_mask_tokens(**kwargs))

    compare(ours, published, inputs, torch.tensor(1.0), ALL, exact=("tokens",))


@pytest.mark.parametrize("rows", [None, 196, 197])
def test_mixed_dtypes_promote(rows):
    inputs = scatter_inputs(3, 196, 49, 64, 1, dtype=BF16, table=F32, pos=rows)
    wrt = WITHOUT_POS if rows is None else ALL
    result = compare(
        scatter_mask_tokens,
        reference.scatter_mask_tokens,
        inputs,
        tokens(3, 197, 64),
        wrt,
        exact=("value", "tokens"),
    )
    assert result["value"].dtype == F32
    assert [result[name].dtype for name in wrt] == [BF16, F32, F32][: len(wrt)]


@pytest.mark.parametrize(("dtype", "table", "out_dtype"), [(F32, F32, BF16), (BF16, F32, BF16), (F16, F16, F32)])
def test_out_dtype(dtype, table, out_dtype):
    inputs = scatter_inputs(3, 196, 49, 64, 1, dtype=dtype, table=table, pos=197)

    def ours(**kwargs):
        return scatter_mask_tokens(**kwargs, out_dtype=out_dtype)

    def published(**kwargs):
        out = reference.scatter_mask_tokens(**kwargs)
        return out if kwargs["tokens"].dtype == kwargs["mask_token"].dtype == F64 else out.to(out_dtype)

    result = compare(ours, published, inputs, tokens(3, 197, 64, out_dtype), ALL)
    assert result["value"].dtype == out_dtype
    assert [result[name].dtype for name in ALL] == [dtype, table, table]


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_parameter_gradients_are_summed_in_float32(dtype):
    inputs = scatter_inputs(3, 196, 49, 64, 1, dtype=dtype, table=F32, pos=197)
    grad = tokens(3, 197, 64, dtype) + 1000  # the masked tokens of one sample sum to 147000: beyond float16

    def ours(**kwargs):
        return scatter_mask_tokens(**kwargs, out_dtype=dtype)

    result = run(ours, inputs, grad, ALL)
    gold = run(reference.scatter_mask_tokens, inputs, grad.double().float(), ALL)
    # float32: 441 terms of nearly equal size, rounded to 24 bits each
    torch.testing.assert_close(result["mask_token"], gold["mask_token"], rtol=2e-6, atol=0)
    torch.testing.assert_close(result["pos_embed"], gold["pos_embed"], rtol=2e-6, atol=0)


@pytest.mark.parametrize("seed", range(3))
def test_mask_token_gradient_of_many_tokens(seed):
    torch.manual_seed(seed)  # in one long chain of additions, 4233 terms lose three bits more than in pairs
    inputs, grad = scatter_inputs(3, 1568, 157, 16, 1), tokens(3, 1569, 16)
    compare(scatter_mask_tokens, reference.scatter_mask_tokens, inputs, grad, WITHOUT_POS)


def test_gradients_of_some_inputs_only():
    inputs, grad = scatter_inputs(3, 49, 12, 64, 1, pos=50), tokens(3, 50, 64)
    full = run(scatter_mask_tokens, inputs, grad, ALL)
    for wrt in chain.from_iterable(combinations(ALL, size) for size in (0, 1, 2)):
        leaves = {name: x.detach().requires_grad_(name in wrt) if name in ALL else x for name, x in inputs.items()}
        out = scatter_mask_tokens(**leaves)
        assert out.requires_grad == bool(wrt)
        if wrt:
            out.backward(grad)
        for name in ALL:
            assert torch.equal(leaves[name].grad, full[name]) if name in wrt else leaves[name].grad is None


def test_undoes_the_selection_of_visible_tokens():
    x, masking = tokens(3, 196, 64), random_masking(3, 196)
    visible = x.gather(1, masking.ids_keep[..., None].expand(-1, -1, 64))
    out = scatter_mask_tokens(visible, torch.full((64,), 7.0), masking.ids_restore, num_prefix=0)
    assert torch.equal(out, x.masked_fill(masking.mask[..., None], 7.0))


def test_non_finite_tokens_stay_where_they_are():
    inputs = scatter_inputs(2, 4, 2, 8, 1, pos=5)
    inputs["tokens"][0, 1] = float("nan")
    out = scatter_mask_tokens(**inputs)
    expected = torch.ones(2, 5, dtype=torch.bool)
    expected[0, 1 + inputs["ids_restore"][0].tolist().index(0)] = False
    assert torch.equal(out.isfinite().all(dim=2), expected)


@pytest.mark.eager
@pytest.mark.parametrize(("r", "rows"), [(0, 5), (1, 6), (2, 5)])
def test_gradcheck(r, rows):
    inputs = scatter_inputs(2, 5, 3, 4, r, dtype=F64, pos=rows)

    def op(x, mask_token, pos_embed):
        return scatter_mask_tokens(x, mask_token, inputs["ids_restore"], pos_embed, num_prefix=r)

    assert torch.autograd.gradcheck(op, tuple(inputs[name].requires_grad_() for name in ALL))


def test_two_runs_are_bitwise_equal():
    inputs, grad = scatter_inputs(3, 196, 49, 192, 1, pos=197), tokens(3, 197, 192)
    first, second = (run(scatter_mask_tokens, inputs, grad, ALL) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
