"""How the benchmarks measure: time, memory and errors, on any device."""

import hashlib
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median, quantiles
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mae_kernels import backend, checks, registration, why_not_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REFERENCE = "reference"
COMPILED = "compiled"  # the reference, by torch.compile
OURS = ["eager"]
if backend.INTERPRETED or not why_not_triton(torch.empty(0, device=DEVICE)):
    OURS.append("triton")
MIB = 2**20

# On a GPU convolutions would round their inputs to TF32 and matrix products would not; float32 rows mean float32.
torch.backends.cudnn.conv.fp32_precision = "ieee"

_BACKLOG = 5_000_000  # cycles of a GPU: more than two milliseconds


def seconds(*calls: Callable[[], object]) -> list[float]:
    """Duration of each of several calls in a row: wall clock on the CPU, time between events on a GPU."""
    if DEVICE.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(1 + len(calls))]
        # The GPU is kept busy while the host launches, so that the kernels are timed and not the launches.
        torch.cuda._sleep(_BACKLOG)
        events[0].record()
        for call, event in zip(calls, events[1:], strict=True):
            call()
            event.record()
        events[-1].synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in itertools.pairwise(events)]
    times = [time.perf_counter()]
    for call in calls:
        call()
        times.append(time.perf_counter())
    return [end - start for start, end in itertools.pairwise(times)]


def statistics(samples: list[float]) -> dict[str, float]:
    p20, *_, p80 = quantiles(samples, n=5)
    return {"median_ms": median(samples) * 1e3, "p20_ms": p20 * 1e3, "p80_ms": p80 * 1e3}


def wall_seconds(call: Callable[[], object], repeats: int = 5) -> float:
    """Of a call among others like it, as its user waits for it: launches that a GPU is not busy enough to hide too."""
    call()
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    wait()
    return (time.perf_counter() - start) / repeats


def host_samples(call: Callable[[], object], repeats: int = 200) -> list[float]:
    """How long calls keep the host. A GPU is held up meanwhile: nobody waits for its results."""
    samples = []
    for i in range(-10, repeats):
        if i % 20 == 10 and DEVICE.type == "cuda":  # its queue holds about a thousand launches
            torch.cuda.synchronize()
            torch.cuda._sleep(_BACKLOG)
        start = time.perf_counter()
        call()
        if i >= 0:
            samples.append(time.perf_counter() - start)
    return samples


@contextmanager
def no_kernels() -> Iterator[None]:
    """On the CPU, where computing would hide what a call costs, the ops allocate their results and do nothing else.

    Ids are not read either, as on a GPU. For calls on arguments of the same shapes.
    """
    if DEVICE.type == "cuda":
        yield
        return
    run, results = registration._outside_autocast, {}

    def allocate(implementation: Callable, first: Tensor, *rest):
        key = implementation, first.shape
        if key not in results:
            results[key] = run(implementation, first, *rest)
        like = results[key]
        return torch.empty_like(like) if isinstance(like, Tensor) else tuple(map(torch.empty_like, like))

    unread = dict.fromkeys(
        ("id_values", "restore_values", "mask_values", "packed_values", "box_values"), lambda *args: None
    )
    with patch.object(registration, "_outside_autocast", allocate), patch.multiple(checks, **unread):
        yield


class OpRecorder(TorchDispatchMode):
    """Inside a ``with`` block, keeps the calls of our ops as they reach the dispatcher, below autograd."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[Callable, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mae_kernels":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))

    def replay(self) -> None:
        with torch._C._AutoDispatchBelowAutograd():
            for func, args in self.calls:
                func(*args)


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


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def compiled_kernels(except_for: set[str]) -> Iterator[dict]:
    """Each of our kernels that Triton has compiled in this process: which, and the SHA-256 of its machine code.

    ``except_for`` holds the keys of those told before, and gets those of the new ones.
    """
    for module in [m for name, m in sys.modules.items() if name.startswith("mae_kernels.kernels.")]:
        for function in vars(module).values():
            for cache, *_ in getattr(function, "device_caches", {}).values():
                for signature, kernel in cache.items():
                    key = f"{kernel.name} {signature}"
                    if key not in except_for:
                        except_for.add(key)
                        code = kernel.asm.get("cubin") or kernel.asm["hsaco"]
                        digest = hashlib.sha256(code).hexdigest()
                        yield {"name": kernel.name, "signature": signature, "sha256": digest}
