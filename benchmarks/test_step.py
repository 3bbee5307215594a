"""The whole training step, forward, backward and optimizer, of every contender in one interleaved run."""

import time
from statistics import median

import pytest
import torch

from benchmarks import measure
from benchmarks.ceilings import matrix_rate
from benchmarks.measure import DEVICE
from mae_kernels import products

mae = pytest.importorskip("mae")  # its requirements are more than those of the ops
pytest.importorskip("transformers")

from benchmarks.contenders import LABELS, Batch, contenders  # noqa: E402 (needs both)
from mae.training.profile import training_flops  # noqa: E402


def test_step(step_dtype, step_shape, hand_over, request):
    options, bfloat16 = request.config.option, step_dtype == "bfloat16"
    torch.manual_seed(0)
    torch.compiler.reset()
    model = getattr(mae, step_shape.model)().to(DEVICE)
    size = (step_shape.batch, step_shape.channels, *step_shape.image_size)
    images = torch.randint(0, 256, size, dtype=torch.uint8)
    noise = torch.rand(step_shape.batch, step_shape.grid.num_patches, device=DEVICE)
    batch = Batch(images, noise, step_shape.mask_ratio)
    runners = contenders(options.contenders, model, batch, bfloat16)
    wrong = _inaccurate(runners, model, batch, bfloat16)
    runners = [runner for runner in runners if runner.name not in wrong]
    saved = {runner.name: runner.saved_bytes() for runner in runners}
    model.zero_grad()

    rates, samples = [], {runner.name: [] for runner in runners}
    for number in range(2 + options.step_rounds):  # the first two compile and warm up
        rate = matrix_rate(getattr(torch, step_dtype), products.linear)
        times = {runner.name: _seconds(runner.step) for runner in runners}
        if number >= 2:
            rates.append(rate)
            for name, value in times.items():
                samples[name].append(value)

    flops, ceiling = training_flops(model.config, step_shape.mask_ratio) * step_shape.batch, median(rates)
    for runner in runners:
        times = samples[runner.name]
        launches, syncs = runner.launches_and_syncs()
        row = {
            "shape": step_shape.id,
            "op": "training step",
            "contender": f"({runner.name}) {LABELS[runner.name]}",
            "dtype": step_dtype,
            "mask_ratio": step_shape.mask_ratio,
            "rounds": options.step_rounds,
            **measure.statistics(times),
            "images_per_s": step_shape.batch / median(times),
            "flops": flops,
            "tflops": flops / median(times) / 1e12,
            "matrix_tflops": ceiling / 1e12,
            "mfu": flops / median(times) / ceiling,
            "saved_bytes_per_image": saved[runner.name] / step_shape.batch,
            "launches": launches,
            "host_syncs": syncs,
            "shipped_bytes_per_image": runner.batch.images.nbytes // step_shape.batch,
        }
        if runner.name != "f":  # a graph that is replayed has its memory already
            row["peak_mib"] = measure.peak_mib(runner.step)
        hand_over(f"{step_shape.id}, {step_dtype}", row["contender"], times, row)
    assert not wrong, f"no speed of those with an error (the one allowed): {wrong}"


def _seconds(step) -> float:
    """Of one step, as a user waits for it: on a GPU the mean of four that follow each other."""
    repeats = 1 if DEVICE.type == "cpu" else 4
    measure.wait()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    measure.wait()
    return (time.perf_counter() - start) / repeats


def _inaccurate(runners, model, batch, bfloat16: bool) -> dict[str, dict]:
    """Loss and gradients of all, one by one, against the published pipeline in float32: those that are off.

    The error is at most twice that of the published pipeline in the same precision, and 1e-5, as the tests demand of
    float32 gradients against Hugging Face's model.
    """
    (exact,), (peer,) = (contenders("a", model, batch, precision) for precision in (False, bfloat16))
    gold = exact.loss_and_gradients()
    published, wrong = _errors(peer, gold), {}
    # In a scalar errors may cancel by chance: no less is allowed than in the best of the gradients.
    published["the loss"] = max(published["the loss"], min(e for name, e in published.items() if name != "the loss"))
    allowed = {name: 2 * error + 1e-5 for name, error in published.items()}
    for runner in runners:
        errors = _errors(runner, gold)
        if off := {name: (error, allowed[name]) for name, error in errors.items() if not error <= allowed[name]}:
            wrong[runner.name] = off
    return wrong


def _errors(runner, gold: dict[str, torch.Tensor]) -> dict[str, float]:
    found = runner.loss_and_gradients()
    return {name: ((found[name] - exact).norm() / exact.norm()).item() for name, exact in gold.items()}
