"""Patchify, normalise, project, add positions and prefix tokens: for the visible patches only."""

from collections.abc import Callable, Sequence
from functools import cache
from math import gcd, prod
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mae_kernels import checks
from mae_kernels.patchify import gather_patches, normalize_pixels, patch_grid, unpatchify
from mae_kernels.precision import accumulation_dtype
from mae_kernels.registration import call, define, differentiable, once
from mae_kernels.rows import row_ids


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
        images: ``[N, C, H, W]``, uint8 or floating, any strides; N may be 0. uint8 is read as ``x / 255``.
        weight: ``[D, C, ph, pw]`` floating, as of a convolution; it carries the patch size in pixels.
        bias: ``[D]``.
        pos_embed: ``[L, D]`` or ``[1, L, D]``, without rows for the prefix.
        ids_keep: ``[N, K]`` int64, the patches to embed, unique in each row; None embeds all of them in order.
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
    if isinstance(weight, Tensor) and weight.ndim == 5:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}; video and volumes are not supported yet")
    checks.tensor(op, "weight", weight, ("D", "C", "ph", "pw"))
    checks.floating(op, "weight", weight)
    checks.not_empty(op, "weight", weight)
    embed_dim, channels, *patch = weight.shape
    checks.images(op, images, tuple(patch))
    if images.shape[1] != channels:
        raise ValueError(f"{op}: images have {images.shape[1]} channels, but weight expects {channels}")
    num_patches = prod(patch_grid(images, patch))
    if bias is not None:
        checks.tensor(op, "bias", bias, (embed_dim,))
        checks.floating(op, "bias", bias)
    if pos_embed is not None:
        pos_embed = checks.table(op, "pos_embed", pos_embed, num_patches, embed_dim)
    if prefix is not None:
        prefix = checks.table(op, "prefix", prefix, "R", embed_dim)
    if ids_keep is not None:
        checks.ids(op, "ids_keep", ids_keep, images.shape[0], num_patches)
    checks.same_device(op, "images", images, weight=weight, bias=bias, pos_embed=pos_embed, ids_keep=ids_keep)
    checks.same_device(op, "images", images, prefix=prefix)
    mean, std = checks.mean_std(op, mean, std, images, weight.dtype)

    compute_dtype = _compute_dtype(op, images, weight)
    if out_dtype is None:
        out_dtype = compute_dtype
        for table in (pos_embed, prefix):
            out_dtype = out_dtype if table is None else torch.promote_types(out_dtype, table.dtype)
    else:
        checks.out_dtype(op, out_dtype)
    return call(_PatchEmbed, images, weight, bias, pos_embed, ids_keep, prefix, mean, std, compute_dtype, out_dtype)


def _compute_dtype(op: str, images: Tensor, weight: Tensor) -> torch.dtype:
    device_type = images.device.type
    if torch.is_autocast_enabled(device_type) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    if images.dtype not in (torch.uint8, weight.dtype):
        raise TypeError(
            f"{op}: images are {checks.dtype_name(images)}, but weight is {checks.dtype_name(weight)}; "
            "cast one of them, pass uint8 images, or use torch.autocast"
        )
    return weight.dtype


class _PatchEmbed(torch.autograd.Function):
    @staticmethod
    def setup_context(ctx, inputs, output):
        images, weight, _, _, ids_keep, prefix, mean, std, ctx.compute_dtype, _ = inputs
        ctx.save_for_backward(images, weight, ids_keep, mean, std)
        ctx.num_prefix = 0 if prefix is None else prefix.shape[0]

    @staticmethod
    def backward(ctx, grad):
        images, weight, ids_keep, mean, std = ctx.saved_tensors
        needs_images, needs_weight, needs_bias, needs_pos, _, needs_prefix = ctx.needs_input_grad[:6]
        needs = [needs_images, needs_weight, needs_bias, needs_pos, needs_prefix]
        grads = once(
            _patch_embed_backward, grad, images, weight, ids_keep, mean, std, ctx.num_prefix, ctx.compute_dtype, needs
        )
        g_images, g_weight, g_bias, g_pos, g_prefix = (
            g if need else None for g, need in zip(grads, needs, strict=True)
        )
        return g_images, g_weight, g_bias, g_pos, None, g_prefix, None, None, None, None


def _patch_embed_check(images, weight, bias, pos_embed, ids_keep, *_):
    if ids_keep is not None:
        checks.id_values("patch_embed", "ids_keep", ids_keep, prod(patch_grid(images, weight.shape[2:])))


