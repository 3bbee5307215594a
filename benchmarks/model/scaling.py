"""The step on many GPUs: communication, and the part of it that no computation hides."""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.model.chips import LINKS, Chip
from benchmarks.model.ops import PASSES
from benchmarks.model.step import Part, model_of, total_us
from benchmarks.shapes import Shape

BUCKET_BYTES = 25 * 2**20  # default of DistributedDataParallel


class Scaling(NamedTuple):
    strategy: str
    gpus: int
    communication_ms: float
    exposed_ms: float
    step_ms: float
    images_per_s: float
    efficiency: float


class Layer(NamedTuple):
    forward_us: float
    backward_us: float
    parameters: float


def predict_scaling(shape: Shape, parts: Sequence[Part], chip: Chip, gpus: int, strategy: str = "DDP") -> Scaling:
    """A step on several GPUs, each with ``shape.batch`` images; ``strategy`` is ``"DDP"`` or ``"FSDP2"``."""
    exposure = {"DDP": _all_reduced, "FSDP2": _sharded}
    if strategy not in exposure:
        raise ValueError(f"predict_scaling: strategy must be 'DDP' or 'FSDP2', got {strategy!r}")
    communication, exposed = exposure[strategy](layers(shape, parts), gpus, chip)
    alone = total_us(parts)
    us = alone + exposed
    if strategy == "FSDP2":
        us -= (1 - 1 / gpus) * total_us(parts, group="update")
    images_per_s = gpus * shape.batch / us * 1e6
    return Scaling(strategy, gpus, communication / 1e3, exposed / 1e3, us / 1e3, images_per_s, alone / us)


def layers(shape: Shape, parts: Sequence[Part]) -> list[Layer]:
    """What communication overlaps with, in the forward's order. Blocks of the encoder are alike, and the decoder's."""
    group_of = {"blocks": "encoder", "norm": "encoder", "decoder_embed": "unshuffle", "mask_token": "unshuffle"}
    group_of |= {"decoder_blocks": "decoder", "decoder_norm": "decoder", "decoder_pred": "head"}
    counts = {"embed": 1, "encoder": shape.depth, "unshuffle": 1, "decoder": shape.decoder_depth, "head": 1}
    parameters = defaultdict(int)
    for name, p in model_of(shape).named_parameters():
        parameters[group_of.get(name.partition(".")[0], "embed")] += p.numel() * p.requires_grad
    return [
        Layer(*(total_us(parts, group=group, stage=stage) / count for stage in PASSES), parameters[group] / count)
        for group, count in counts.items()
        for _ in range(count)
    ]


def one_way_us(moved: float, gpus: int, chip: Chip) -> float:
    """All-gather or reduce-scatter of ``moved`` bytes by rings, within nodes and then between them.

    An all-reduce is one of each: within a node ``2 (p - 1) / p`` of the bytes pass each GPU's NVLink. Of what passes
    between nodes each GPU of a node carries its share.
    """
    inside = max(1, min(gpus, chip.gpus_per_node))
    nodes, rest = divmod(gpus, inside)
    if rest or nodes < 1:
        raise ValueError(f"{gpus} GPUs are neither part of a node of {chip.gpus_per_node} nor whole nodes")
    us_per_kb = (inside - 1) / inside / chip.nvlink_gb_per_s + (nodes - 1) / nodes / inside / chip.network_gb_per_s
    return moved * us_per_kb / LINKS / 1e3


def _all_reduced(order: list[Layer], gpus: int, chip: Chip) -> tuple[float, float]:
    """Buckets of float32 gradients leave one after another, each when the backward of its last layer is done."""
    clock = link = total = waiting = 0.0
    for i, layer in enumerate(reversed(order), start=1):
        clock += layer.backward_us
        waiting += 4 * layer.parameters
        if waiting >= BUCKET_BYTES or i == len(order):
            us = 2 * one_way_us(waiting, gpus, chip)
            link, total, waiting = max(link, clock) + us, total + us, 0.0
    return total, link - clock


def _sharded(order: list[Layer], gpus: int, chip: Chip) -> tuple[float, float]:
    """Bfloat16 weights are gathered a layer ahead in both passes, float32 gradients scattered a layer behind.

    The first weights of each pass and the last gradients overlap with nothing.
    """
    gather, scatter = ([0.0, *(one_way_us(b * x.parameters, gpus, chip) for x in order), 0.0] for b in (2, 4))
    exposed = gather[1] + gather[-2] + scatter[1]
    for i, layer in enumerate(order, start=1):
        exposed += max(0.0, gather[i + 1] - layer.forward_us)
        exposed += max(0.0, gather[i - 1] + scatter[i + 1] - layer.backward_us)
    return 2 * sum(gather) + sum(scatter), exposed
