"""Put visible tokens back in their places, mask tokens in the others, and add positions."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from .precision import accumulation_dtype
from .registration import differentiable, once_differentiable, only_needed, register_op
from .rows import as_rows, row_ids, without_padding


def scatter_mask_tokens(
    tokens: Tensor,
    mask_token: Tensor,
    ids_restore: Tensor,
    pos_embed: Tensor | None = None,
    *,
    num_prefix: int = 1,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Assemble the decoder's input from the encoder's visible tokens.

    ``out[n, R + l] = (tokens[n, R + r] if r < K else mask_token) + pos_embed[l]`` with ``r = ids_restore[n, l]``,
    ``out[n, :R] = tokens[n, :R]``.

    Args:
        tokens: ``[N, R + K, D]`` floating, prefix tokens first; N may be 0.
        mask_token: ``[D]`` or ``[1, 1, D]``.
        ids_restore: ``[N, L]`` int64, where in tokens and, behind them, the hidden patches each patch stands: a
            permutation of ``0..L-1`` in each row. A row with fewer than K visible patches numbers these from 0 on and
            the hidden ones from K on; of the tokens between nothing is read. See :class:`mae_kernels.Masking`.
        pos_embed: ``[R + L, D]`` or ``[L, D]``, with or without a leading 1. With ``R + L`` rows the prefix tokens
            get theirs too.
        num_prefix: R, the number of prefix tokens.
        out_dtype: dtype of the result; None promotes tokens, mask_token and pos_embed.

    Returns:
        ``[N, R + L, D]``, differentiable in tokens, mask_token and pos_embed.

    Raises:
        TypeError, ValueError: see the message. Ids are checked on the CPU, elsewhere with ``MAE_KERNELS_DEBUG=1``.

    Equivalent PyTorch: :func:`mae_kernels.reference.scatter_mask_tokens`.
    Source: He et al. 2021, section 3, "MAE decoder".
    """
    op = "scatter_mask_tokens"
    checks.tensor(op, "tokens", tokens, ("N", "R + K", "D"))
    checks.floating(op, "tokens", tokens)
    checks.not_empty(op, "tokens", tokens, batch=True)
    n, num_tokens, d = tokens.shape
    checks.integer(op, "num_prefix", num_prefix)
    if not 0 <= num_prefix < num_tokens:
        raise ValueError(f"{op}: num_prefix must be at least 0 and less than the {num_tokens} tokens, got {num_prefix}")
    checks.tensor(op, "mask_token", mask_token, (d,), (1, 1, d))
    checks.floating(op, "mask_token", mask_token)
    checks.tensor(op, "ids_restore", ids_restore, ("N", "L"))
    num_patches = ids_restore.shape[1]
    checks.ids(op, "ids_restore", ids_restore, n, num_patches)
    if num_tokens - num_prefix > num_patches:
        raise ValueError(
            f"{op}: tokens has {num_tokens - num_prefix} visible tokens per sample behind {num_prefix} prefix tokens, "
            f"but ids_restore has only {num_patches} patches"
        )
    if pos_embed is not None:
        with_prefix = isinstance(pos_embed, Tensor) and pos_embed.ndim >= 2 and pos_embed.shape[-2] != num_patches
        pos_embed = checks.table(op, "pos_embed", pos_embed, num_patches + (num_prefix if with_prefix else 0), d)
    checks.same_device(op, "tokens", tokens, mask_token=mask_token, ids_restore=ids_restore, pos_embed=pos_embed)

    if out_dtype is None:
        out_dtype = _promoted(tokens, mask_token, pos_embed)
    else:
        checks.out_dtype(op, out_dtype)
    return _call(tokens, mask_token.view(d), ids_restore, pos_embed, num_prefix, out_dtype)


