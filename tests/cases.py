"""Inputs of the ops in every dtype and layout that a model hands over, and the rule that judges the results."""

from collections.abc import Callable, Iterable
from itertools import cycle
from math import prod

import pytest
import torch
from torch import Tensor

from mae_kernels import (
    PackedImages,
    gather_tokens,
    linear_masked_mse,
    masked_mse,
    masking_from_mask,
    patch_embed,
    random_crop_boxes,
    random_masking,
    random_resized_crop,
    reference,
    scatter_mask_tokens,
)

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
U8, U16 = torch.uint8, torch.uint16

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Built in their final dtype: a conversion would make slices contiguous.
_TOKENS: dict[str, Callable] = {
    "contiguous": lambda draw, n, t, d: draw(n, t, d),
    "slice": lambda draw, n, t, d: draw(n, t + 1, d)[:, 1:],
    "cat": lambda draw, n, t, d: draw(n, t + 5, d)[:, 2 : 2 + t],
    "sum": lambda draw, n, t, d: draw(1, 1, 1).expand(n, t, d),
    "one sample": lambda draw, n, t, d: draw(1, t, d).expand(n, t, d),
    "one token": lambda draw, n, t, d: draw(n, 1, d).expand(n, t, d),
    "permute": lambda draw, n, t, d: draw(n, d, t).permute(0, 2, 1),
    "tokens first": lambda draw, n, t, d: draw(t, n, d).transpose(0, 1),
    "every second value": lambda draw, n, t, d: draw(n, t, 2 * d)[..., ::2],
    "part of the values": lambda draw, n, t, d: draw(n, t, d + 8)[..., 3 : 3 + d],
    "every second token": lambda draw, n, t, d: draw(n, 2 * t, d)[:, ::2],
    "padded samples": lambda draw, n, t, d: draw(n, t * d + 1)[:, 1:].unflatten(1, (t, d)),
    "windows": lambda draw, n, t, d: draw(n + t, d).as_strided((n, t, d), (d, d, 1)),
}
TOKEN_STRIDES = tuple(_TOKENS)

_IMAGES: dict[str, Callable] = {
    "contiguous": lambda draw, n, c, h, w: draw(n, c, h, w),
    "channels_last": lambda draw, n, c, h, w: draw(n, h, w, c).permute(0, 3, 1, 2),
    "cropped": lambda draw, n, c, h, w: draw(n, c, h + 16, w)[:, :, 8 : 8 + h, :],
    "cropped both": lambda draw, n, c, h, w: draw(n, c, h + 16, w + 6)[:, :, 8 : 8 + h, 3 : 3 + w],
    "cropped channels_last": lambda draw, n, c, h, w: draw(n, h + 16, w, c)[:, 8 : 8 + h].permute(0, 3, 1, 2),
    "some channels": lambda draw, n, c, h, w: draw(n, h, w, c + 1).permute(0, 3, 1, 2)[:, 1:],
    "expanded": lambda draw, n, c, h, w: draw(1, c, h, w).expand(n, c, h, w),
    "grey": lambda draw, n, c, h, w: draw(n, 1, h, w).expand(n, c, h, w),
    "transposed": lambda draw, n, c, h, w: draw(n, c, w, h).transpose(2, 3),
}
IMAGE_STRIDES = tuple(_IMAGES)


def in_turn(values: Iterable, *others: Iterable) -> list[tuple]:
    """Each of the values with one of each of the others, which take turns: axes that do not touch one another."""
    return list(zip(values, *map(cycle, others), strict=False))


def tokens(n: int, t: int, d: int, dtype: torch.dtype = F32, strides: str = "contiguous") -> Tensor:
    """``[N, T, D]``, normally distributed: token sequences, predictions, and the gradients of either."""
    return _TOKENS[strides](lambda *shape: torch.randn(shape, dtype=dtype), n, t, d)


def images(n: int, c: int, h: int, w: int, dtype: torch.dtype = F32, strides: str = "contiguous") -> Tensor:
    """``[N, C, H, W]`` in [0, 1], or all that uint8 and uint16 can be."""
    if not dtype.is_floating_point:
        most = torch.iinfo(dtype).max + 1
        return _IMAGES[strides](lambda *shape: torch.randint(most, shape).to(dtype), n, c, h, w)
    return _IMAGES[strides](lambda *shape: torch.rand(shape, dtype=dtype), n, c, h, w)


def images_of(n, c, grid, patch, dtype: torch.dtype = F32, strides: str = "contiguous") -> Tensor:
    """Images of a grid of patches, ``[N, C, H, W]`` or, for three sides, ``[N, C, T, H, W]``."""
    *frames, height, width = (count * side for count, side in zip(grid, patch, strict=True))
    x = images(n, c, prod(frames) * height, width, dtype, strides)
    return x.unflatten(2, (*frames, height)) if frames else x


