"""The decoder's head and the reconstruction loss in one: predictions exist for a chunk of samples at a time."""

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor

from mae_kernels import checks
from mae_kernels.chunks import in_chunks
from mae_kernels.masked_mse import masked_mse_backward, masked_mse_eager
from mae_kernels.patchify import Layout, patch_grid
from mae_kernels.precision import accumulation_dtype
from mae_kernels.registration import call, define, differentiable, once, wants_gradient


def linear_masked_mse(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    images: Tensor,
    ids_mask: Tensor,
    *,
    patch_size: int | tuple[int, int],
    norm_pix: bool = True,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
    eps: float = 1e-6,
    layout: Layout = "channels_last",
) -> Tensor:
    """Project tokens of masked patches to pixels and score them; neither predictions nor targets outlive their chunk.

    ``loss = mean((hidden @ weight.T + bias - target) ** 2)`` over N, M and E, with ``target[n, j]`` the patch
    ``ids_mask[n, j]`` of image n or, with norm_pix, ``(patch - mean(patch)) / sqrt(var(patch) + eps)``, var unbiased.

    Args:
        hidden: ``[N, M, D]`` floating, any strides: the decoder's output at the masked patches.
        weight: ``[E, D]`` in the dtype of hidden, as of a linear layer.
        bias: ``[E]`` floating, or None.
        images: ``[N, C, H, W]``, uint8 (read as ``x / 255``) or floating, any strides; a constant of the loss.
        ids_mask: ``[N, M]`` int64: row j of hidden belongs to patch ``ids_mask[n, j]``.
        patch_size: ``ph = pw``, or ``(ph, pw)``, in pixels; ``E = C * ph * pw``.
        norm_pix: normalise each target patch by its own mean and standard deviation.
        mean: C values, subtracted from the (scaled) pixels of each channel before anything else.
        std: C values, by which each channel is then divided.
        eps: added to the variance of a patch, inside the root.
        layout: order of the E values in weight: ``"channels_last"`` (row, column, channel: published) or ``"channels_first"``.

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
    patch = checks.patch_size(op, patch_size)
    checks.images(op, images, patch)
    checks.layout(op, layout)
    checks.constant(op, images)
    n, channels = images.shape[:2]
    checks.ids(op, "ids_mask", ids_mask, n, prod(patch_grid(images, patch)))
    checks.tensor(op, "weight", weight, (channels * patch[0] * patch[1], "D"))
    checks.floating(op, "weight", weight)
    checks.not_empty(op, "weight", weight)
    checks.tensor(op, "hidden", hidden, (n, ids_mask.shape[1], weight.shape[1]))
    checks.floating(op, "hidden", hidden)
    if bias is not None:
        checks.tensor(op, "bias", bias, (weight.shape[0],))
        checks.floating(op, "bias", bias)
    checks.same_device(op, "hidden", hidden, weight=weight, bias=bias, images=images, ids_mask=ids_mask)
    checks.eps(op, eps)
    mean, std = checks.mean_std(op, mean, std, images, hidden.dtype)
    compute_dtype = _compute_dtype(op, hidden, weight)
    needs = [wants_gradient(x) for x in (hidden, weight, bias)]
    arguments = (hidden, weight, bias, images, ids_mask, patch, norm_pix, mean, std, eps, layout, compute_dtype, needs)
    return call(_LinearMaskedMSE, *arguments)[0]


def _compute_dtype(op: str, hidden: Tensor, weight: Tensor) -> torch.dtype:
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type) and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype(device_type)
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"{op}: hidden is {checks.dtype_name(hidden)}, but weight is {checks.dtype_name(weight)}; "
            "cast one of them, or use torch.autocast"
        )
    return weight.dtype


class _LinearMaskedMSE(torch.autograd.Function):
    @staticmethod
    def setup_context(ctx, inputs, output):
        _, *saved = output
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved)
        ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]

    @staticmethod
    def backward(ctx, grad, *_):
        *unscaled, scale = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        grads = (
            once(masked_mse_backward, x, grad, scale, dtype) if need and grad is not None else None
            for x, dtype, need in zip(unscaled, ctx.dtypes, needs, strict=True)
        )
        return *grads, *[None] * 10


def _linear_masked_mse_check(hidden, weight, bias, images, ids_mask, patch, *_):
    checks.id_values("linear_masked_mse", "ids_mask", ids_mask, prod(patch_grid(images, patch)))


def around(loss_of: Callable) -> Callable:
    """The op around an implementation of masked_mse, which may write the residual over its pred."""

    def run(hidden, weight, bias, images, ids_mask, patch, norm_pix, mean, std, eps, layout, compute_dtype, needs):
        def score(pred, chunk):
            options = patch, norm_pix, mean, std, eps, layout, any(needs)
            loss, residual, _ = loss_of(pred, images[chunk], None, ids_mask[chunk], *options)
            return loss, residual

        return in_chunks(score, hidden, weight, bias, compute_dtype, needs)

    return run


def _linear_masked_mse_fake(
    hidden, weight, bias, images, ids_mask, patch, norm_pix, mean, std, eps, layout, compute_dtype, needs
):
    sum_dtype = accumulation_dtype(compute_dtype)
    loss = hidden.new_empty((), dtype=sum_dtype)
    shapes, dtypes = (hidden.shape, weight.shape, weight.shape[:1]), (compute_dtype, sum_dtype, sum_dtype)
    grads = (
        hidden.new_empty(shape if need else 0, dtype=dtype)
        for shape, dtype, need in zip(shapes, dtypes, needs, strict=True)
    )
    return loss, *grads, torch.empty_like(loss)


_linear_masked_mse = define(
    "linear_masked_mse(Tensor hidden, Tensor weight, Tensor? bias, Tensor images, Tensor ids_mask, int[2] patch, "
    "bool norm_pix, Tensor? mean, Tensor? std, float eps, str layout, ScalarType compute_dtype, bool[3] needs) "
    "-> (Tensor loss, Tensor g_hidden, Tensor g_weight, Tensor g_bias, Tensor scale)",
    eager=around(masked_mse_eager),
    fake=_linear_masked_mse_fake,
    check=_linear_masked_mse_check,
)

differentiable(_linear_masked_mse, _LinearMaskedMSE)
