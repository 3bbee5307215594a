"""The transformer block. What is cheap to compute again, norms and gelu, is not saved for the backward."""

from typing import Any, TypeVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mae.model.attention import attention
from mae_kernels import gather_tokens, products
from mae_kernels.precision import autocast_dtype
from mae_kernels.registration import apply
from mae_kernels.untouched import untouched

_Part = TypeVar("_Part", Tensor, Tensor | None)


class Heads(nn.Module):
    """Attention to what a subclass projects, and the projection ``proj`` of all heads behind it."""

    proj: nn.Module

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads

    def attend(self, packed: Tensor, queries: Tensor | None, keys: Tensor | None) -> Tensor:
        """``[N, T, 3 D]`` queries, keys and values, or queries ``[N, S, D]`` beside ``[N, T, 2 D]``: ``[N, S, D]``."""
        # The method Tensor.unflatten cannot be compiled while a default device is set.
        parts, heads = (3 if queries is None else 2), self.num_heads
        packed = torch.unflatten(packed, 2, (parts, heads, -1))
        queries = None if queries is None else torch.unflatten(queries, 2, (heads, -1))
        return linear(attention(packed, queries, keys).flatten(2), self.proj)


class Attention(Heads):
    """Attention of every token to all; :class:`Block` computes the same in fewer passes where nobody would notice."""

    takes_ids = True  # as a Block does, see of_some

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(num_heads)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, ids: Tensor | None = None, keys: Tensor | None = None) -> Tensor:
        """Normed tokens in; all of them out, or those at ids ``[N, S]`` alone. Arguments: as of :class:`Block`."""
        packed = self.qkv(x)  # [N, T, 3 D]
        if ids is None:
            return self.attend(packed, None, keys)
        dim = packed.shape[2] // 3
        return self.attend(packed[..., dim:], gather_tokens(packed[..., :dim], ids), keys)