def ids(n: int, num_patches: int, k: int) -> Tensor:
    """``[N, K]``: k different patches of each sample, in shuffled order."""
    return torch.rand(n, num_patches).argsort(dim=1)[:, :k].contiguous()


def padded_ids(n: int) -> Tensor:
    """``[N, 12]``: ids below 32, of which every row holds fewer than the one before, and -1."""
    chosen = ids(n, 32, 12)
    return chosen.masked_fill(torch.arange(12) >= 12 - torch.arange(n)[:, None] % 12, -1)


def mean_std(c: int) -> dict[str, list[float]]:
    """A different mean and std for every channel, so that a swapped or a shared one is seen."""
    return {"mean": [MEAN[i % 3] + 0.01 * i for i in range(c)], "std": [STD[i % 3] + 0.02 * i for i in range(c)]}


def patch_embed_inputs(
    n, grid, patch, c, d, *, dtype=F32, pixels=None, table=None, strides="contiguous", k=None, r=0, pos=True, norm=False
) -> dict:
    """Arguments of patch_embed: ``pixels`` and ``table`` are the dtypes of images and of pos_embed, prefix."""
    num_patches, table = prod(grid), table or dtype
    inputs = {
        "images": images_of(n, c, grid, patch, pixels or dtype, strides),
        "weight": (torch.randn(d, c, *patch) / (c * prod(patch)) ** 0.5).to(dtype),
        "bias": torch.randn(d).to(dtype),
        "ids_keep": None if k is None else ids(n, num_patches, k),
    }
    if pos:
        inputs["pos_embed"] = torch.randn(num_patches, d).to(table)
    if r:
        inputs["prefix"] = torch.randn(r, d).to(table)
    return {**inputs, **(mean_std(c) if norm else {})}


def scatter_inputs(n, num_patches, k, d, r, *, dtype=F32, table=None, pos=None, strides="contiguous") -> dict:
    """Arguments of scatter_mask_tokens: ``pos`` is the number of rows of pos_embed."""
    table = table or dtype
    return {
        "tokens": tokens(n, r + k, d, dtype, strides),
        "mask_token": torch.randn(d).to(table),
        "ids_restore": reference.random_masking(n, num_patches, 0.5).ids_restore.contiguous(),
        "pos_embed": None if pos is None else torch.randn(pos, d).to(table),
        "num_prefix": r,
    }


