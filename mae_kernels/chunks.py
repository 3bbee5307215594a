"""Head and loss a chunk of samples at a time, with their gradients, around any way to score them."""

from collections.abc import Callable
from math import ceil

import torch
import torch.nn.functional as F

from mae_kernels.precision import accumulation_dtype


def in_chunks(score: Callable, hidden, weight, bias, compute_dtype, needs):
    """Loss, unscaled gradients of hidden, weight and bias, and the factor that scales them.

    ``score(pred, chunk)`` gives loss and residual of predictions ``[B, M, E]`` for B samples, a slice of all; it may
    write the residual over them. The gradients are those of ``N * M / 2`` losses: without the many rows that the loss
    averages over they are neither too small nor too large for float16.
    """
    (n, m, d), values = hidden.shape, weight.shape[0]
    needs_hidden, needs_weight, needs_bias = needs
    sum_dtype = accumulation_dtype(compute_dtype)
    weight, bias = weight.to(compute_dtype), None if bias is None else bias.to(compute_dtype)
    loss = hidden.new_zeros((), dtype=sum_dtype)
    scale = torch.full_like(loss, 2 / (n * m))
    g_hidden = hidden.new_empty(hidden.shape if needs_hidden else 0, dtype=compute_dtype)
    g_weight = hidden.new_zeros(weight.shape if needs_weight else 0, dtype=sum_dtype)
    g_bias = hidden.new_zeros(values if needs_bias else 0, dtype=sum_dtype)

    step = chunk_samples(n, m, values, hidden.device.type)
    for first in range(0, n, step):
        chunk = slice(first, min(first + step, n))
        rows = hidden[chunk].reshape(-1, d).to(compute_dtype)  # [B, D]
        pred = F.linear(rows, weight, bias).view(-1, m, values)
        chunk_loss, residual = score(pred, chunk)
        del pred
        loss.add_(chunk_loss, alpha=(chunk.stop - first) / n)
        residual = residual.view(-1, values)  # [B, E]
        if needs_hidden:
            g_hidden[chunk].view(-1, d).addmm_(residual, weight, beta=0, alpha=1 / values)
        if needs_weight and compute_dtype == sum_dtype:
            g_weight.addmm_(residual.t(), rows, alpha=1 / values)
        elif needs_weight:
            product = residual.new_empty(weight.shape)
            # A sum over many rows may leave the range of float16, their mean over E values is below its normal numbers.
            share = len(rows) * values**0.5
            product.addmm_(residual.t(), rows, beta=0, alpha=1 / share)
            g_weight.add_(product, alpha=share / values)
        if needs_bias:
            g_bias.add_(residual.sum(0, dtype=sum_dtype), alpha=1 / values)
    return loss, g_hidden, g_weight, g_bias, scale


def chunk_samples(n: int, m: int, values: int, device_type: str) -> int:
    """Samples of a chunk, as equal as whole samples allow; never so many that more values than these are predicted.

    CPU: Intel Xeon, 2 cores, torch 2.13, ViT-B/16, 32 samples in chunks of 2, 4, 8, 16: forward and backward in float32
    52, 45, 44, 45 ms at a peak of 21, 21, 25, 39 MiB; in bfloat16 29, 26, 22, 20 ms at 20, 20, 20, 32 MiB.
    GPU: the launches of four chunks take longer than all the work of one (benchmarks/NOTES.md, "On a GPU").
    """
    limit = 2**20 if device_type == "cpu" else 2**25
    chunks = ceil(n / max(limit // (m * values), 1))
    return ceil(n / chunks)
