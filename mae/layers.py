"""Linear layers that keep their input's input: what is cheap to compute again is not saved for the backward."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


def norm_linear(x: Tensor, norm: nn.LayerNorm, weight: Tensor, bias: Tensor) -> Tensor:
    """``linear(norm(x))``: ``[N, T, D] -> [N, T, O]``. The backward normalises x again."""
    dtype = _compute_dtype(x)
    return _NormLinear.apply(x, norm.weight, norm.bias, norm.eps, weight.to(dtype), bias.to(dtype))


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``linear(gelu(x))``: ``[N, T, H] -> [N, T, O]``. The backward computes gelu again."""
    dtype = _compute_dtype(x)
    return _GeluLinear.apply(x, weight.to(dtype), bias.to(dtype))


def _compute_dtype(x: Tensor) -> torch.dtype:
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:  # [N, T, O], [N, T, D] -> [O, D]
    return grad.flatten(0, -2).t() @ x.flatten(0, -2)


def _product_into(out: Tensor, grad: Tensor, weight: Tensor) -> Tensor:  # [N, T, O], [O, D] -> [N, T, D]
    # Into memory that is not needed any more: on a CPU touching fresh memory costs as much as the whole of gelu.
    torch.mm(grad.flatten(0, -2), weight, out=out.view(-1, out.shape[-1]))
    return out


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(x, norm_weight, norm_bias, eps, weight, bias):
        # Mean and variance in the precision of the norm's parameters: x may be a bfloat16 residual stream.
        normed = F.layer_norm(x.to(norm_weight.dtype), norm_weight.shape, norm_weight, norm_bias, eps)
        return F.linear(normed.to(weight.dtype), weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, norm_weight, norm_bias, ctx.eps, weight, _ = inputs
        ctx.save_for_backward(x, norm_weight, norm_bias, weight)

    @staticmethod
    def backward(ctx, grad):
        x, norm_weight, norm_bias, weight = ctx.saved_tensors
        x_dtype, shape = x.dtype, list(norm_weight.shape)
        x = x.to(norm_weight.dtype)
        normed, mean, rstd = torch.native_layer_norm(x, shape, norm_weight, norm_bias, ctx.eps)
        normed = normed.to(weight.dtype)
        g_weight = _weight_gradient(grad, normed)
        g_normed = _product_into(normed, grad, weight).to(x.dtype)
        g_x, g_norm_weight, g_norm_bias = torch.ops.aten.native_layer_norm_backward(
            g_normed, x, shape, mean, rstd, norm_weight, norm_bias, [True, True, True]
        )
        return g_x.to(x_dtype), g_norm_weight, g_norm_bias, None, g_weight, grad.sum((0, 1))


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(x, weight, bias):
        return F.linear(F.gelu(x).to(weight.dtype), weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        active = F.gelu(x).to(weight.dtype)
        g_weight = _weight_gradient(grad, active)
        g_active = _product_into(active, grad, weight).to(x.dtype)
        g_x = torch.ops.aten.gelu_backward.grad_input(g_active, x, grad_input=g_active)
        return g_x, g_weight, grad.sum((0, 1))