class Steps(NamedTuple):
    """What implementations do each in their own way; its two methods are the op and its backward around them."""

    gather: Callable  # images, ids_keep, patch, mean, std, dtype -> visible patches [N K, E], normalised
    assemble: Callable  # tokens [N, K, D], pos_embed, ids_keep, prefix, dtype -> [N, R + K, D]
    spread: Callable  # rows [N, K, E], ids_keep, L -> [N, L, E], zero where no row belongs
    sum_positions: Callable  # rows [N, K, D], ids_keep, L, dtype -> [L, D], the sum of those of the same patch

    def embed(self, images, weight, bias, pos_embed, ids_keep, prefix, mean, std, compute_dtype, out_dtype):
        n, (d, _, *patch) = images.shape[0], weight.shape
        patches = self.gather(images, ids_keep, patch, mean, std, compute_dtype)  # [N K, E]
        bias = None if bias is None else bias.to(compute_dtype)
        tokens = _project(patches, weight.to(compute_dtype).flatten(1), bias).view(n, -1, d)  # [N, K, D]
        if prefix is None and pos_embed is None and tokens.dtype == out_dtype:
            return tokens
        return self.assemble(tokens, pos_embed, ids_keep, prefix, out_dtype)

    def gradients(self, grad, images, weight, ids_keep, mean, std, num_prefix, compute_dtype, needs):
        needs_images, needs_weight, needs_bias, needs_pos, needs_prefix = needs
        n, d, patch = images.shape[0], weight.shape[0], weight.shape[2:]
        sum_dtype = accumulation_dtype(grad.dtype)  # autograd casts once, to the dtype of the parameter
        num_patches = prod(patch_grid(images, patch))
        g_images, g_weight, g_bias, g_pos, g_prefix = (grad.new_empty(0, dtype=sum_dtype) for _ in needs)

        if needs_prefix:
            g_prefix = grad[:, :num_prefix].sum(0, dtype=sum_dtype)
        g_tokens = grad[:, num_prefix:]  # [N, K, D]
        if needs_pos and ids_keep is None:
            g_pos = g_tokens.sum(0, dtype=sum_dtype)
        elif needs_pos:
            g_pos = self.sum_positions(g_tokens, ids_keep, num_patches, sum_dtype)
        g_tokens = g_tokens.to(compute_dtype).reshape(-1, d)  # [N K, D]
        if needs_bias:
            g_bias = g_tokens.sum(0, dtype=sum_dtype)
        if needs_weight:
            patches = self.gather(images, ids_keep, patch, mean, std, compute_dtype)
            g_weight = _weight_gradient(g_tokens, patches).reshape(weight.shape).to(sum_dtype)
        if needs_images:
            g_patches = g_tokens @ weight.to(compute_dtype).flatten(1)  # [N K, E]
            if std is not None:
                g_patches.view(-1, images.shape[1], patch[0] * patch[1]).div_(std[:, None])
            g_patches = g_patches.view(n, -1, g_patches.shape[1])
            if ids_keep is not None:
                g_patches = self.spread(g_patches, ids_keep, num_patches)  # [N, L, E]
            g_images = unpatchify(g_patches, tuple(patch), tuple(images.shape[2:]), "channels_first").to(images.dtype)
        return g_images, g_weight, g_bias, g_pos, g_prefix


def _assemble(tokens, pos_embed, ids_keep, prefix, out_dtype):
    num_prefix = 0 if prefix is None else prefix.shape[0]
    out = tokens.new_empty((tokens.shape[0], num_prefix + tokens.shape[1], tokens.shape[2]), dtype=out_dtype)
    if prefix is not None:
        out[:, :num_prefix] = prefix
    if pos_embed is None:
        out[:, num_prefix:] = tokens
    else:
        if ids_keep is not None:
            pos_embed = pos_embed.index_select(0, ids_keep.flatten()).view_as(tokens)
        torch.add(tokens, pos_embed, out=out[:, num_prefix:])
    return out


def _patch_embed_fake(images, weight, bias, pos_embed, ids_keep, prefix, mean, std, compute_dtype, out_dtype):
    d, _, ph, pw = weight.shape
    num_prefix = 0 if prefix is None else prefix.shape[0]
    visible = prod(patch_grid(images, (ph, pw))) if ids_keep is None else ids_keep.shape[1]
    return images.new_empty((images.shape[0], num_prefix + visible, d), dtype=out_dtype)


def _spread(rows, ids_keep, num_patches):
    n, k, values = rows.shape
    spread = rows.new_zeros((n * num_patches, values))
    return spread.index_copy_(0, row_ids(ids_keep, num_patches), rows.view(n * k, values)).view(n, num_patches, values)


def _sum_positions(grad, ids_keep, num_patches, sum_dtype):
    rows = grad.reshape(-1, grad.shape[2]).to(sum_dtype)
    return torch.ops.aten.embedding_dense_backward(rows, ids_keep.flatten(), num_patches, -1, False)


