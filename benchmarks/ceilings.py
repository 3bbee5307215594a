"""What this machine can do at most, measured in the same run as what is held against it."""

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import record
from benchmarks.measure import DEVICE, host_samples, seconds
from mae_kernels.products import as_pixels

ON_GPU = DEVICE.type == "cuda"


def measured() -> dict:
    """The ceilings of a result file.

    ``copy_gb_per_s`` counts bytes read and written by a copy many times as large as the caches. ``tflops`` are rates of
    a large product of random matrices by the PyTorch function that computes it: on a CPU ``linear`` and ``convolution``
    are served by different libraries. ``launch_us`` is what the smallest op costs the host, ``linear_host_us`` what
    ``F.linear`` does, forward and forward+backward. GPUs have two more: float32 products in ``tf32``, and
    ``kernel_us``, the device's time for a kernel that does nothing much, in a row of them.
    """
    dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    rates = {"linear": {name: matrix_rate(dtype) / 1e12 for name, dtype in dtypes.items()}}
    found = {"copy_gb_per_s": copy_rate() / 1e9, "tflops": rates}
    if ON_GPU:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        rates["linear"]["tf32"] = matrix_rate(torch.float32) / 1e12
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        found["kernel_us"] = _kernel_seconds() * 1e6
    else:
        rates["convolution"] = {name: matrix_rate(dtype, _convolution) / 1e12 for name, dtype in dtypes.items()}
    one = torch.zeros(1, device=DEVICE)
    x, weight, grad = (torch.randn(4, 4, device=DEVICE, requires_grad=name != "grad") for name in ("x", "w", "grad"))

    def forward_and_backward():
        torch.autograd.grad(F.linear(x, weight), (x, weight), grad)

    calls = lambda: one.add_(1), lambda: F.linear(x, weight), forward_and_backward
    found["launch_us"], *found["linear_host_us"] = (median(host_samples(call)) * 1e6 for call in calls)
    return found


def copy_rate() -> float:
    """Bytes per second, read and written."""
    source = torch.empty(2**30 if ON_GPU else 2**27, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / min(seconds(*[lambda: target.copy_(source)] * 10))


def matrix_rate(dtype: torch.dtype, product: Callable[[Tensor, Tensor], Tensor] = F.linear) -> float:
    """FLOP/s of one large product of PyTorch's."""
    rows, width = (32768, 4096) if ON_GPU else (4096, 2048)
    # Random numbers: a GPU draws less power, and runs faster, where all are the same.
    a, b = (torch.randn(n, width, device=DEVICE).to(dtype) for n in (rows, width))
    product(a, b)
    return 2 * rows * width**2 / min(seconds(*[lambda: product(a, b)] * (20 if ON_GPU else 3)))


def _convolution(a: Tensor, b: Tensor) -> Tensor:
    return F.conv2d(as_pixels(a), b[:, :, None, None])


def floor_seconds(bytes_moved: int, flops: int, compute: torch.dtype, ceilings: dict) -> float:
    """The longer of moving the bytes at the rate of a copy and computing at that of a product.

    float32 products may also be three products of TF32 halves, which are as accurate.
    """
    rates = {"bfloat16": 0.0, "float32": 0.0, "tf32": 0.0}
    for by_dtype in ceilings["tflops"].values():
        rates |= {name: max(rate, rates[name]) for name, rate in by_dtype.items()}
    rate = rates["bfloat16"] if compute == torch.bfloat16 else max(rates["float32"], rates["tf32"] / 3)
    return max(bytes_moved / ceilings["copy_gb_per_s"] / 1e9, flops / rate / 1e12)


def _kernel_seconds() -> float:
    one, graph, launches = torch.zeros(1, device=DEVICE), torch.cuda.CUDAGraph(), 100
    one.add_(1)
    with torch.cuda.graph(graph):
        for _ in range(launches):
            one.add_(1)
    return median(seconds(*[graph.replay] * 10)) / launches


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ceilings", description=__doc__)
    parser.add_argument("--record", type=Path, required=True, metavar="FILE", help="result file to append to")
    path = parser.parse_args().record
    record.begin(path, record.command("python -m benchmarks.ceilings"))
    record.append(path, ceilings=measured())
