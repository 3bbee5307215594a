"""Patchify, normalise, project, add positions and prefix tokens: for the visible patches only."""

from collections.abc import Callable, Sequence
from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, products
from .gather_tokens import gather_tokens_backward_eager
from .patch_grid import PatchGrid, as_video
from .patchify import gather_patches, normalize_pixels, unpatchify
from .precision import accumulation_dtype, autocast_dtype
from .registration import differentiable, once_differentiable, only_needed, register_op
from .rows import row_ids, without_padding


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pos_embed: Tensor | None = None,
    ids_keep: Tensor | None = None,
    *,
    prefix: Tensor | None = None,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Embed the visible patches of a batch of images; the others are neither read nor projected.

    ``out[n, R + k] = weight @ patch(images[n], ids_keep[n, k]) + bias + pos_embed[ids_keep[n, k]]``,
    ``out[n, r] = prefix[r]`` for ``r < R``.

    Args:
        images: ``[N, C, H, W]`` or ``[N, C, T, H, W]``, uint8 (read as ``x / 255``), uint16 (read as it is) or
            floating, any strides; N may be 0.
        weight: ``[D, C, ph, pw]`` or ``[D, C, pt, ph, pw]`` floating, as of a convolution; it carries the patch size.
        bias: ``[D]``.
        pos_embed: ``[L, D]`` or ``[1, L, D]``, without rows for the prefix.
        ids_keep: ``[N, K]`` int64, the patches to embed, unique in each row; None embeds all of them in order. Of -1,
            which is no patch, comes a row of zeros.
        prefix: ``[R, D]`` or ``[1, R, D]``, class token or registers, already carrying their own position.
        mean: C values, subtracted from the (scaled) pixels of each channel. Tensors save a copy per call on a GPU.
        std: C values, by which each channel is then divided.
        out_dtype: dtype of the result. None promotes as the published code does: a float32 position embedding on
            a bfloat16 projection gives float32 tokens.

    Returns:
        ``[N, R + K, D]``. Differentiable in weight, bias, pos_embed, prefix, and in images when they are floating.

    Raises:
        TypeError, ValueError: see the message. Ids are checked on the CPU, elsewhere with ``MAE_KERNELS_DEBUG=1``.

    Under autocast the projection runs in the autocast dtype, as a convolution does. In float32 its products are those
    of ``torch.set_float32_matmul_precision``: on a GPU, unlike convolutions, not TF32 unless it is asked for.

    Equivalent PyTorch: :func:`mae_kernels.reference.patch_embed`.
    Source: He et al. 2021, section 3, "MAE encoder".
    """
    op = "patch_embed"
    checks.tensor(op, "weight", weight, ("D", "C", "ph", "pw"), ("D", "C", "pt", "ph", "pw"))
    checks.floating(op, "weight", weight)
    checks.not_empty(op, "weight", weight)
    embed_dim, channels = weight.shape[:2]
    grid = PatchGrid.of(op, images, tuple(weight.shape[2:]))
    if grid.channels != channels:
        raise ValueError(f"{op}: images have {grid.channels} channels, but weight expects {channels}")
    if bias is not None:
        checks.tensor(op, "bias", bias, (embed_dim,))
        checks.floating(op, "bias", bias)
    if pos_embed is not None:
        pos_embed = checks.table(op, "pos_embed", pos_embed, grid.num_patches, embed_dim)
    if prefix is not None:
        prefix = checks.table(op, "prefix", prefix, "R", embed_dim)
    if ids_keep is not None:
        checks.ids(op, "ids_keep", ids_keep, images.shape[0], grid.num_patches)
    tables = {"bias": bias, "pos_embed": pos_embed, "ids_keep": ids_keep, "prefix": prefix}
    checks.same_device(op, "images", images, weight=weight, **tables)
    statistics = checks.statistics(op, mean, std, images, weight.dtype)

    compute_dtype = _compute_dtype(op, images, weight)
    if out_dtype is None:
        out_dtype = compute_dtype
        for table in (pos_embed, prefix):
            out_dtype = out_dtype if table is None else torch.promote_types(out_dtype, table.dtype)
    else:
        checks.out_dtype(op, out_dtype)
    images = as_video(images)
    return _call(images, weight, bias, pos_embed, ids_keep, prefix, statistics, compute_dtype, out_dtype)


def _compute_dtype(op: str, images: Tensor, weight: Tensor) -> torch.dtype:
    autocast = autocast_dtype(images.device)
    if autocast is not None and weight.dtype != torch.float64:
        return autocast
    if images.is_floating_point() and images.dtype != weight.dtype:
        raise TypeError(
            f"{op}: images are {checks.dtype_name(images)}, but weight is {checks.dtype_name(weight)}; "
            "cast one of them, pass uint8 images, or use torch.autocast"
        )
    return weight.dtype


class Inputs(NamedTuple):
    """What reaches the op."""

    images: Tensor  # [N, C, T, H, W]
    weight: Tensor  # [D, C, ph, pw] or [D, C, pt, ph, pw]
    bias: Tensor | None
    pos_embed: Tensor | None  # [L, D]
    ids_keep: Tensor | None
    prefix: Tensor | None  # [R, D]
    statistics: Tensor | None  # [2, C]
    compute_dtype: torch.dtype
    out_dtype: torch.dtype


class Saved(NamedTuple):
    """What its backward needs beside the gradient."""

    images: Tensor
    weight: Tensor
    ids_keep: Tensor | None
    statistics: Tensor | None
    num_prefix: int
    compute_dtype: torch.dtype
    needs: list[bool]  # of images, weight, bias, pos_embed and prefix


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    images, weight, _, _, ids_keep, prefix, statistics, ctx.compute_dtype, _ = inputs
    ctx.save_for_backward(images, weight, ids_keep, statistics)
    ctx.num_prefix = 0 if prefix is None else prefix.shape[0]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs_images, needs_weight, needs_bias, needs_pos, _, needs_prefix = ctx.needs_input_grad[:6]
    needs = [needs_images, needs_weight, needs_bias, needs_pos, needs_prefix]
    saved = *ctx.saved_tensors, ctx.num_prefix, ctx.compute_dtype, needs
    grads = once_differentiable(_patch_embed_backward, grad, *saved)
    *grads, g_prefix = (g if need else None for g, need in zip(grads, needs, strict=True))
    return *grads, None, g_prefix


def _grid(images: Tensor, weight: Tensor) -> PatchGrid:
    return PatchGrid.inside(images.shape[2:], weight.shape[2:], images.shape[1])


def _check(
    images: Tensor, weight: Tensor, bias: Tensor | None, pos_embed: Tensor | None, ids_keep: Tensor | None, *_: Any
) -> None:
    if ids_keep is not None:
        checks.id_values("patch_embed", "ids_keep", ids_keep, _grid(images, weight).num_patches)


class Steps(NamedTuple):
    """What implementations do each in their own way; its two methods are the op and its backward around them."""

    gather: Callable[..., Any]  # images, ids_keep, grid, statistics, dtype -> visible patches [N K, E], normalised
    assemble: Callable[..., Any]  # tokens [N, K, D], pos_embed, ids_keep, prefix, dtype -> [N, R + K, D]
    spread: Callable[..., Any]  # rows [N, K, E], ids_keep, L -> [N, L, E], zero where no row belongs
    sum_positions: Callable[
        ..., Any
    ]  # rows [N, K, D], ids_keep, L, dtype -> [L, D], the sum of those of the same patch

    def embed(self, *inputs: Any) -> Tensor:
        x = Inputs(*inputs)
        patches = self.gather(x.images, x.ids_keep, _grid(x.images, x.weight), x.statistics, x.compute_dtype)
        bias = None if x.bias is None else x.bias.to(x.compute_dtype)
        tokens = products.linear(patches, x.weight.to(x.compute_dtype).flatten(1), bias)
        tokens = tokens.view(len(x.images), -1, tokens.shape[1])  # [N, K, D]
        has_biased_padding = x.ids_keep is not None and bias is not None
        if x.prefix is None and x.pos_embed is None and tokens.dtype == x.out_dtype and not has_biased_padding:
            return tokens
        return self.assemble(tokens, x.pos_embed, x.ids_keep, x.prefix, x.out_dtype)

    def gradients(self, grad: Tensor, *saved: Any) -> tuple[Tensor, ...]:
        x = Saved(*saved)
        needs_images, needs_weight, needs_bias, needs_pos, needs_prefix = x.needs
        grid, images = _grid(x.images, x.weight), x.images
        sum_dtype = accumulation_dtype(grad.dtype)  # autograd casts once, to the dtype of the parameter
        g_images, g_weight, g_bias, g_pos, g_prefix = (grad.new_empty(0) for _ in x.needs)

        if needs_prefix:
            g_prefix = grad[:, : x.num_prefix].sum(0, dtype=sum_dtype)
        g_tokens = grad[:, x.num_prefix :]  # [N, K, D]
        if needs_pos and x.ids_keep is None:
            g_pos = g_tokens.sum(0, dtype=sum_dtype)
        elif needs_pos:
            g_pos = self.sum_positions(g_tokens, x.ids_keep, grid.num_patches, sum_dtype)
        g_tokens = _gradient_rows(g_tokens, x.ids_keep, x.compute_dtype)  # [N K, D]
        if needs_bias:
            g_bias = g_tokens.sum(0, dtype=sum_dtype)
        if needs_weight:
            patches = self.gather(images, x.ids_keep, grid, x.statistics, x.compute_dtype)
            g_weight = _weight_gradient(g_tokens, patches).reshape(x.weight.shape).to(sum_dtype)
        if needs_images:
            g_patches = products.input_gradient(g_tokens, x.weight.to(x.compute_dtype).flatten(1))  # [N K, E]
            if x.statistics is not None:
                g_patches.view(-1, grid.channels, grid.patch_values // grid.channels).div_(x.statistics[1][:, None])
            g_patches = g_patches.view(len(images), -1, grid.patch_values)
            if x.ids_keep is not None:
                g_patches = self.spread(g_patches, x.ids_keep, grid.num_patches)  # [N, L, E]
            g_images = unpatchify(g_patches, grid.patch, tuple(images.shape[2:]), "channels_first").to(images.dtype)
        return g_images, g_weight, g_bias, g_pos, g_prefix


def _gradient_rows(grad: Tensor, ids: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``[N, K, D] -> [N K, D]`` in dtype, zero where the id is -1, whatever arrives there."""
    padding, rows = without_padding(ids)[1], grad.to(dtype)
    return (rows if padding is None else torch.where(padding, 0, rows)).reshape(-1, grad.shape[2])