def loss_inputs(
    n, grid, patch, c, *, dtype=F32, pixels=None, strides="contiguous", image_strides="contiguous", masked=None,
    by="mask", layout="channels_last", norm_pix=True, norm=False,
) -> dict:  # fmt: skip
    """Arguments of masked_mse: ``masked`` patches per sample, as ``by`` = "mask", "float mask" or "ids_mask"."""
    num_patches, values = prod(grid), c * prod(patch)
    chosen = ids(n, num_patches, masked or max(1, 3 * num_patches // 4))
    mask = torch.zeros(n, num_patches, dtype=torch.bool).scatter_(1, chosen, True)
    which = {"mask": {"mask": mask}, "float mask": {"mask": mask.float()}, "ids_mask": {"ids_mask": chosen}}[by]
    return {
        "pred": tokens(n, chosen.shape[1] if by == "ids_mask" else num_patches, values, dtype, strides),
        "images": images_of(n, c, grid, patch, pixels or dtype, image_strides),
        "patch_size": patch,
        "layout": layout,
        "norm_pix": norm_pix,
        **which,
        **(mean_std(c) if norm else {}),
    }


def head_inputs(n, grid, patch, c, d, *, dtype=F32, strides="contiguous", masked=None, bias=True, **options) -> dict:
    """Arguments of linear_masked_mse: those of masked_mse with ids_mask, and a head [E, D] instead of its result."""
    inputs = loss_inputs(n, grid, patch, c, dtype=dtype, masked=masked, by="ids_mask", **options)
    _, m, values = inputs.pop("pred").shape
    return {
        "hidden": tokens(n, m, d, dtype, strides),
        "weight": (torch.randn(values, d) / d**0.5).to(dtype),
        "bias": torch.randn(values).to(dtype) if bias else None,
        **inputs,
    }


def crop_inputs(n, c, h, w, size, *, strides="contiguous", packed=False) -> dict:
    """Arguments of random_resized_crop: boxes as published, every second picture flipped."""
    pictures = images(n, c, h, w, U8, strides)
    return {
        "images": PackedImages.pack(list(pictures)) if packed else pictures,
        "boxes": random_crop_boxes(torch.tensor([[h, w]] * n)),
        "flips": torch.arange(n) % 2 == 1,
        "size": size,
    }


def dispatcher_calls() -> list[tuple]:
    """Op and arguments, for every op of torch.ops.mae_kernels: options given and left out, odd strides, one sample."""
    ops = torch.ops.mae_kernels
    norm = torch.tensor([*mean_std(3).values()])
    last, plain = images_of(3, 3, (1, 2, 4), (1, 4, 4), U8, "channels_last"), images_of(1, 3, (1, 2, 4), (1, 4, 4))
    clips = images_of(3, 3, (2, 2, 2), (2, 4, 2), U16)
    table, weight, bias, token = torch.randn(8, 5), torch.randn(5, 3, 4, 4), torch.randn(5), torch.randn(5)
    keep, keep1, restore, restore1 = ids(3, 8, 2), ids(1, 8, 2), ids(3, 8, 8), ids(1, 8, 8)
    mask, residual, scale = torch.rand(3, 8) < 0.5, tokens(3, 8, 48), torch.tensor(0.1)
    no, yes, head, padded = False, True, torch.randn(48, 5) / 5, torch.tensor([[1, 0], [7, -1], [-1, -1]])
    whole, plainly = ([1, 4, 4], "patch", 1e-6, "channels_last"), ([1, 4, 4], "none", 1e-6, "channels_first")
    each = [2, 4, 2], "channel", 1e-6, "channels_last"
    pixels = last[:, :, 0]
    packed, flips = PackedImages.pack([pixels[0], pixels[1, :, 3:, :10]]), torch.tensor([yes, no, yes])
    boxes = torch.tensor([[0, 0, 8, 16], [2, 3, 3, 7], [7, 15, 1, 1]])
    return [
        (ops.masking, torch.rand(3, 8), None, 2, 6),
        (ops.masking, torch.rand(1, 8), None, 2, 6),
        (ops.masking, torch.rand(8, 3).t(), None, 2, 6),
        (ops.masking, torch.rand(2, 8) < 0.5, torch.tensor([3, 1]), 4, 7),
        (ops.masking, mask, None, 5, 3),
        (ops.gather_tokens, tokens(3, 8, 5, strides="slice"), keep),
        (ops.gather_tokens, tokens(1, 8, 5, BF16, "permute"), keep1),
        (ops.gather_tokens_backward, tokens(3, 2, 5, strides="sum"), keep, 8),
        (ops.gather_tokens_backward, tokens(1, 2, 5, strides="permute"), keep1, 8),
        (ops.scatter_mask_tokens, tokens(3, 3, 5, BF16), token, restore, table, 1, F32),
        (ops.scatter_mask_tokens, tokens(1, 2, 5, strides="permute"), token, restore1, None, 0, F16),
        (ops.scatter_mask_tokens_backward, tokens(3, 9, 5), restore, 3, 1, 9, F32, [yes, yes, yes]),
        (ops.scatter_mask_tokens_backward, tokens(1, 9, 5, strides="permute"), restore1, 3, 1, 8, BF16, [yes, no, no]),
        (ops.scatter_mask_tokens_backward, tokens(3, 9, 5, strides="sum"), restore, 3, 1, 0, F32, [no, yes, yes]),
        (ops.masked_mse, tokens(3, 8, 48, BF16), last, mask, norm, yes, *whole),
        (ops.masked_mse, tokens(1, 2, 48), plain, keep1, None, yes, *plainly),
        (ops.masked_mse, tokens(3, 2, 48, F64), last, keep, None, no, *plainly),
        (ops.masked_mse, tokens(3, 8, 48), last, mask * 0.0, norm, yes, *whole),
        (ops.masked_mse, tokens(3, 2, 48), clips, padded, norm, yes, *each),
        (ops.masked_mse_recomputed_backward, tokens(3, 8, 48, BF16), last, mask, norm, scale + 2, scale, *whole),
        (ops.masked_mse_recomputed_backward, tokens(1, 2, 48), plain, keep1, None, torch.tensor(2.0), scale, *plainly),
        (ops.masked_mse_backward, residual, torch.tensor(2.0), scale, F16),
        (ops.masked_mse_backward, residual[:1], torch.tensor(2.0).expand(()), scale, F32),
        (ops.linear_masked_mse, tokens(3, 2, 5, BF16, "permute"), head, torch.randn(48), last, keep, norm, BF16,
         [yes, yes, yes], *whole),
        (ops.linear_masked_mse, tokens(1, 2, 5), head, None, plain, keep1, None, F32, [yes, no, no], *plainly),
        (ops.linear_masked_mse, tokens(3, 2, 5, F64), head.double(), None, last, keep, None, F64, [no, yes, no],
         *plainly),
        (ops.linear_masked_mse, tokens(3, 2, 5), head, torch.randn(48), clips, padded, norm, F32, [no, no, no], *each),
        (ops.linear, tokens(3, 2, 5), torch.randn(5, 7).t(), torch.randn(7)),
        (ops.linear, tokens(1, 2, 5)[0], torch.randn(7, 5), None),
        (ops.weight_gradient, torch.randn(6, 5), torch.randn(6, 8)),
        (ops.weight_gradient, torch.randn(6, 8), torch.randn(6, 5)),
        (ops.random_resized_crop, pixels, None, None, boxes, flips, [9, 20]),
        (ops.random_resized_crop, pixels[:1], None, None, boxes[1:2], flips[::3], [1, 1]),
        (ops.random_resized_crop, *packed, boxes[1].repeat(2, 1), flips[:2], [17, 33]),
        (ops.patch_embed, last, weight, bias, table, keep, torch.randn(2, 5), norm, BF16, F32),
        (ops.patch_embed, plain, weight, None, None, None, None, None, F32, F32),
        (ops.patch_embed, plain, weight, None, None, keep1, None, None, F32, F16),
        (ops.patch_embed, clips, weight.view(5, 3, 2, 4, 2), bias, None, padded, None, norm, F32, F32),
        (ops.patch_embed_backward, tokens(3, 4, 5), last, weight, keep, norm, 2, F32, [no, yes, yes, yes, yes]),
        (ops.patch_embed_backward, tokens(3, 2, 5), clips, weight.view(5, 3, 2, 4, 2), padded, norm, 0, F32,
         [no, yes, yes, yes, no]),
        (ops.patch_embed_backward, tokens(1, 8, 5, strides="permute"), plain, weight, None, None, 0, F32,
         [yes, yes, yes, yes, no]),
        (ops.patch_embed_backward, tokens(1, 2, 5, BF16, "sum"), plain, weight, keep1, norm, 0, BF16,
         [yes, yes, yes, yes, no]),
        (ops.patch_embed_backward, tokens(1, 2, 5), plain[:, :1, :, :, :4], weight[:, :1], ids(1, 2, 2), None, 0,
         F32, [yes, no, no, no, no]),
    ]  # fmt: skip


def _masking_in_one(noise):
    return torch.cat([x.double() for x in random_masking(*noise.shape, 0.7, noise=noise)], dim=1)


def _unequal_masking_in_one(mask):
    return torch.cat([x.double() for x in masking_from_mask(mask, num_keep=40)], dim=1)


# Op, inputs for a batch of n, inputs with a gradient. No size equals 3, 4, 5, 7 or 11 but that of such a batch.
GRID, PATCH = (2, 7), (8, 8)
CLIPS = (2, 8, 2), (8, 2, 8)
OPS_BY_NAME = {
    "masking": (_masking_in_one, lambda n: {"noise": torch.rand(n, 49)}, ()),
    "masking, unequal counts": (_unequal_masking_in_one, lambda n: {"mask": torch.rand(n, 49) < 0.6}, ()),
    "gather": (gather_tokens, lambda n: {"tokens": tokens(n, 49, 24), "ids": ids(n, 49, 12)}, ("tokens",)),
    "scatter": (
        scatter_mask_tokens,
        lambda n: scatter_inputs(n, 49, 12, 24, 2, pos=51),
        ("tokens", "mask_token", "pos_embed"),
    ),
    "scatter, no table": (scatter_mask_tokens, lambda n: scatter_inputs(n, 49, 12, 24, 0), ("tokens", "mask_token")),
    "loss, mask": (masked_mse, lambda n: loss_inputs(n, GRID, PATCH, 3, norm=True), ("pred",)),
    "loss, ids": (
        masked_mse,
        lambda n: loss_inputs(n, GRID, PATCH, 3, by="ids_mask", pixels=U8, layout="channels_first"),
        ("pred",),
    ),
    "head and loss": (
        linear_masked_mse,
        lambda n: head_inputs(n, GRID, PATCH, 3, 24, norm=True),
        ("hidden", "weight", "bias"),
    ),
    "head and loss, uint8": (
        linear_masked_mse,
        lambda n: head_inputs(n, GRID, PATCH, 3, 24, bias=False, pixels=U8, layout="channels_first"),
        ("hidden", "weight"),
    ),
    "embed": (
        patch_embed,
        lambda n: patch_embed_inputs(n, GRID, PATCH, 3, 24, k=12, r=2, norm=True),
        ("images", "weight", "bias", "pos_embed", "prefix"),
    ),
    "embed, uint8": (
        patch_embed,
        lambda n: patch_embed_inputs(n, GRID, PATCH, 3, 24, pixels=U8, pos=False),
        ("weight", "bias"),
    ),
    "embed, clips": (
        patch_embed,
        lambda n: {**patch_embed_inputs(n, *CLIPS, 1, 24, pixels=U16, k=12, norm=True), "ids_keep": padded_ids(n)},
        ("weight", "bias", "pos_embed"),
    ),
    "loss, clips": (
        masked_mse,
        lambda n: {
            **loss_inputs(n, *CLIPS, 2, by="ids_mask", masked=12, norm_pix="channel"),
            "ids_mask": padded_ids(n),
        },
        ("pred",),
    ),
    "crop": (random_resized_crop, lambda n: crop_inputs(n, 3, 16, 24, (9, 14)), ()),
    "crop, packed": (random_resized_crop, lambda n: crop_inputs(n, 3, 16, 24, (9, 14), packed=True), ()),
}


def for_compilers(names: Iterable[str]) -> list:
    """Names of OPS_BY_NAME as parameters; a compiler takes a second for each, so other calls of an op wait for CI."""
    called, parameters = set(), []
    for name in names:
        op, _, _ = OPS_BY_NAME[name]
        parameters.append(pytest.param(name, marks=pytest.mark.slow if op in called else ()))
        called.add(op)
    return parameters


def run(op: Callable, inputs: dict, grad: Tensor | None = None, wrt: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The value of ``op(**inputs)`` and, for the output's gradient grad, the gradients of the inputs in wrt."""
    leaves = {name: x.detach().requires_grad_() if name in wrt else x for name, x in inputs.items()}
    out = op(**leaves)
    grads = torch.autograd.grad(out, [leaves[name] for name in wrt], grad) if wrt else ()
    return {"value": out.detach(), **dict(zip(wrt, grads, strict=True))}


def cast(inputs: dict, dtype: torch.dtype) -> dict:
    """The same inputs with every floating tensor in dtype."""
    return {name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in inputs.items()}


def compare(
    op: Callable,
    reference: Callable,
    inputs: dict,
    grad: Tensor | None,
    wrt: tuple[str, ...] = (),
    *,
    peer: dict | None = None,
    exact: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """Hold value and gradients of op against the reference in float64 and in the same dtype, or on ``peer`` instead.

    Results named in ``exact`` are copies and equal the reference's. The inputs are unchanged afterwards.
    """
    before = {name: x.clone() for name, x in inputs.items() if isinstance(x, Tensor)}
    ours = run(op, inputs, grad, wrt)
    for name, x in before.items():
        torch.testing.assert_close(inputs[name], x, rtol=0, atol=0, equal_nan=True, msg=f"{name} was modified")

    same = run(reference, peer or inputs, grad if peer is None else grad.to(F32), wrt)
    gold = run(reference, cast(inputs, F64), None if grad is None else grad.double(), wrt)
    for name, result in ours.items():
        if name in exact:
            assert result.dtype == same[name].dtype
            assert torch.equal(result, same[name]), f"{name} differs from the reference"
        else:
            peer_result = same[name] if peer is None else same[name].to(result.dtype)
            assert_no_worse(result, peer_result, gold[name], name)
    return ours


def assert_no_worse(ours: Tensor, same: Tensor, gold: Tensor, name: str = "result") -> None:
    """Error of ours <= 2 x error of the reference in the same dtype + 4 ulp of the largest value.

    Both errors are largest differences from the float64 reference. The factor 2 allows another order of summation,
    the 4 ulp are for results in which the reference happens to be exact. In float64 the reference is its own gold and
    has no error to double, so the ulp carry it all: a sum of E random terms, in 8 lanes, strays by about sqrt(E) / 10
    ulp of the largest such sum, 4 ulp at E = 1664; 16 leave the same factor of room for a second one.
    """
    assert ours.shape == gold.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(gold.shape)}"
    assert ours.dtype == same.dtype, f"{name}: {ours.dtype}, expected {same.dtype}"
    error, peer_error = ((x.double() - gold).abs().max().item() for x in (ours, same))
    ulp = torch.finfo(ours.dtype).eps * gold.abs().max().item()
    allowed = 2 * peer_error + (16 if ours.dtype == F64 else 4) * ulp
    assert error <= allowed, (
        f"{name}: error {error:.3g}, allowed {allowed:.3g}, reference in {same.dtype} {peer_error:.3g}"
    )
