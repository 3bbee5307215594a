"""Select tokens of each sample by id."""

from typing import Any

import torch
from torch import Tensor

from . import checks
from .registration import differentiable, once_differentiable, register_op
from .rows import as_rows, row_ids, without_padding


def gather_tokens(tokens: Tensor, ids: Tensor) -> Tensor:
    """Select tokens of each sample: ``out[n, k] = tokens[n, ids[n, k]]``.

    Args:
        tokens: ``[N, L, D]`` floating; N may be 0. Slices such as ``x[:, 1:]`` are read in place.
        ids: ``[N, K]`` int64, unique in each row: the gradient is a gather too, without accumulation. Of -1, which is
            no token, comes a row of zeros.

    Returns:
        ``[N, K, D]`` in the dtype of tokens, differentiable in tokens.

    Raises:
        TypeError, ValueError: see the message. Ids are checked on the CPU, elsewhere with ``MAE_KERNELS_DEBUG=1``.

    Equivalent PyTorch: ``torch.gather(tokens, 1, ids[..., None].expand(-1, -1, D))``.
    """
    op = "gather_tokens"
    checks.tensor(op, "tokens", tokens, ("N", "L", "D"))
    checks.floating(op, "tokens", tokens)
    checks.not_empty(op, "tokens", tokens, batch=True)
    checks.ids(op, "ids", ids, tokens.shape[0], tokens.shape[1])
    checks.same_device(op, "tokens", tokens, ids=ids)
    return _call(tokens, ids)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tokens, ids = inputs
    ctx.save_for_backward(ids)
    ctx.num_tokens = tokens.shape[1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (ids,) = ctx.saved_tensors
    return (once_differentiable(_gather_tokens_backward, grad, ids, ctx.num_tokens),)


def _check(tokens: Tensor, ids: Tensor) -> None:
    checks.id_values("gather_tokens", "ids", ids, tokens.shape[1])


def _gather_tokens_eager(tokens: Tensor, ids: Tensor) -> Tensor:
    table, step = as_rows(tokens)
    ids, padding = without_padding(ids)
    out = table.index_select(0, row_ids(ids, step)).view(*ids.shape, -1)
    return out if padding is None else out.masked_fill_(padding, 0)


def _gather_tokens_fake(tokens: Tensor, ids: Tensor) -> Tensor:
    return tokens.new_empty((*ids.shape, tokens.shape[2]))


def gather_tokens_backward_eager(grad: Tensor, ids: Tensor, num_tokens: int) -> Tensor:
    n, k, d = grad.shape
    # Every row of the result is one row of the gradient, or the one row of zeros behind them.
    table = grad.new_empty((n * k + 1, d))
    table[:-1].view(n, k, d).copy_(grad)
    table[-1] = 0
    source = torch.full((n, 1 + num_tokens), n * k, device=ids.device)  # the first of each row is for ids of -1
    source.scatter_(1, ids + 1, torch.arange(n * k, device=ids.device).view(n, k))
    return table.index_select(0, source[:, 1:].flatten()).view(n, num_tokens, d)


def _gather_tokens_backward_fake(grad: Tensor, ids: Tensor, num_tokens: int) -> Tensor:
    return grad.new_empty((grad.shape[0], num_tokens, grad.shape[2]))


_gather_tokens = register_op(
    "gather_tokens(Tensor tokens, Tensor ids) -> Tensor",
    eager=_gather_tokens_eager,
    fake=_gather_tokens_fake,
    check=_check,
)
_gather_tokens_backward = register_op(
    "gather_tokens_backward(Tensor grad, Tensor ids, SymInt num_tokens) -> Tensor",
    eager=gather_tokens_backward_eager,
    fake=_gather_tokens_backward_fake,
)
_call = differentiable(_gather_tokens, _setup_context, _backward)
