"""The decoder's head and the reconstruction loss in one: predictions exist for a chunk of samples at a time."""

from collections.abc import Sequence
from math import ceil
from typing import Any

import torch
from torch import Tensor

from . import checks, products
from .masked_mse import SCHEMA_OF_TARGET, NormPix, Target, masked_mse_backward, masked_mse_eager
from .patch_grid import PatchGrid, Sizes, as_video
from .patchify import Layout
from .precision import accumulation_dtype, autocast_dtype
from .registration import (
    differentiable,
    implementation,
    once_differentiable,
    only_needed,
    register_op,
    wants_gradient,
)


def linear_masked_mse(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    images: Tensor,
    ids_mask: Tensor,
    *,
    patch_size: Sizes,
    norm_pix: NormPix = True,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
    eps: float = 1e-6,
    layout: Layout = "channels_last",
) -> Tensor:
    """Project tokens of masked patches to pixels and score them; neither predictions nor targets outlive their chunk.

    ``loss = mean((hidden @ weight.T + bias - target) ** 2)`` over N, M and E, with ``target[n, j]`` the patch
    ``ids_mask[n, j]`` of image n, normalised as :func:`masked_mse` does.

    Args:
        hidden: ``[N, M, D]`` floating, any strides: the decoder's output at the masked patches.
        weight: ``[E, D]`` in the dtype of hidden, as of a linear layer.
        bias: ``[E]`` floating, or None.
        images: as of :func:`masked_mse`.
        ids_mask: ``[N, M]`` int64: row j of hidden belongs to patch ``ids_mask[n, j]``, to none if that is -1.
        patch_size: as of :func:`masked_mse`; ``E = C * pt * ph * pw``.
        norm_pix: as of :func:`masked_mse`.
        mean: as of :func:`masked_mse`.
        std: as of :func:`masked_mse`.
        eps: as of :func:`masked_mse`.
        layout: order of the E values in weight, as of :func:`masked_mse`.

    Returns:
        Scalar float32 (float64 for a float64 hidden). Differentiable in hidden, weight and bias. N = 0 gives 0 and zero
        gradients.

    Raises:
        TypeError, ValueError: see the message. Ids are checked on the CPU, elsewhere with ``MAE_KERNELS_DEBUG=1``.

    The forward computes every gradient that hidden, weight or bias will want, from a chunk's residual while that is at
    hand; the backward only scales them. So ``N M E`` values are neither stored nor saved, where :func:`masked_mse` on a
    linear layer stores the predictions and saves their residuals and ``hidden``: this op saves one tensor of hidden's
    size and one of weight's, in float32. In exchange a forward under autograd costs as much as forward and backward,
    whether a backward follows or not: take it under ``torch.no_grad()`` where none does.

    Under autocast hidden, weight and bias are cast as a linear layer does; the loss is float32 all the same.

    Equivalent PyTorch: :func:`mae_kernels.reference.linear_masked_mse`.
    Source: He et al. 2021, section 3, "Reconstruction target"; gradients in the forward: Liger-Kernel's fused losses.
    """
    op = "linear_masked_mse"
    grid = PatchGrid.of(op, images, patch_size)
    target = Target.of(op, grid, norm_pix, eps, layout)
    checks.constant(op, "images", images)
    checks.ids(op, "ids_mask", ids_mask, images.shape[0], grid.num_patches)
    checks.tensor(op, "weight", weight, (grid.patch_values, "D"))
    checks.floating(op, "weight", weight)
    checks.not_empty(op, "weight", weight)
    checks.tensor(op, "hidden", hidden, (*ids_mask.shape, weight.shape[1]))
    checks.floating(op, "hidden", hidden)
    if bias is not None:
        checks.tensor(op, "bias", bias, (weight.shape[0],))
        checks.floating(op, "bias", bias)
    checks.same_device(op, "hidden", hidden, weight=weight, bias=bias, images=images, ids_mask=ids_mask)
    statistics = checks.statistics(op, mean, std, images, hidden.dtype)
    compute_dtype = _compute_dtype(op, hidden, weight)
    needs = [wants_gradient(x) for x in (hidden, weight, bias)]
    return _call(hidden, weight, bias, as_video(images), ids_mask, statistics, compute_dtype, needs, *target)[0]


def _compute_dtype(op: str, hidden: Tensor, weight: Tensor) -> torch.dtype:
    autocast = autocast_dtype(hidden.device)
    if autocast is not None and torch.float64 not in (hidden.dtype, weight.dtype):
        return autocast
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"{op}: hidden is {checks.dtype_name(hidden)}, but weight is {checks.dtype_name(weight)}; "
            "cast one of them, or use torch.autocast"
        )
    return weight.dtype


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, *saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*saved)
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    *unscaled, scale = ctx.saved_tensors
    return tuple(
        once_differentiable(masked_mse_backward, x, grad, scale, dtype) if need and grad is not None else None
        for x, dtype, need in zip(unscaled, ctx.dtypes, ctx.needs_input_grad[:3], strict=True)
    )