class Mlp(nn.Module):
    """Two layers with gelu in between; of these too :class:`Block` makes fewer passes."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:  # [N, T, D] -> [N, T, D]
        return self.output(self.fc1(x))

    def output(self, hidden: Tensor) -> Tensor:  # [N, T, H] -> [N, T, D]
        fc2 = self.fc2
        return gelu_linear(hidden, fc2.weight, fc2.bias) if untouched(fc2, nn.Linear) else fc2(F.gelu(hidden))


class Block(nn.Module):
    takes_ids = True  # wrappers pass the attribute on; a module without it is given all tokens

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(
        self, x: Tensor, ids: Tensor | None = None, keys: Tensor | None = None, keep: Tensor | None = None
    ) -> Tensor:
        """All tokens ``[N, T, D]``, or those at ids ``[N, S]`` alone, where -1 is none; either way they attend to all.

        With keys ``[N, T]`` bool they attend to the tokens for which it is True: the others are padding. keep
        ``[N, 2]`` has factors of what attention and MLP add to each sample, see :meth:`mae.model.Classifier.draw_keep`.
        """
        attn, norm = self.attn, self.norm1
        rows = x if ids is None else gather_tokens(x, ids)  # [N, S, D]
        if untouched(attn, Attention) and untouched(norm, nn.LayerNorm) and untouched(qkv := attn.qkv, nn.Linear):
            weight, bias, queries = qkv.weight, qkv.bias, None
            if ids is not None:
                weight_q, weight = _queries_and_rest(weight)
                bias_q, bias = _queries_and_rest(bias)
                queries = norm_linear(rows, norm, weight_q, bias_q)
            attended = attn.attend(norm_linear(x, norm, weight, bias), queries, keys)
        else:
            attended = of_some(attn, norm(x), ids, keys)
        if keep is None:
            return feed_forward(rows + attended, self.norm2, self.mlp)
        first, second = keep.to(attended.dtype)[..., None, None].unbind(1)  # each [N, 1, 1]
        return feed_forward(rows + attended * first, self.norm2, self.mlp, second)


def feed_forward(x: Tensor, norm: nn.Module, mlp: nn.Module, keep: Tensor | None = None) -> Tensor:
    """``x + keep * mlp(norm(x))``, the second half of a block: ``[N, T, D] -> [N, T, D]``; keep of None is 1."""
    if untouched(mlp, Mlp) and untouched(norm, nn.LayerNorm) and untouched(fc1 := mlp.fc1, nn.Linear):
        added = mlp.output(norm_linear(x, norm, fc1.weight, fc1.bias))
    else:
        added = mlp(norm(x))
    return x + (added if keep is None else added * keep)


def of_some(module: nn.Module, x: Tensor, ids: Tensor | None, keys: Tensor | None = None, **options: Any) -> Tensor:
    """The module's result for the tokens at ids ``[N, S]``, or for all: ``[N, T, D] -> [N, S, D]``.

    A module that stands in the place of one of ours may know no ids: it computes all tokens, of which some are taken.
    It has to take ``keys`` where some tokens are padding, and further options where there are any.
    """
    options |= {} if keys is None else {"keys": keys}
    if ids is not None and getattr(module, "takes_ids", False):
        return module(x, ids, **options)
    x = module(x, **options)
    return x if ids is None else gather_tokens(x, ids)


def _queries_and_rest(p: _Part) -> tuple[_Part, _Part]:  # [3 D, ...] -> [D, ...], [2 D, ...]
    return (None, None) if p is None else (p[: len(p) // 3], p[len(p) // 3 :])


def linear(x: Tensor, layer: nn.Module) -> Tensor:
    """``layer(x)``, ``[N, T, D] -> [N, T, O]``."""
    dtype = _compute_dtype(x)
    is_cast = autocast_dtype(x.device) is not None
    if x.is_cpu and untouched(layer, nn.Linear) and (is_cast or layer.weight.dtype == dtype):
        x = x.to(dtype)
        if products.onednn_is_faster("forward", x, layer.weight.shape[0]):
            return apply(_Linear, x, layer.weight.to(dtype), _to(layer.bias, dtype))
    return layer(x)


def norm_linear(x: Tensor, norm: nn.LayerNorm, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``linear(norm(x))``: ``[N, T, D] -> [N, T, O]``. The backward normalises x again."""
    dtype = _compute_dtype(x)
    # A number for torch.compile(dynamic=True) too: torch 2.13 fails on a symbol that two Functions share.
    eps = float(f"{norm.eps}")
    return apply(_NormLinear, x, norm.weight, norm.bias, eps, weight.to(dtype), _to(bias, dtype))


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``linear(gelu(x))``: ``[N, T, H] -> [N, T, O]``. The backward computes gelu again."""
    dtype = _compute_dtype(x)
    return apply(_GeluLinear, x, weight.to(dtype), _to(bias, dtype))


def _to(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)


def _compute_dtype(x: Tensor) -> torch.dtype:
    autocast = autocast_dtype(x.device)
    return x.dtype if autocast is None or x.dtype == torch.float64 else autocast


def _gelu_backward_into(grad: Tensor, x: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        return torch.ops.aten.gelu_backward(grad, x)
    return torch.ops.aten.gelu_backward.grad_input(grad, x, grad_input=grad)


class _NormLinear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, eps: float, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        # Mean and variance in the precision of the norm's parameters: x may be a bfloat16 residual stream.
        normed = F.layer_norm(x.to(norm_weight.dtype), norm_weight.shape, norm_weight, norm_bias, eps)
        return products.linear(normed.to(weight.dtype), weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, norm_weight, norm_bias, ctx.eps, weight, _ = inputs
        ctx.save_for_backward(x, norm_weight, norm_bias, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight, norm_bias, weight = ctx.saved_tensors
        *needs_norm, _, needs_weight, needs_bias = ctx.needs_input_grad
        x_dtype, shape = x.dtype, list(norm_weight.shape)
        x = x.to(norm_weight.dtype)
        normed, mean, rstd = torch.native_layer_norm(x, shape, norm_weight, norm_bias, ctx.eps)
        normed = normed.to(weight.dtype)
        g_weight = products.weight_gradient(grad, normed) if needs_weight else None
        g_x = g_norm_weight = g_norm_bias = None
        if any(needs_norm):
            g_normed = products.input_gradient(grad, weight, normed).to(x.dtype)
            g_x, g_norm_weight, g_norm_bias = torch.ops.aten.native_layer_norm_backward(
                g_normed, x, shape, mean, rstd, norm_weight, norm_bias, needs_norm
            )
        g_x = g_x.to(x_dtype) if g_x is not None and needs_norm[0] else None
        return g_x, g_norm_weight, g_norm_bias, None, g_weight, grad.sum((0, 1)) if needs_bias else None


class _Linear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return products.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        g_x = products.input_gradient(grad, weight) if needs_x else None
        g_weight = products.weight_gradient(grad, x) if needs_weight else None
        return g_x, g_weight, grad.sum((0, 1)) if needs_bias else None


class _GeluLinear(_Linear):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return products.linear(F.gelu(x).to(weight.dtype), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        active = F.gelu(x).to(weight.dtype)
        g_weight = products.weight_gradient(grad, active) if needs_weight else None
        g_x = None
        if needs_x:
            g_active = products.input_gradient(grad, weight, active).to(x.dtype)
            g_x = _gelu_backward_into(g_active, x)
        return g_x, g_weight, grad.sum((0, 1)) if needs_bias else None