def _patch_embed_backward_fake(grad, images, weight, ids_keep, mean, std, num_prefix, compute_dtype, needs):
    sum_dtype = accumulation_dtype(grad.dtype)
    d, _, ph, pw = weight.shape
    num_patches = prod(patch_grid(images, (ph, pw)))
    shapes = [images.shape, weight.shape, (d,), (num_patches, d), (num_prefix, d)]
    dtypes = [images.dtype] + [sum_dtype] * 4
    return tuple(
        grad.new_empty(shape if need else 0, dtype=dtype if need else sum_dtype)
        for shape, dtype, need in zip(shapes, dtypes, needs, strict=True)
    )


def _gather(images, ids_keep, patch, mean, std, dtype):
    num_patches = prod(patch_grid(images, patch))
    flat_ids = None if ids_keep is None else row_ids(ids_keep, num_patches)
    patches = gather_patches(images, flat_ids, patch, "channels_first")
    return normalize_pixels(patches, images.shape[1], mean, std, dtype, "channels_first")


def _project(patches: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``patches [B, E] @ weight [D, E].T + bias`` as ``[B, D]``."""
    if not _convolution_is_faster(patches):
        return F.linear(patches, weight, bias)
    return F.conv2d(_as_pixels(patches), weight[:, :, None, None], bias)[0, :, 0].t().contiguous()


def _weight_gradient(grad: Tensor, patches: Tensor) -> Tensor:
    """``grad [B, D].T @ patches [B, E]`` as ``[D, E]``, in float32 or the dtype of both."""
    # PyTorch promises a float32 product of half precision on CUDA alone, and calls ROCm's devices cuda too.
    if grad.is_cuda and torch.version.hip is None and grad.dtype != torch.float64:
        return _product_in_float32(grad, patches)
    if not _convolution_is_faster(patches):
        return grad.t() @ patches
    weight = patches.new_empty((grad.shape[1], patches.shape[1], 1, 1))
    _, g_weight, _ = torch.ops.aten.convolution_backward(
        _as_pixels(grad), _as_pixels(patches), weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1,
        [False, True, False],
    )  # fmt: skip
    return g_weight


def _product_in_float32(grad: Tensor, patches: Tensor) -> Tensor:
    if grad.dtype != torch.float32:
        return torch.mm(grad.t(), patches, out_dtype=torch.float32)  # half precision is rounded once, by autograd
    # Some products of cuBLAS add all rows in one chain and stray 7 times as far as the reference's convolution. Where
    # it splits the rows itself, parts cost a sixth of the time (benchmarks/NOTES.md, "On a GPU").
    parts = gcd(len(grad), 16)
    return (grad.view(parts, -1, grad.shape[1]).mT @ patches.view(parts, -1, patches.shape[1])).sum(0)


def _convolution_is_faster(x: Tensor) -> bool:
    # On x86 oneDNN serves convolutions and MKL matrix products. [1568, 768] x [768, 768] on two cores, torch 2.13:
    # AMD EPYC (Zen 5): 1x1 convolution 4.3 ms forward and 5.1 ms weight gradient, matrix product 9.9 ms and 9.9 ms;
    # Intel Xeon (AMX): 5.6 and 7.0 ms against 5.5 and 5.7 ms.
    return x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available() and _is_amd()


@cache
def _is_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore")
    except OSError:  # not on Linux
        return False


def _as_pixels(rows: Tensor) -> Tensor:
    # [B, E] -> [1, E, 1, B]: one image of B pixels. The permutation makes all four strides those of channels last;
    # with any other PyTorch copies, which takes twice the memory and adds in a less accurate order.
    return rows[None, None].permute(0, 3, 1, 2)


_EAGER = Steps(_gather, _assemble, _spread, _sum_positions)

_patch_embed = define(
    "patch_embed(Tensor images, Tensor weight, Tensor? bias, Tensor? pos_embed, Tensor? ids_keep, Tensor? prefix, "
    "Tensor? mean, Tensor? std, ScalarType compute_dtype, ScalarType out_dtype) -> Tensor",
    eager=_EAGER.embed,
    fake=_patch_embed_fake,
    check=_patch_embed_check,
)
_patch_embed_backward = define(
    "patch_embed_backward(Tensor grad, Tensor images, Tensor weight, Tensor? ids_keep, Tensor? mean, Tensor? std, "
    "SymInt num_prefix, ScalarType compute_dtype, bool[5] needs) "
    "-> (Tensor g_images, Tensor g_weight, Tensor g_bias, Tensor g_pos_embed, Tensor g_prefix)",
    eager=_EAGER.gradients,
    fake=_patch_embed_backward_fake,
)

differentiable(_patch_embed, _PatchEmbed)