def _check(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, images: Tensor, ids_mask: Tensor, statistics: Tensor | None,
    compute_dtype: torch.dtype, needs: list[bool], *target: Any,
) -> None:  # fmt: skip
    checks.id_values("linear_masked_mse", "ids_mask", ids_mask, Target(*target).grid(images).num_patches)


def _in_chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, images: Tensor, ids_mask: Tensor, statistics: Tensor | None,
    compute_dtype: torch.dtype, needs: list[bool], *target: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Loss, unscaled gradients of hidden, weight and bias, and the factor that scales them.

    The gradients are those of ``count / 2`` losses, count the number of masked patches: without the many rows that the
    loss averages over they are neither too small nor too large for float16.
    """
    (n, m, d), values = hidden.shape, weight.shape[0]
    needs_hidden, needs_weight, needs_bias = needs
    sum_dtype = accumulation_dtype(compute_dtype)
    weight, bias = weight.to(compute_dtype), None if bias is None else bias.to(compute_dtype)
    scale = 2 / (ids_mask >= 0).sum(dtype=sum_dtype).clamp_(min=1)
    (g_hidden,) = only_needed(hidden, needs[:1], [hidden.shape], [compute_dtype])
    g_weight, g_bias = (hidden.new_empty(0, dtype=sum_dtype) for _ in range(2))

    def added(total: Tensor, x: Tensor, factor: float) -> Tensor:
        return total.add_(x, alpha=factor) if total.numel() else x.to(sum_dtype).mul_(factor)

    losses = []  # of the chunks, half of the sums over their patches
    step = chunk_samples(n, m, values, hidden.device.type)
    for first in range(0, n, step):
        chunk = slice(first, min(first + step, n))
        rows = hidden[chunk].reshape(-1, d).to(compute_dtype)  # [B, D]
        pred = products.linear(rows, weight, bias).view(-1, m, values)
        chunk_loss, residual, chunk_scale = _score(
            pred, images[chunk], ids_mask[chunk], statistics, any(needs), *target
        )
        del pred
        losses.append(chunk_loss / chunk_scale)
        residual = residual.view(-1, values)  # [B, E]
        if needs_hidden:
            out = g_hidden[chunk].view(-1, d)
            out.copy_(products.input_gradient(residual, weight, out, values))  # mostly the same memory
        if needs_weight and compute_dtype == sum_dtype:
            g_weight = added(g_weight, products.weight_gradient(residual, rows), 1 / values)
        elif needs_weight:
            product = residual.new_empty(weight.shape)
            # A sum over many rows may leave the range of float16, their mean over E values is below its normal numbers.
            share = len(rows) * values**0.5
            product.addmm_(residual.t(), rows, beta=0, alpha=1 / share)
            g_weight = added(g_weight, product, share / values)
        if needs_bias:
            g_bias = added(g_bias, residual.sum(0, dtype=sum_dtype), 1 / values)
    return sum(losses[1:], losses[0]) * (scale / values), g_hidden, g_weight, g_bias, scale


def chunk_samples(n: int, m: int, values: int, device_type: str) -> int:
    """Samples of a chunk, as equal as whole samples allow; never so many that more values than these are predicted.

    CPU: Intel Xeon, 2 cores, torch 2.13, ViT-B/16, 32 samples in chunks of 2, 4, 8, 16: forward and backward in float32
    52, 45, 44, 45 ms at a peak of 21, 21, 25, 39 MiB; in bfloat16 29, 26, 22, 20 ms at 20, 20, 20, 32 MiB.
    GPU: the launches of four chunks take longer than all the work of one (benchmarks/NOTES.md, "On a GPU").
    """
    limit = 2**20 if device_type == "cpu" else 2**25
    chunks = ceil(n / max(limit // (m * values), 1))
    return ceil(n / chunks)


def _fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, images: Tensor, ids_mask: Tensor, statistics: Tensor | None,
    compute_dtype: torch.dtype, needs: list[bool], *target: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    sum_dtype = accumulation_dtype(compute_dtype)
    loss = hidden.new_empty((), dtype=sum_dtype)
    shapes = [hidden.shape, weight.shape, weight.shape[:1]]
    return loss, *only_needed(hidden, needs, shapes, [compute_dtype, sum_dtype, sum_dtype]), torch.empty_like(loss)


_score = implementation("masked_mse", masked_mse_eager)  # whose ids have been checked
_linear_masked_mse = register_op(
    "linear_masked_mse(Tensor hidden, Tensor weight, Tensor? bias, Tensor images, Tensor ids_mask, "
    f"Tensor? statistics, ScalarType compute_dtype, bool[3] needs, {SCHEMA_OF_TARGET}) "
    "-> (Tensor loss, Tensor g_hidden, Tensor g_weight, Tensor g_bias, Tensor scale)",
    eager=_in_chunks,
    fake=_fake,
    check=_check,
    has_kernels=False,
)
_call = differentiable(_linear_masked_mse, _setup_context, _backward)