def _promoted(tokens: Tensor, mask_token: Tensor, pos_embed: Tensor | None) -> torch.dtype:
    dtype = torch.promote_types(tokens.dtype, mask_token.dtype)
    return dtype if pos_embed is None else torch.promote_types(dtype, pos_embed.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tokens, _, ids_restore, pos_embed, ctx.num_prefix, _ = inputs
    ctx.save_for_backward(ids_restore)
    ctx.num_tokens = tokens.shape[1]
    ctx.pos_rows = 0 if pos_embed is None else pos_embed.shape[0]
    ctx.dtype = tokens.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (ids_restore,) = ctx.saved_tensors
    needs_tokens, needs_mask_token, _, needs_pos = ctx.needs_input_grad[:4]
    needs = [needs_tokens, needs_mask_token, needs_pos]
    arguments = grad, ids_restore, ctx.num_tokens, ctx.num_prefix, ctx.pos_rows, ctx.dtype, needs
    grads = once_differentiable(_scatter_mask_tokens_backward, *arguments)
    g_tokens, g_mask_token, g_pos = (g if need else None for g, need in zip(grads, needs, strict=True))
    return g_tokens, g_mask_token, None, g_pos


def _check(
    tokens: Tensor, mask_token: Tensor, ids_restore: Tensor, pos_embed: Tensor | None, num_prefix: int,
    out_dtype: torch.dtype,
) -> None:  # fmt: skip
    checks.restore_values("scatter_mask_tokens", "ids_restore", ids_restore, tokens.shape[1] - num_prefix)


def _scatter_mask_tokens_eager(
    tokens: Tensor, mask_token: Tensor, ids_restore: Tensor, pos_embed: Tensor | None, num_prefix: int,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    n, num_tokens, d = tokens.shape
    num_patches = ids_restore.shape[1]
    # One table of all tokens and, behind them, the mask token: each row of the result is a row of it.
    table = tokens.new_empty((n * num_tokens + 1, d), dtype=_promoted(tokens, mask_token, pos_embed))
    table[:-1].view(n, num_tokens, d).copy_(tokens)
    table[-1] = mask_token
    starts = torch.arange(0, n * num_tokens, num_tokens, device=tokens.device)[:, None]  # [N, 1]
    source = torch.empty((n, num_prefix + num_patches), dtype=torch.int64, device=tokens.device)
    source[:, :num_prefix] = starts + torch.arange(num_prefix, device=tokens.device)
    is_visible = ids_restore < num_tokens - num_prefix
    source[:, num_prefix:] = torch.where(is_visible, ids_restore + (starts + num_prefix), n * num_tokens)
    out = table.index_select(0, source.flatten()).view(n, -1, d)
    if pos_embed is not None:
        out[:, out.shape[1] - pos_embed.shape[0] :] += pos_embed
    return out.to(out_dtype)


def _scatter_mask_tokens_fake(
    tokens: Tensor, mask_token: Tensor, ids_restore: Tensor, pos_embed: Tensor | None, num_prefix: int,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    n, _, d = tokens.shape
    return tokens.new_empty((n, num_prefix + ids_restore.shape[1], d), dtype=out_dtype)


def _scatter_mask_tokens_backward_eager(
    grad: Tensor, ids_restore: Tensor, num_tokens: int, num_prefix: int, pos_rows: int, dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    needs_tokens, needs_mask_token, needs_pos = needs
    n, d = grad.shape[0], grad.shape[2]
    num_keep = num_tokens - num_prefix
    sum_dtype = accumulation_dtype(grad.dtype)
    g_tokens, g_mask_token, g_pos = (grad.new_empty(0) for _ in needs)

    if needs_tokens or needs_mask_token:
        table, step = as_rows(grad)
        num_patches = ids_restore.shape[1]
        positions = torch.arange(num_patches, device=grad.device).expand_as(ids_restore)
        ids_shuffle = ids_restore.new_full((n, num_keep + num_patches), -1).scatter_(1, ids_restore, positions)
        ids_keep, padding = without_padding(ids_shuffle[:, :num_keep])
        ids_mask = ids_shuffle[:, num_keep : None if padding is not None else num_patches]
    if needs_tokens:
        prefix = torch.arange(num_prefix, device=grad.device).expand(n, num_prefix)
        source = torch.cat([prefix, ids_keep + num_prefix], dim=1)  # [N, R + K]
        g_tokens = table.index_select(0, row_ids(source, step)).view(n, num_tokens, d).to(dtype)
        if padding is not None:
            g_tokens[:, num_prefix:].masked_fill_(padding, 0)
    if needs_mask_token:
        ids_mask, padding = without_padding(ids_mask)
        masked, table = row_ids(ids_mask, step, num_prefix), table.to(sum_dtype)
        if padding is not None:
            masked, table = torch.where(padding.flatten(), len(table), masked), F.pad(table, (0, 0, 0, 1))
        # Sums of 32 rows each, then their sum: one long chain of additions would lose three bits at 1568 patches.
        bags = torch.arange(0, len(masked), 32, device=grad.device)
        g_mask_token = F.embedding_bag(masked, table, bags, mode="sum").sum(0)
    if needs_pos:
        g_pos = grad[:, grad.shape[1] - pos_rows :].sum(0, dtype=sum_dtype)
    return g_tokens, g_mask_token, g_pos


def _scatter_mask_tokens_backward_fake(
    grad: Tensor, ids_restore: Tensor, num_tokens: int, num_prefix: int, pos_rows: int, dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    n, d = grad.shape[0], grad.shape[2]
    sum_dtype = accumulation_dtype(grad.dtype)
    return only_needed(grad, needs, [(n, num_tokens, d), (d,), (pos_rows, d)], [dtype, sum_dtype, sum_dtype])


_scatter_mask_tokens = register_op(
    "scatter_mask_tokens(Tensor tokens, Tensor mask_token, Tensor ids_restore, Tensor? pos_embed, "
    "SymInt num_prefix, ScalarType out_dtype) -> Tensor",
    eager=_scatter_mask_tokens_eager,
    fake=_scatter_mask_tokens_fake,
    check=_check,
)
_scatter_mask_tokens_backward = register_op(
    "scatter_mask_tokens_backward(Tensor grad, Tensor ids_restore, SymInt num_tokens, SymInt num_prefix, "
    "SymInt pos_rows, ScalarType dtype, bool[3] needs) -> (Tensor g_tokens, Tensor g_mask_token, Tensor g_pos_embed)",
    eager=_scatter_mask_tokens_backward_eager,
    fake=_scatter_mask_tokens_backward_fake,
)
_call = differentiable(_scatter_mask_tokens, _setup_context, _backward)
