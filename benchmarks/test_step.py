"""The whole training step, forward, backward and optimizer, of every contender in one interleaved run."""

import time
from functools import cache
from statistics import median, quantiles

import pytest
import torch

from benchmarks import measure
from benchmarks.ceilings import matrix_rate
from benchmarks.measure import DEVICE

mae = pytest.importorskip("mae")  # its requirements are more than those of the ops
pytest.importorskip("transformers")

from benchmarks.contenders import LABELS, contenders  # noqa: E402 (needs both)
from mae.profile import training_flops  # noqa: E402

pytestmark = pytest.mark.benchmark(timer=measure.clock)


def test_step(contender, step_dtype, step_shape, show, request):
    options = request.config.option
    rows, samples = _measured(step_shape, step_dtype, options.contenders, options.step_rounds)
    if contender not in rows:
        pytest.skip("CUDA graphs need CUDA")
    row = rows[contender]
    show(f"{step_shape.id}, {step_dtype}", row["contender"], row, samples[contender])


@cache
def _measured(s, dtype: str, names: str, rounds: int) -> tuple[dict[str, dict], dict[str, list[float]]]:
    """Rows and times of all contenders. In every round each runs once, so that a drift of the machine meets all."""
    torch.manual_seed(0)
    torch.compiler.reset()
    model = getattr(mae, s.model)().to(DEVICE)
    images = torch.randint(0, 256, (s.batch, s.channels, s.image, s.image), dtype=torch.uint8)
    noise = torch.rand(s.batch, s.num_patches, device=DEVICE)
    runners = contenders(names, model, images, noise, dtype == "bfloat16")
    _assert_accurate(runners, model, images, noise, dtype == "bfloat16")
    saved = {runner.name: runner.saved_bytes() for runner in runners}
    model.zero_grad()
    rates, samples = [], {runner.name: [] for runner in runners}
    for number in range(2 + rounds):  # the first two compile and warm up
        rate = matrix_rate(getattr(torch, dtype))
        times = {runner.name: _seconds(runner.step) for runner in runners}
        if number >= 2:
            rates.append(rate)
            for name, value in times.items():
                samples[name].append(value)
    flops, ceiling, rows = training_flops(model.config, s.mask_ratio) * s.batch, median(rates), {}
    for runner in runners:
        time_taken = median(samples[runner.name])
        p20, *_, p80 = quantiles(samples[runner.name], n=5)
        peak = measure.peak_mib(runner.step)
        launches, syncs = runner.launches_and_syncs()
        rows[runner.name] = {
            "shape": s.id,
            "op": "training step",
            "contender": f"({runner.name}) {LABELS[runner.name]}",
            "dtype": dtype,
            "rounds": rounds,
            "median_ms": time_taken * 1e3,
            "p20_ms": p20 * 1e3,
            "p80_ms": p80 * 1e3,
            "images_per_s": s.batch / time_taken,
            "flops": flops,
            "tflops": flops / time_taken / 1e12,
            "matrix_tflops": ceiling / 1e12,
            "mfu": flops / time_taken / ceiling,
            "peak_mib": peak,
            "saved_bytes_per_image": saved[runner.name] / s.batch,
            "launches": launches,
            "host_syncs": syncs,
            "shipped_bytes_per_image": runner.images.nbytes // s.batch,
        }
    return rows, samples


def _seconds(step) -> float:
    """Of one step, as a user waits for it: on a GPU the mean of four that follow each other."""
    if DEVICE.type == "cpu":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(4):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / 4


def _assert_accurate(runners, model, images, noise, bfloat16: bool) -> None:
    """Loss and gradients of all, one by one, against the published pipeline in float32.

    The error is at most twice that of the published pipeline in the same precision, and 1e-5, as the tests demand of
    float32 gradients against Hugging Face's model.
    """
    (exact,), (peer,) = (contenders("a", model, images, noise, precision) for precision in (False, bfloat16))
    gold = exact.loss_and_gradients()
    allowed = {name: 2 * error + 1e-5 for name, error in _errors(peer, gold).items()}
    for runner in runners:
        errors = _errors(runner, gold)
        off = {name: (error, allowed[name]) for name, error in errors.items() if not error <= allowed[name]}
        assert not off, f"({runner.name}): relative error and the one allowed: {off}"


def _errors(runner, gold: dict[str, torch.Tensor]) -> dict[str, float]:
    found = runner.loss_and_gradients()
    return {name: ((found[name] - exact).norm() / exact.norm()).item() for name, exact in gold.items()}