def _assemble(
    tokens: Tensor, pos_embed: Tensor | None, ids_keep: Tensor | None, prefix: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    num_prefix = 0 if prefix is None else prefix.shape[0]
    out = tokens.new_empty((tokens.shape[0], num_prefix + tokens.shape[1], tokens.shape[2]), dtype=out_dtype)
    if prefix is not None:
        out[:, :num_prefix] = prefix
    ids_keep, padding = without_padding(ids_keep)
    if pos_embed is None:
        out[:, num_prefix:] = tokens
    else:
        if ids_keep is not None:
            pos_embed = pos_embed.index_select(0, ids_keep.flatten()).view_as(tokens)
        torch.add(tokens, pos_embed, out=out[:, num_prefix:])
    if padding is not None:
        out[:, num_prefix:].masked_fill_(padding, 0)
    return out


def _fake(*inputs: Any) -> Tensor:
    x = Inputs(*inputs)
    num_prefix = 0 if x.prefix is None else x.prefix.shape[0]
    visible = _grid(x.images, x.weight).num_patches if x.ids_keep is None else x.ids_keep.shape[1]
    return x.images.new_empty((x.images.shape[0], num_prefix + visible, x.weight.shape[0]), dtype=x.out_dtype)


def _sum_positions(grad: Tensor, ids_keep: Tensor, num_patches: int, sum_dtype: torch.dtype) -> Tensor:
    rows = grad.reshape(-1, grad.shape[2]).to(sum_dtype)
    no_position = -1
    return torch.ops.aten.embedding_dense_backward(rows, ids_keep.flatten(), num_patches, no_position, False)


def _backward_fake(grad: Tensor, *saved: Any) -> tuple[Tensor, ...]:
    x, sum_dtype = Saved(*saved), accumulation_dtype(grad.dtype)
    d, num_patches = x.weight.shape[0], _grid(x.images, x.weight).num_patches
    shapes = [x.images.shape, x.weight.shape, (d,), (num_patches, d), (x.num_prefix, d)]
    return only_needed(grad, x.needs, shapes, [x.images.dtype] + [sum_dtype] * 4)


def _gather(
    images: Tensor, ids_keep: Tensor | None, grid: PatchGrid, statistics: Tensor | None, dtype: torch.dtype
) -> Tensor:
    ids_keep, padding = without_padding(ids_keep)
    flat_ids = None if ids_keep is None else row_ids(ids_keep, grid.num_patches)
    patches = normalize_pixels(gather_patches(images, flat_ids, grid, "channels_first"), statistics, dtype)
    return patches if padding is None else patches.masked_fill_(padding.flatten(0, 1), 0)


def _weight_gradient(grad: Tensor, patches: Tensor) -> Tensor:
    """``grad [B, D].T @ patches [B, E]`` as ``[D, E]``, in float32 or the dtype of both."""
    # PyTorch promises a float32 product of half precision on CUDA alone, and calls ROCm's devices cuda too.
    if grad.is_cuda and torch.version.hip is None and grad.dtype != torch.float64:
        return _product_in_float32(grad, patches)
    return products.weight_gradient(grad, patches)


def _product_in_float32(grad: Tensor, patches: Tensor) -> Tensor:
    if grad.dtype != torch.float32:
        return torch.mm(grad.t(), patches, out_dtype=torch.float32)  # half precision is rounded once, by autograd
    # Some products of cuBLAS add all rows in one chain and stray 7 times as far as the reference's convolution. Where
    # it splits the rows itself, parts cost a sixth of the time (benchmarks/NOTES.md, "On a GPU").
    parts = gcd(len(grad), 16)
    return (grad.view(parts, -1, grad.shape[1]).mT @ patches.view(parts, -1, patches.shape[1])).sum(0)


_EAGER = Steps(_gather, _assemble, gather_tokens_backward_eager, _sum_positions)

_patch_embed = register_op(
    "patch_embed(Tensor images, Tensor weight, Tensor? bias, Tensor? pos_embed, Tensor? ids_keep, Tensor? prefix, "
    "Tensor? statistics, ScalarType compute_dtype, ScalarType out_dtype) -> Tensor",
    eager=_EAGER.embed,
    fake=_fake,
    check=_check,
)
_patch_embed_backward = register_op(
    "patch_embed_backward(Tensor grad, Tensor images, Tensor weight, Tensor? ids_keep, Tensor? statistics, "
    "SymInt num_prefix, ScalarType compute_dtype, bool[5] needs) "
    "-> (Tensor g_images, Tensor g_weight, Tensor g_bias, Tensor g_pos_embed, Tensor g_prefix)",
    eager=_EAGER.gradients,
    fake=_backward_fake,
)
_call = differentiable(_patch_embed, _setup_context, _backward)
