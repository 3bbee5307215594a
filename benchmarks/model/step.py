"""The training step, part by part: our ops, the products and attention of the blocks, what is between them, AdamW."""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from math import ceil
from typing import NamedTuple

import torch

import mae
from benchmarks import work
from benchmarks.model.ops import PASSES, Prediction, predict, predict_op
from benchmarks.shapes import Shape
from benchmarks.work import U8, Work

# Of a product's rate, what attention reaches on 50 to 200 tokens, the scores that its backward computes again included.
ATTENTION = 0.3


class Part(NamedTuple):
    """A line of the step: kernels that run one after another."""

    group: str
    name: str
    stage: str  # "forward", "backward" or "update"
    kernels: tuple[Prediction, ...]

    def total(self, quantity: str) -> float:
        return sum(getattr(kernel, quantity) for kernel in self.kernels)


def total_us(parts: Sequence[Part], **wanted: str) -> float:
    """Of all parts, or of those with such a ``group``, ``name`` or ``stage``."""
    return sum(part.total("us") for part in parts if all(getattr(part, k) == v for k, v in wanted.items()))


def predict_step(shape: Shape, ceilings: dict, dtype: str = "bfloat16", residual: str = "float32") -> list[Part]:
    """The parts of a compiled training step.

    Its FLOPs are those of :func:`mae.profile.training_flops`: elementwise operations hide behind their bytes.

    Args:
        shape: model and batch.
        ceilings: of a result file, or :func:`assumed_ceilings`.
        dtype: of products, ``"bfloat16"`` (autocast) or ``"float32"``.
        residual: of tokens between the blocks.
    """
    n, k, m, tokens, d = shape.batch, shape.num_keep, shape.num_masked, 1 + shape.num_patches, shape.decoder_dim
    compute, r = getattr(torch, dtype), getattr(torch, residual).itemsize

    def op(group: str, work: Work, flops: tuple[int, int], written: int = 0) -> list[Part]:
        """``written`` values are in the residual's dtype, and float32 in work."""
        work = dataclasses.replace(work, bytes=tuple(x - written * (4 - r) for x in work.bytes), flops=flops)
        stages = PASSES[: 1 + work.differentiable]
        return [Part(group, work.op, stage, (predict_op(work, stage, ceilings),)) for stage in stages]

    embed, head, none = work.patch_embed(shape, U8, compute), 2 * n * m * shape.patch_values * d, (0, 0)
    linear = _linear(ceilings, compute, n * (1 + k), shape.embed_dim, d)
    ids, rows = n * m * 8, n * m * d * r
    gather = Work("gather_tokens", lambda device: {}, bytes=(2 * rows + ids, rows + ids + n * tokens * d * r))
    trained = [p for p in model_of(shape).parameters() if p.requires_grad]
    # In: weight, gradient, two moments; out: weight, moments. PyTorch's kernel takes 36 tensors.
    update = predict(ceilings, sum(p.numel() for p in trained) * 4 * (4 + 3), 0, ceil(len(trained) / 36))
    encoder = [(1 + k, 1 + k)] * shape.depth
    decoder = [(tokens, tokens)] * (shape.decoder_depth - 1) + [(tokens, m)]
    return [
        *op("embed", work.random_masking(shape), none),
        *op("embed", embed, embed.flops, n * (1 + k) * shape.embed_dim),
        *_blocks("encoder", shape, encoder, shape.embed_dim, ceilings, compute, r),
        *(Part("unshuffle", "decoder_embed", stage, tuple(kernels)) for stage, kernels in linear.items()),
        *op("unshuffle", work.scatter_mask_tokens(shape, compute), none, n * tokens * d),
        *_blocks("decoder", shape, decoder, d, ceilings, compute, r),
        *op("decoder", gather, none),
        *op("head", work.linear_masked_mse(shape, compute), (head, 2 * head)),
        Part("update", "fused AdamW", "update", (update,)),
    ]


def _linear(ceilings: dict, compute: torch.dtype, rows: int, inputs: int, outputs: int) -> dict[str, list[Prediction]]:
    moved = compute.itemsize * (rows * inputs + inputs * outputs + rows * outputs)
    product = predict(ceilings, moved, 2 * rows * inputs * outputs, 1, rate_of(ceilings, compute))
    return {"forward": [product], "backward": [product, product]}


def rate_of(ceilings: dict, compute: torch.dtype) -> float:
    return ceilings["tflops"][str(compute).removeprefix("torch.")]


def _blocks(
    group: str, shape: Shape, blocks: list[tuple[int, int]], dim: int, ceilings: dict, compute: torch.dtype, r: int
) -> list[Part]:
    """mae/block.py for each (tokens that enter, tokens that leave), and the norm behind the last."""
    n, c, hidden = shape.batch, compute.itemsize, int(dim * model_of(shape).config.mlp_ratio)
    rate = ATTENTION * rate_of(ceilings, compute)
    found = defaultdict(list)

    def elementwise(stage: str, *moved: int) -> None:
        found["norms, gelu, residuals, casts", stage] += [predict(ceilings, x) for x in moved]

    for t, s in blocks:
        linears = [(t, dim, 3 * dim)] if s == t else [(t, dim, 2 * dim), (s, dim, dim)]
        for rows, inputs, outputs in [*linears, (s, dim, dim), (s, dim, hidden), (s, hidden, dim)]:
            for stage, kernels in _linear(ceilings, compute, n * rows, inputs, outputs).items():
                found["products", stage] += kernels
                if c < 4:  # the weight is cast, later its gradient
                    elementwise(stage, inputs * outputs * (4 + c))
        flops, q, kv = 4 * n * s * t * dim, n * s * dim * c, 2 * n * t * dim * c
        found["attention", "forward"].append(predict(ceilings, 2 * q + kv, flops, 1, rate))
        found["attention", "backward"].append(predict(ceilings, 4 * q + 2 * kv, 2 * flops, 3, rate))

        x, y, h = n * t * dim, n * s * dim, n * s * hidden  # values that enter, that leave, inside the MLP
        again, parameters, back = r + c, r + c, 3 * r + c  # of a norm: its backward adds to the residual's gradient
        # An addition to the residual with the norm behind it, twice; gelu.
        elementwise("forward", x * (2 * r + 2 * c), y * (2 * r + 2 * c), h * 2 * c)
        # fc2: its gradient is cast, and summed for the bias. Gelu again and its backward. fc1: the bias. norm2.
        elementwise("backward", y * (r + c), y * c, h * 2 * c, h * 3 * c, h * c, y * again, y * back, y * parameters)
        # proj, as fc2. Gradients of q, k and v into one tensor, and summed for the bias. norm1.
        elementwise("backward", y * (r + c), y * c, (y + 2 * x) * 2 * c, (y + 2 * x) * c)
        elementwise("backward", x * again, x * back, x * parameters)
        if s < t:  # queries are normalised by themselves
            elementwise("forward", y * (r + c))
            elementwise("backward", y * again, y * back, y * parameters)
    elementwise("forward", y * (r + c))
    elementwise("backward", y * (2 * r + c), y * parameters)
    return [Part(group, name, stage, tuple(kernels)) for (name, stage), kernels in found.items()]


@cache
def model_of(shape: Shape) -> mae.MaskedAutoencoder:
    sizes = {"decoder_embed_dim": shape.decoder_dim, "decoder_depth": shape.decoder_depth, "image_size": shape.image}
    with torch.device("meta"):
        return getattr(mae, shape.model)(**sizes)
