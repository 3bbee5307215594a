"""Softmax attention: PyTorch's fused kernels, but for their backward in half precision on CPUs."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mae_kernels.registration import apply, once_differentiable

# Scores of one chunk stay in the cores' L2 caches.
CHUNK_BYTES = 2 * 2**20


def attention(packed: Tensor, queries: Tensor | None = None, keys: Tensor | None = None) -> Tensor:
    """``softmax(q k' / sqrt(d)) v`` for each sample and head.

    Args:
        packed: ``[N, T, 3, heads, d]`` queries, keys and values, or ``[N, T, 2, heads, d]`` keys and values.
        queries: ``[N, S, heads, d]`` in the second case: attention of S tokens to all T.
        keys: ``[N, T]`` bool, True for tokens that are attended to, at least one in each row; None for all.

    Returns:
        ``[N, S, heads, d]``, S = T in the first case. Nothing of the size S x T outlives the call: the backward
        computes the scores again.
    """
    if packed.device.type == "cpu" and packed.dtype in (torch.bfloat16, torch.float16) and packed.requires_grad:
        return apply(_Attention, packed, queries, keys)
    return _fused(packed, queries, keys)


def _fused(packed: Tensor, queries: Tensor | None, keys: Tensor | None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in _split(packed, queries))  # each [N, heads, T, d]
    if packed.shape[0] == 0:  # cuDNN, which PyTorch takes in half precision on Hopper, returns no tensor then
        return ((q @ k.transpose(2, 3)).softmax(3) @ v).transpose(1, 2)
    keys = None if keys is None else keys[:, None, None]  # of every head and query
    return F.scaled_dot_product_attention(q, k, v, keys).transpose(1, 2)


def _split(packed: Tensor, queries: Tensor | None) -> tuple[Tensor, ...]:
    return packed.unbind(2) if queries is None else (queries, *packed.unbind(2))


def _heads_first(x: Tensor) -> Tensor:  # [N, T, heads, d] -> [N heads, T, d]
    return x.transpose(1, 2).flatten(0, 1)


def _tokens_first(x: Tensor, heads: int) -> Tensor:  # [N heads, T, d] -> [N, T, heads, d]
    return x.unflatten(0, (-1, heads)).transpose(1, 2)


def _chunks(q: Tensor, k: Tensor, *others: Tensor | None) -> Iterator[list[Any]]:
    """The tensors ``[N heads, ...]``, queries and keys first, as many heads at a time as fit."""
    step = max(1, CHUNK_BYTES // (q.shape[1] * k.shape[1] * q.element_size()))
    for start in range(0, len(q), step):
        yield [None if x is None else x[start : start + step] for x in (q, k, *others)]


def _product(a: Tensor, b: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=scale, out=out)


@torch.library.custom_op("mae::attention", mutates_args=())
def _attention(packed: Tensor, queries: Tensor | None, keys: Tensor | None) -> Tensor:
    return _fused(packed, queries, keys).contiguous()


@_attention.register_fake
def _(packed: Tensor, queries: Tensor | None, keys: Tensor | None) -> Tensor:
    rows = packed[:, :, 0] if queries is None else queries
    return rows.new_empty(rows.shape)


@torch.library.custom_op("mae::attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, packed: Tensor, queries: Tensor | None, keys: Tensor | None
) -> tuple[Tensor, Tensor]:
    g_packed = packed.new_empty(packed.shape)
    g_queries = packed.new_empty(0) if queries is None else queries.new_empty(queries.shape)
    heads_first = [*map(_heads_first, (*_split(packed, queries), grad))]
    grads = [torch.empty_like(x) for x in heads_first[:3]]
    unseen = None if keys is None else ~keys.repeat_interleave(packed.shape[3], 0)[:, None]  # [N heads, 1, T]
    for q, k, v, g, g_q, g_k, g_v, hidden in _chunks(*heads_first, *grads, unseen):
        scale = q.shape[2] ** -0.5
        scores = _product(q, k.transpose(1, 2), scale)  # [chunk, S, T]
        p = (scores if hidden is None else scores.masked_fill_(hidden, -torch.inf)).softmax(2)
        torch.bmm(p.transpose(1, 2), g, out=g_v)
        g_scores = torch._softmax_backward_data(torch.bmm(g, v.transpose(1, 2)), p, 2, p.dtype)
        _product(g_scores, k, scale, out=g_q)
        _product(g_scores.transpose(1, 2), q, scale, out=g_k)
    for into, g in zip(_split(g_packed, None if queries is None else g_queries), grads, strict=True):
        into.copy_(_tokens_first(g, packed.shape[3]))
    return g_packed, g_queries


@_attention_backward.register_fake
def _(grad: Tensor, packed: Tensor, queries: Tensor | None, keys: Tensor | None) -> tuple[Tensor, Tensor]:
    return packed.new_empty(packed.shape), packed.new_empty(0) if queries is None else queries.new_empty(queries.shape)


class _Attention(torch.autograd.Function):
    """The op's gradient; applied itself too, because torch.func differentiates Functions alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(packed: Tensor, queries: Tensor | None, keys: Tensor | None) -> Tensor:
        return torch.ops.mae.attention(packed, queries, keys)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        packed, queries, keys = ctx.saved_tensors
        g_packed, g_queries = once_differentiable(torch.ops.mae.attention_backward.default, grad, packed, queries, keys)
        return g_packed, None if queries is None else g_queries, None


_attention.register_autograd(_Attention.backward, setup_context=_Attention.setup_context)
