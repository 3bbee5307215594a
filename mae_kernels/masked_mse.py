"""Mean squared error between predictions and the pixels of the masked patches."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import backend, checks
from .patch_grid import PatchGrid, Sizes, as_video
from .patchify import Layout, gather_patches, normalize_pixels
from .precision import accumulation_dtype
from .registration import differentiable, once_differentiable, register_op, wants_gradient
from .rows import as_rows, row_ids, without_padding

NormPix = bool | Literal["channel"]


def masked_mse(
    pred: Tensor,
    images: Tensor | None = None,
    *,
    patch_size: Sizes | None = None,
    mask: Tensor | None = None,
    ids_mask: Tensor | None = None,
    target: Tensor | None = None,
    norm_pix: NormPix | None = None,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
    eps: float = 1e-6,
    layout: Layout = "channels_last",
) -> Tensor:
    """Reconstruction loss over the masked patches of the whole batch; no other target is ever computed.

    ``loss = sum_masked(mean_E((pred - target) ** 2)) / count_masked`` with ``target = patch`` or, with norm_pix,
    ``target = (patch - mean(patch)) / sqrt(var(patch) + eps)``, var unbiased, both over the E values of the patch.
    ``norm_pix="channel"``: ``target[c] = (patch[c] - mean(patch[c])) / (sqrt(var(patch[c])) + eps)`` for each channel.

    Args:
        pred: ``[N, L, E]`` with mask, ``[N, M, E]`` with ids_mask. Slices such as ``x[:, 1:]`` are read in place.
        images: ``[N, C, H, W]`` or ``[N, C, T, H, W]``, uint8 (read as ``x / 255``), uint16 (read as it is) or
            floating, any strides; a constant of the loss.
        patch_size: an int for all sides, ``(ph, pw)`` or ``(pt, ph, pw)``, in pixels.
        mask: ``[N, L]`` bool, or floating 0 and 1; True = masked. Rows may differ in their count.
        ids_mask: ``[N, M]`` int64: row j of pred belongs to patch ``ids_mask[n, j]``, to none if that is -1. Exactly
            one of the two.
        target: ``[N, L, E]`` floating, such as the features of a teacher, in place of images and patch_size.
        norm_pix: normalise each target patch by its own mean and standard deviation, or each channel of it as VideoMAE
            does (``"channel"``). None is True for images; a given target is then taken as it is.
        mean: C values, subtracted from the (scaled) pixels of each channel before anything else.
        std: C values, by which each channel is then divided.
        eps: added to the variance of a patch, inside the root; for ``"channel"`` outside of it.
        layout: order of the E values in pred: ``"channels_last"`` (frame, row, column, channel: published) or
            ``"channels_first"``.

    Returns:
        Scalar float32 (float64 for a float64 pred), computed in that precision whatever pred's dtype, autocast
        included. Differentiable in pred. Where nothing is masked it is 0 with zero gradients, and so it is for N = 0.

    Raises:
        TypeError, ValueError: see the message. Ids and mask values are checked on the CPU, elsewhere with
            ``MAE_KERNELS_DEBUG=1``. Non-finite pixels are not an error: the loss becomes NaN.

    Equivalent PyTorch: :func:`mae_kernels.reference.masked_mse`.
    Source: He et al. 2021, section 3, "Reconstruction target"; ``"channel"``: Tong et al. 2022, VideoMAE.
    """
    op = "masked_mse"
    if images is not None and target is None:
        if patch_size is None:
            raise ValueError(f"{op}: patch_size is missing; pass the one by which the images were cut")
    elif target is not None and images is None:
        if patch_size is not None or mean is not None or std is not None:
            raise ValueError(f"{op}: a target has no pixels; leave out patch_size, mean and std")
        checks.tensor(op, "target", target, ("N", "L", "E"))
        checks.floating(op, "target", target)
        checks.not_empty(op, "target", target, batch=True)
        # A sequence of tokens is an image of one column whose patches are its pixels and whose channels are its values.
        images, patch_size = target.transpose(1, 2)[:, :, :, None], (1, 1)
    else:
        raise ValueError(f"{op}: pass exactly one of images and target, got {'neither' if target is None else 'both'}")
    grid = PatchGrid.of(op, images, patch_size)
    compared = Target.of(op, grid, target is None if norm_pix is None else norm_pix, eps, layout)
    name = "images" if target is None else "target"
    checks.constant(op, name, images)
    n, num_patches = images.shape[0], grid.num_patches
    if mask is not None and ids_mask is None:
        checks.tensor(op, "mask", mask, (n, num_patches))
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise TypeError(
                f"{op}: mask must be bool, or floating 0 and 1, got {checks.dtype_name(mask)}; call .bool()"
            )
        selected = mask
    elif ids_mask is not None and mask is None:
        checks.ids(op, "ids_mask", ids_mask, n, num_patches)
        selected = ids_mask
    else:
        raise ValueError(f"{op}: pass exactly one of mask and ids_mask, got {'neither' if mask is None else 'both'}")
    checks.tensor(op, "pred", pred, (n, selected.shape[1], grid.patch_values))
    checks.floating(op, "pred", pred)
    checks.same_device(op, "pred", pred, **{name: images}, mask=mask, ids_mask=ids_mask)
    statistics = checks.statistics(op, mean, std, images, pred.dtype)
    keep_residual = wants_gradient(pred) and (backend.is_eager(pred) or residual_is_less(pred.dtype, images.dtype))
    return _call(pred, as_video(images), selected, statistics, keep_residual, *compared)[0]


class Target(NamedTuple):
    """What predictions are compared with: the patches of images, and how their values are normalised and ordered."""

    patch: tuple[int, int, int]
    norm_pix: str  # "none", or what shares its statistics: a "patch", or each "channel" of it
    eps: float
    layout: Layout

    @classmethod
    def of(
        cls, op: str, grid: PatchGrid, norm_pix: NormPix, eps: float = 1e-6, layout: Layout = "channels_last"
    ) -> "Target":
        checks.layout(op, layout)
        checks.norm_pix(op, norm_pix)
        checks.eps(op, eps)
        if norm_pix and grid.patch_values == (grid.channels if norm_pix == "channel" else 1):
            raise ValueError(
                f"{op}: norm_pix {norm_pix!r} needs more than one value for each mean; pass norm_pix=False"
            )
        return cls(grid.patch, "channel" if norm_pix == "channel" else "patch" if norm_pix else "none", eps, layout)

    def groups(self, channels: int) -> int:
        """How many parts of a patch are normalised each by itself."""
        return channels if self.norm_pix == "channel" else 1

    @property
    def eps_of_variance_and_deviation(self) -> tuple[float, float]:
        return (0.0, self.eps) if self.norm_pix == "channel" else (self.eps, 0.0)

    def grid(self, images: Tensor) -> PatchGrid:
        return PatchGrid.inside(images.shape[2:], self.patch, images.shape[1])


def residual_is_less(pred: torch.dtype, pixels: torch.dtype) -> bool:
    """Whether a kept residual moves at most as many bytes in both passes together as one that is computed again.

    The kept one is written by the forward and read by the backward, in the dtype of pred; for the other one the
    backward reads predictions and pixels once more. So pixels of fewer bytes than predictions are read again.
    """
    return pixels.itemsize >= pred.itemsize


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pred, images, selected, statistics, ctx.keep_residual, *ctx.target = inputs
    _, residual, scale = output
    ctx.mark_non_differentiable(residual, scale)
    ctx.set_materialize_grads(False)
    if ctx.keep_residual:
        ctx.save_for_backward(residual, scale)
        ctx.dtype = pred.dtype
    else:
        ctx.save_for_backward(scale, pred, images, selected, statistics)


def _backward(ctx: Any, grad: Tensor | None, _residual: None, _scale: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,)
    if ctx.keep_residual:
        residual, scale = ctx.saved_tensors
        return (once_differentiable(masked_mse_backward, residual, grad, scale, ctx.dtype),)
    scale, *inputs = ctx.saved_tensors
    return (once_differentiable(_masked_mse_recomputed_backward, *inputs, grad, scale, *ctx.target),)


def _check(
    pred: Tensor, images: Tensor, selected: Tensor, statistics: Tensor | None, keep_residual: bool, *target: Any
) -> None:
    if selected.dtype == torch.int64:
        checks.id_values("masked_mse", "ids_mask", selected, Target(*target).grid(images).num_patches)
    else:
        checks.mask_values("masked_mse", "mask", selected)


def masked_mse_eager(
    pred: Tensor, images: Tensor, selected: Tensor, statistics: Tensor | None, keep_residual: bool, *target: Any
) -> tuple[Tensor, Tensor, Tensor]:
    (n, rows, values), target = pred.shape, Target(*target)
    grid, dtype, padding = target.grid(images), accumulation_dtype(pred.dtype), None
    if selected.dtype == torch.int64:
        ids, padding = without_padding(selected)
        flat_ids, pred_rows = row_ids(ids, grid.num_patches), pred
    else:
        selected = selected.flatten() != 0
        flat_ids = selected.nonzero()[:, 0]
        table, step = as_rows(pred)
        pred_rows = table.index_select(0, flat_ids // rows * step + flat_ids % rows)
    if padding is None:
        scale = torch.full((), 2 / (max(len(flat_ids), 1) * values), dtype=dtype, device=pred.device)
    else:
        scale = padding.logical_not().sum(dtype=dtype).clamp_(min=1).mul_(values / 2).reciprocal_()

    patches = gather_patches(images, flat_ids, grid, target.layout)  # [masked, E]
    patches = normalize_pixels(patches, statistics, dtype, target.layout)
    if target.norm_pix != "none":
        groups = target.groups(grid.channels)
        each = values // groups
        dim, shape = (1, (each, groups)) if target.layout == "channels_last" else (2, (groups, each))
        _normalize(patches.view(-1, *shape), dim, *target.eps_of_variance_and_deviation)
    patches = patches.view(pred_rows.shape)  # [N, M, E] or [masked, E]
    residual = torch.sub(pred_rows, patches, out=patches)
    if padding is not None:
        residual.masked_fill_(padding, 0)
    loss = torch.linalg.vector_norm(residual, dim=-1).square_().sum() * (scale / 2)

    if not keep_residual:
        return loss, pred.new_empty(0), scale
    if selected.dtype == torch.bool:
        compact, residual = residual.to(pred.dtype), pred.new_empty((n * rows, values))
        residual.index_copy_(0, flat_ids, compact).index_fill_(0, selected.logical_not().nonzero()[:, 0], 0)
    return loss, residual.to(pred.dtype).view(n, rows, values), scale


def _normalize(x: Tensor, dim: int, eps_of_variance: float, eps_of_deviation: float) -> None:
    if eps_of_deviation:  # magnifies the rounding of a mean, which differences from the first value do not have
        x -= x.narrow(dim, 0, 1).clone()
    # Two passes: the variance is a sum of squares of centred values, never a difference of large sums.
    x -= x.mean(dim, keepdim=True)
    variance = torch.linalg.vector_norm(x, dim=dim, keepdim=True).square_().div_(x.shape[dim] - 1)
    x *= variance.add_(eps_of_variance).sqrt_().add_(eps_of_deviation).reciprocal_()


def _masked_mse_fake(
    pred: Tensor, images: Tensor, selected: Tensor, statistics: Tensor | None, keep_residual: bool, *target: Any
) -> tuple[Tensor, Tensor, Tensor]:
    loss = pred.new_empty((), dtype=accumulation_dtype(pred.dtype))
    residual = pred.new_empty(pred.shape if keep_residual else 0)
    return loss, residual, torch.empty_like(loss)


def _masked_mse_backward_eager(residual: Tensor, grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.mul(residual, grad * scale, out=residual.new_empty(residual.shape, dtype=dtype))


def _masked_mse_backward_fake(residual: Tensor, grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return residual.new_empty(residual.shape, dtype=dtype)


def _masked_mse_recomputed_backward_eager(
    pred: Tensor, images: Tensor, selected: Tensor, statistics: Tensor | None, grad: Tensor, scale: Tensor, *target: Any
) -> Tensor:
    _, residual, _ = masked_mse_eager(pred, images, selected, statistics, True, *target)
    return _masked_mse_backward_eager(residual, grad, scale, residual.dtype)


def _masked_mse_recomputed_backward_fake(pred: Tensor, *_: Any) -> Tensor:
    return pred.new_empty(pred.shape)


SCHEMA_OF_TARGET = "int[3] patch, str norm_pix, float eps, str layout"

_masked_mse = register_op(
    "masked_mse(Tensor pred, Tensor images, Tensor selected, Tensor? statistics, bool keep_residual, "
    f"{SCHEMA_OF_TARGET}) -> (Tensor loss, Tensor residual, Tensor scale)",
    eager=masked_mse_eager,
    fake=_masked_mse_fake,
    check=_check,
)
masked_mse_backward: torch._ops.OpOverload = register_op(
    "masked_mse_backward(Tensor residual, Tensor grad, Tensor scale, ScalarType dtype) -> Tensor",
    eager=_masked_mse_backward_eager,
    fake=_masked_mse_backward_fake,
)
_masked_mse_recomputed_backward = register_op(
    "masked_mse_recomputed_backward(Tensor pred, Tensor images, Tensor selected, Tensor? statistics, "
    f"Tensor grad, Tensor scale, {SCHEMA_OF_TARGET}) -> Tensor",
    eager=_masked_mse_recomputed_backward_eager,
    fake=_masked_mse_recomputed_backward_fake,
)
_call = differentiable(_masked_mse, _setup_context, _backward)
