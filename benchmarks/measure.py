"""How the benchmarks measure: time, memory and errors, on any device, and the conditions that belong to a number."""

import importlib.util
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import version

import cpuinfo
import pytest
import torch
from torch import Tensor

from mae_kernels import why_not_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REFERENCE = "reference"
OURS = ["eager"] if why_not_triton(torch.empty(0, device=DEVICE)) else ["eager", "triton"]
MIB = 2**20
STEP_ROWS = pytest.StashKey[list[dict]]()

# On a GPU convolutions would round their inputs to TF32 and matrix products would not; float32 rows mean float32.
torch.backends.cudnn.allow_tf32 = False

_total = 0.0


def clock() -> float:
    """The sum of all seconds measured so far: as pytest-benchmark's timer it shows them and nothing around them."""
    return _total


def seconds(call: Callable[[], object]) -> float:
    """Duration of one call: wall clock on the CPU, the time between two events on a GPU."""
    global _total
    if DEVICE.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The GPU is kept busy while the host launches, so that the kernels are timed and not the launches.
        torch.cuda._sleep(5_000_000)
        start.record()
        call()
        end.record()
        end.synchronize()
        duration = start.elapsed_time(end) / 1e3
    else:
        begin = time.perf_counter()
        call()
        duration = time.perf_counter() - begin
    _total += duration
    return duration


def replay(duration: float) -> None:
    """Let the clock show a duration that was measured before, interleaved with those of others."""
    global _total
    _total += duration


def matrix_rate(dtype: torch.dtype) -> float:
    """FLOP/s of one large product of PyTorch's: the ceiling of a step in this dtype, measured when it is asked for."""
    rows, width = (32768, 4096) if DEVICE.type == "cuda" else (4096, 2048)
    # Random numbers: a GPU draws less power, and runs faster, where all are the same.
    a, b = (torch.randn(n, width, device=DEVICE).to(dtype) for n in (rows, width))
    torch.nn.functional.linear(a, b)
    return 2 * rows * width**2 / min(seconds(lambda: torch.nn.functional.linear(a, b)) for _ in range(3))


def rotated(make: Callable[[], dict]) -> Iterator[dict]:
    """Inputs in turn: one copy on the CPU, on a GPU so many that one use evicts the others from the L2 cache."""
    copies = [make()]
    if DEVICE.type == "cuda":
        size = sum(x.nbytes for x in copies[0].values() if isinstance(x, Tensor))
        l2 = torch.cuda.get_device_properties(DEVICE).L2_cache_size
        copies += [make() for _ in range(math.ceil(2 * l2 / size))]
    return itertools.cycle(copies)


def peak_mib(call: Callable[[], object]) -> float:
    """Highest memory of one call above the memory at its start, as PyTorch's allocator saw it.

    Scratch space that oneDNN and MKL allocate on their own is not in it.
    """
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - start) / MIB
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]  # frees are negative
    return max(itertools.accumulate(sizes, initial=0)) / MIB


def as_double(inputs: dict) -> dict:
    """The same inputs with every floating tensor in float64."""
    return {
        name: x.detach().double().requires_grad_(x.requires_grad)
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for name, x in inputs.items()
    }


def assert_accurate(ours: dict[str, Tensor], peer: dict[str, Tensor], gold: dict[str, Tensor], ulps: int = 4) -> None:
    """Largest error against the float64 ``gold`` at most twice the peer's plus a few units in the last place.

    What the peer gets without any error, such as ids and copies, must be exact; but pixels of 8 bits, which are
    rounded after sums that have no order, may be one level off.
    """
    assert ours.keys() == peer.keys() == gold.keys()
    for name, exact in gold.items():
        x, y = ours[name].detach(), peer[name].detach()
        assert (x.shape, x.dtype) == (y.shape, y.dtype), f"{name} is {x.dtype} {x.shape}, not {y.dtype} {y.shape}"
        error, allowed = ((v.double() - exact.double()).abs().max().item() for v in (x, y))
        if x.dtype == torch.uint8:
            allowed = 1
        elif allowed > 0:
            allowed = 2 * allowed + ulps * torch.finfo(x.dtype).eps * exact.abs().max().item()
        assert error <= allowed, f"{name} is off by {error:.3g}, allowed is {allowed:.3g}"


@cache
def conditions() -> dict[str, str | float]:
    """What a number depends on besides the code. The load is that of the minute before the first row."""
    on_gpu = DEVICE.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(DEVICE) if on_gpu else cpuinfo.get_cpu_info().get("brand_raw", "CPU"),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else "unknown",
        "torch": torch.__version__,
        "triton": version("triton") if importlib.util.find_spec("triton") else "none",
    }
