"""Mean squared error between predictions and the pixels of the masked patches."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from mae_kernels import backend, checks
from mae_kernels.patchify import Layout, gather_patches, normalize_pixels, patch_grid
from mae_kernels.precision import accumulation_dtype
from mae_kernels.registration import call, define, differentiable, once, wants_gradient
from mae_kernels.rows import as_rows, row_ids


def masked_mse(
    pred: Tensor,
    images: Tensor,
    *,
    patch_size: int | tuple[int, int],
    mask: Tensor | None = None,
    ids_mask: Tensor | None = None,
    norm_pix: bool = True,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
    eps: float = 1e-6,
    layout: Layout = "channels_last",
) -> Tensor:
    """Reconstruction loss over the masked patches of the whole batch; no other target is ever computed.

    ``loss = sum_masked(mean_E((pred - target) ** 2)) / count_masked`` with ``target = patch`` or, with norm_pix,
    ``target = (patch - mean(patch)) / sqrt(var(patch) + eps)``, var unbiased, both over the E values of the patch.

    Args:
        pred: ``[N, L, E]`` with mask, ``[N, M, E]`` with ids_mask. Slices such as ``x[:, 1:]`` are read in place.
        images: ``[N, C, H, W]``, uint8 (read as ``x / 255``) or floating, any strides; a constant of the loss.
        patch_size: ``ph = pw``, or ``(ph, pw)``, in pixels.
        mask: ``[N, L]`` bool, or floating 0 and 1; True = masked. Rows may differ in their count.
        ids_mask: ``[N, M]`` int64: row j of pred belongs to patch ``ids_mask[n, j]``. Exactly one of the two.
        norm_pix: normalise each target patch by its own mean and standard deviation.
        mean: C values, subtracted from the (scaled) pixels of each channel before anything else.
        std: C values, by which each channel is then divided.
        eps: added to the variance of a patch, inside the root.
        layout: order of the E values in pred: ``"channels_last"`` (row, column, channel: published) or ``"channels_first"``.

    Returns:
        Scalar float32 (float64 for a float64 pred), computed in that precision whatever pred's dtype, autocast
        included. Differentiable in pred. A mask with nothing masked gives 0 and zero gradients, and so does N = 0.

    Raises:
        TypeError, ValueError: see the message. Ids and mask values are checked on the CPU, elsewhere with
            ``MAE_KERNELS_DEBUG=1``. Non-finite pixels are not an error: the loss becomes NaN.

    Equivalent PyTorch: :func:`mae_kernels.reference.masked_mse`.
    Source: He et al. 2021, section 3, "Reconstruction target".
    """
    op = "masked_mse"
    patch = checks.patch_size(op, patch_size)
    checks.images(op, images, patch)
    checks.layout(op, layout)
    checks.constant(op, images)
    if (mask is None) == (ids_mask is None):
        raise ValueError(f"{op}: pass exactly one of mask and ids_mask, got {'neither' if mask is None else 'both'}")
    n, channels = images.shape[:2]
    num_patches = prod(patch_grid(images, patch))
    values = channels * patch[0] * patch[1]
    if mask is not None:
        checks.tensor(op, "mask", mask, (n, num_patches))
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise TypeError(
                f"{op}: mask must be bool, or floating 0 and 1, got {checks.dtype_name(mask)}; call .bool()"
            )
        rows = num_patches
    else:
        checks.ids(op, "ids_mask", ids_mask, n, num_patches)
        rows = ids_mask.shape[1]
    checks.tensor(op, "pred", pred, (n, rows, values))
    checks.floating(op, "pred", pred)
    checks.same_device(op, "pred", pred, images=images, mask=mask, ids_mask=ids_mask)
    checks.eps(op, eps)
    mean, std = checks.mean_std(op, mean, std, images, pred.dtype)
    keep_residual = wants_gradient(pred) and (backend.is_eager(pred) or residual_is_less(pred.dtype, images.dtype))
    return call(_MaskedMSE, pred, images, mask, ids_mask, patch, norm_pix, mean, std, eps, layout, keep_residual)[0]


def residual_is_less(pred: torch.dtype, pixels: torch.dtype) -> bool:
    """Whether a kept residual moves at most as many bytes in both passes together as one that is computed again.

    The kept one is written by the forward and read by the backward, in the dtype of pred; for the other one the
    backward reads predictions and pixels once more. So pixels of fewer bytes than predictions are read again.
    """
    return pixels.itemsize >= pred.itemsize


class _MaskedMSE(torch.autograd.Function):
    @staticmethod
    def setup_context(ctx, inputs, output):
        pred, images, mask, ids_mask, patch, norm_pix, mean, std, eps, layout, ctx.keep_residual = inputs
        _, residual, scale = output
        ctx.mark_non_differentiable(residual, scale)
        ctx.set_materialize_grads(False)
        if ctx.keep_residual:
            ctx.save_for_backward(residual, scale)
            ctx.dtype = pred.dtype
        else:
            ctx.save_for_backward(pred, images, mask, ids_mask, mean, std, scale)
            ctx.options = patch, norm_pix, eps, layout

    @staticmethod
    def backward(ctx, grad, _residual, _scale):
        g_pred = None
        if grad is not None and ctx.keep_residual:
            residual, scale = ctx.saved_tensors
            g_pred = once(masked_mse_backward, residual, grad, scale, ctx.dtype)
        elif grad is not None:
            pred, images, mask, ids_mask, mean, std, scale = ctx.saved_tensors
            patch, norm_pix, eps, layout = ctx.options
            inputs = pred, images, mask, ids_mask, patch, norm_pix, mean, std, eps, layout
            g_pred = once(_masked_mse_recomputed_backward, *inputs, grad, scale)
        return g_pred, None, None, None, None, None, None, None, None, None, None


def _masked_mse_check(pred, images, mask, ids_mask, patch, *_):
    if mask is None:
        checks.id_values("masked_mse", "ids_mask", ids_mask, prod(patch_grid(images, patch)))
    else:
        checks.mask_values("masked_mse", "mask", mask)


def masked_mse_eager(pred, images, mask, ids_mask, patch, norm_pix, mean, std, eps, layout, keep_residual):
    n, rows, values = pred.shape
    dtype = accumulation_dtype(pred.dtype)
    num_patches = prod(patch_grid(images, patch))
    if mask is None:
        flat_ids = row_ids(ids_mask, num_patches)
        pred_rows = pred
    else:
        mask = mask.flatten() != 0
        flat_ids = mask.nonzero()[:, 0]
        table, step = as_rows(pred)
        pred_rows = table.index_select(0, flat_ids // rows * step + flat_ids % rows)
    count = max(len(flat_ids), 1)
    scale = torch.full((), 2 / (count * values), dtype=dtype, device=pred.device)

    target = gather_patches(images, flat_ids, patch, layout)  # [masked, E]
    target = normalize_pixels(target, images.shape[1], mean, std, dtype, layout)
    if norm_pix:
        # Two passes: the variance is a sum of squares of centred values, never a difference of large sums.
        target -= target.mean(dim=1, keepdim=True)
        variance = torch.linalg.vector_norm(target, dim=1, keepdim=True).square_().div_(values - 1)
        target *= variance.add_(eps).rsqrt_()
    target = target.view(pred_rows.shape)  # [N, M, E] or [masked, E]
    residual = torch.sub(pred_rows, target, out=target)
    loss = torch.linalg.vector_norm(residual, dim=-1).square_().sum() * (scale / 2)

    if not keep_residual:
        return loss, pred.new_empty(0), scale
    if mask is not None:
        compact, residual = residual.to(pred.dtype), pred.new_empty((n * rows, values))
        residual.index_copy_(0, flat_ids, compact).index_fill_(0, mask.logical_not().nonzero()[:, 0], 0)
    return loss, residual.to(pred.dtype).view(n, rows, values), scale


def _masked_mse_fake(pred, images, mask, ids_mask, patch, norm_pix, mean, std, eps, layout, keep_residual):
    loss = pred.new_empty((), dtype=accumulation_dtype(pred.dtype))
    residual = pred.new_empty(pred.shape if keep_residual else 0)
    return loss, residual, torch.empty_like(loss)


def _masked_mse_backward_eager(residual, grad, scale, dtype):
    return torch.mul(residual, grad * scale, out=residual.new_empty(residual.shape, dtype=dtype))


def _masked_mse_backward_fake(residual, grad, scale, dtype):
    return residual.new_empty(residual.shape, dtype=dtype)


def _masked_mse_recomputed_backward_eager(*args):
    *inputs, grad, scale = args
    _, residual, _ = masked_mse_eager(*inputs, True)
    return _masked_mse_backward_eager(residual, grad, scale, residual.dtype)


def _masked_mse_recomputed_backward_fake(pred, *_):
    return pred.new_empty(pred.shape)


_masked_mse = define(
    "masked_mse(Tensor pred, Tensor images, Tensor? mask, Tensor? ids_mask, int[2] patch, bool norm_pix, "
    "Tensor? mean, Tensor? std, float eps, str layout, bool keep_residual) "
    "-> (Tensor loss, Tensor residual, Tensor scale)",
    eager=masked_mse_eager,
    fake=_masked_mse_fake,
    check=_masked_mse_check,
)
masked_mse_backward = define(
    "masked_mse_backward(Tensor residual, Tensor grad, Tensor scale, ScalarType dtype) -> Tensor",
    eager=_masked_mse_backward_eager,
    fake=_masked_mse_backward_fake,
)
_masked_mse_recomputed_backward = define(
    "masked_mse_recomputed_backward(Tensor pred, Tensor images, Tensor? mask, Tensor? ids_mask, int[2] patch, "
    "bool norm_pix, Tensor? mean, Tensor? std, float eps, str layout, Tensor grad, Tensor scale) -> Tensor",
    eager=_masked_mse_recomputed_backward_eager,
    fake=_masked_mse_recomputed_backward_fake,
)

differentiable(_masked_mse, _MaskedMSE)
