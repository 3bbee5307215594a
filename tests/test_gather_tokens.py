"""Selecting tokens is a copy, and so is its gradient: both are exact."""

import pytest
import torch
from cases import BF16, F16, F32, F64, TOKEN_STRIDES, compare, ids, run, tokens

from mae_kernels import gather_tokens, reference

pytestmark = pytest.mark.usefixtures("poisoned_empty", "backend")

EXACT = {"wrt": ("tokens",), "exact": ("value", "tokens")}


@pytest.mark.parametrize(
    ("n", "num_tokens", "k", "d", "dtype"),
    [
        (1, 1, 1, 64, F32),
        (3, 49, 12, 100, F64),
        (3, 196, 49, 192, BF16),
        (1, 197, 197, 768, F32),
        (3, 197, 1, 64, F16),
        (1, 1568, 156, 100, BF16),
        (3, 1568, 157, 64, F32),
    ],
)
def test_sizes(n, num_tokens, k, d, dtype):
    inputs = {"tokens": tokens(n, num_tokens, d, dtype), "ids": ids(n, num_tokens, k)}
    compare(gather_tokens, reference.gather_tokens, inputs, tokens(n, k, d, dtype), **EXACT)


@pytest.mark.parametrize("strides", TOKEN_STRIDES)
def test_token_strides(strides):
    inputs = {"tokens": tokens(3, 49, 100, strides=strides), "ids": ids(3, 49, 12)}
    compare(gather_tokens, reference.gather_tokens, inputs, tokens(3, 12, 100), **EXACT)


@pytest.mark.parametrize("strides", TOKEN_STRIDES)
def test_gradient_strides(strides):
    inputs = {"tokens": tokens(3, 49, 100), "ids": ids(3, 49, 12)}
    compare(gather_tokens, reference.gather_tokens, inputs, tokens(3, 12, 100, strides=strides), **EXACT)


def test_id_strides():
    inputs = {"tokens": tokens(3, 49, 64), "ids": ids(3, 49, 49).t().contiguous().t()[:, 1::2]}
    compare(gather_tokens, reference.gather_tokens, inputs, tokens(3, 24, 64), **EXACT)
    inputs["ids"] = ids(1, 49, 12).expand(3, 12)
    compare(gather_tokens, reference.gather_tokens, inputs, tokens(3, 12, 64), **EXACT)


@pytest.mark.parametrize(
    "reduce",
    [
        lambda x: x.sum(),
        lambda x: x.mean(dim=1).sum(),
        lambda x: (torch.cat([x, 2 * x], dim=1)[:, 3:] ** 2).sum(),
        lambda x: (x.permute(2, 0, 1) ** 2).sum(),
        lambda x: (x[:, 1:, ::2] ** 2).sum(),
    ],
    ids=["sum", "mean", "cat", "permute", "slice"],
)
def test_gradients_from_graphs(reduce):
    x, chosen = tokens(3, 49, 64), ids(3, 49, 12)
    grads = []
    for op in (gather_tokens, reference.gather_tokens):
        leaf = x.clone().requires_grad_()
        reduce(op(leaf, chosen)).backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_non_finite_tokens_stay_where_they_are():
    x = tokens(2, 4, 8)
    x[0, 1], x[1, 2] = float("nan"), float("inf")
    out = gather_tokens(x, torch.tensor([[0, 1], [2, 3]]))
    assert torch.equal(out.isfinite().all(dim=2), torch.tensor([[True, False], [False, True]]))


@pytest.mark.eager
def test_gradcheck():
    x = tokens(2, 5, 3, F64).requires_grad_()
    assert torch.autograd.gradcheck(gather_tokens, (x, ids(2, 5, 3)))


def test_two_runs_are_bitwise_equal():
    inputs, grad = {"tokens": tokens(3, 1568, 192), "ids": ids(3, 1568, 392)}, tokens(3, 392, 192)
    first, second = (run(gather_tokens, inputs, grad, ("tokens",)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
