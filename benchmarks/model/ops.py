"""Each pass of an op: the longer of moving its bytes and computing, and the gaps between its launches."""

from dataclasses import dataclass
from math import ceil

import torch

from benchmarks.shapes import Shape
from benchmarks.work import BF16, CASES, F32, Work
from mae_kernels.chunks import chunk_samples

PASSES = ("forward", "backward")


@dataclass(frozen=True)
class Prediction:
    bytes: int
    flops: int
    launches: int
    gb_per_s: float
    tflops: float
    gap_us: float

    @property
    def memory_us(self) -> float:
        return self.bytes / self.gb_per_s / 1e3

    @property
    def arithmetic_us(self) -> float:
        return self.flops / self.tflops / 1e6

    @property
    def launch_us(self) -> float:
        return self.launches * self.gap_us

    @property
    def us(self) -> float:
        return max(self.memory_us, self.arithmetic_us) + self.launch_us

    @property
    def bound(self) -> str:
        times = {"memory": self.memory_us, "arithmetic": self.arithmetic_us, "launches": self.launch_us}
        return max(times, key=times.get)

    def __str__(self) -> str:
        return (
            f"{self.bytes / 1e6:.1f} MB / {self.gb_per_s:.0f} GB/s = {self.memory_us:.1f} us"
            f" | {self.flops / 1e9:.1f} GFLOP / {self.tflops:.0f} TFLOP/s = {self.arithmetic_us:.1f} us"
            f" | {self.launches} {'launch' if self.launches == 1 else 'launches'} x {self.gap_us:.2g} us"
            f" -> {self.us:.1f} us, bound by {self.bound}"
        )


def predict(ceilings: dict, moved: float, flops: int = 0, launches: int = 1, tflops: float = 1.0) -> Prediction:
    # launch_us of a result file is the host's time, which a busy GPU does not wait for; kernel_us is the GPU's.
    gap = ceilings.get("kernel_us", ceilings["launch_us"])
    return Prediction(int(moved), int(flops), launches, ceilings["copy_gb_per_s"], tflops, gap)


def predict_op(work: Work, stage: str, ceilings: dict) -> Prediction:
    """The forward or the backward of an op, as its kernels do it.

    Args:
        work: an entry of :data:`benchmarks.work.CASES` at a shape, or one like it.
        stage: ``"forward"`` or ``"backward"``.
        ceilings: of a result file, or :func:`assumed_ceilings`.
    """
    if stage not in PASSES:
        raise ValueError(f"predict_op: stage must be 'forward' or 'backward', got {stage!r}")
    if stage == "backward" and not work.differentiable:
        raise ValueError(f"predict_op: {work.op} has no backward")
    (forward, backward), flops = work.bytes, work.flops
    if work.op == "masked_mse":  # the forward keeps a residual of every prediction, and the backward reads nothing else
        kept = _arguments(work)["pred"].nbytes
        forward, backward = forward + kept, 2 * kept
    elif work.op == "linear_masked_mse":  # the forward computes and keeps all gradients, and the backward scales them
        hidden, weight, bias = (_arguments(work)[name] for name in ("hidden", "weight", "bias"))
        kept = hidden.numel() * work.compute.itemsize + weight.nbytes + bias.nbytes
        forward, backward, flops = forward + kept, backward + kept, (sum(flops), 0)
    i = PASSES.index(stage)
    return predict(ceilings, (forward, backward)[i], flops[i], launches(work)[i], _tflops(work, ceilings["tflops"]))


def _arguments(work: Work) -> dict:
    return work.arguments(torch.device("meta"))


def _tflops(work: Work, rates: dict[str, float]) -> float:
    if work.op in ("patch_embed", "linear_masked_mse") and work.compute == BF16:
        return rates["bfloat16"]
    # In float32 our products are three of TF32 halves; the vendor's run without tensor cores, PyTorch's default.
    return max(rates["float32"], rates.get("tf32", 0) / 3) if work.op == "patch_embed" else rates["float32"]


def launches(work: Work) -> tuple[int, int]:
    """Of a forward and a backward: ours, and PyTorch's for casts, zeros, products and sums over partial results."""
    cast = int(work.compute != F32)
    if work.op == "linear_masked_mse":
        arguments = _arguments(work)
        (n, m, _), values = arguments["hidden"].shape, len(arguments["weight"])
        chunks = ceil(n / chunk_samples(n, m, values, "cuda"))
        # Cast are weight and bias and, of each chunk, its rows and its share of the weight's gradient.
        return 4 + 2 * cast + chunks * (8 + 2 * cast), 3
    return {
        "random_resized_crop": (1, 0),
        "random_masking": (1, 0),
        "patch_embed": (1 + cast, 5),  # gradients of weight and bias, the sum of either and of the prefix, its view
        "gather_tokens": (1, 1),
        "scatter_mask_tokens": (1, 2),
        "masked_mse": (2, 1),
    }[work.op]


def predict_ops(shape: Shape, ceilings: dict) -> dict[str, dict[str, Prediction]]:
    """Each case by name, and each of its passes."""
    cases = {name: make(shape) for name, make in CASES.items() if "/ two ops" not in name}
    return {
        name: {stage: predict_op(case, stage, ceilings) for stage in PASSES[: 1 + case.differentiable]}
        for name, case in cases.items()
    }
