"""The benchmarks measure what they say: run in Triton's interpreter, which proves all but the speed."""

import os
import subprocess
import sys

import pytest
import torch

import mae_kernels
from benchmarks import measure, record, test_ops
from benchmarks.ceilings import floor_seconds
from benchmarks.shapes import OPS
from benchmarks.work import CASES, STAGES

(TINY,) = OPS["tiny"]
CEILINGS = {"copy_gb_per_s": 4000.0, "tflops": {"bfloat16": 800.0, "float32": 50.0, "tf32": 390.0}}


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> tuple[dict, str]:
    pytest.importorskip("triton")
    path = tmp_path_factory.mktemp("results") / "tiny.json"
    command = [sys.executable, "-m", "pytest", "benchmarks/test_ops.py", "--benchmark-only", "--size=tiny"]
    # Inside a worker of pytest-xdist, whose variables it would inherit, pytest-benchmark measures nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    result = subprocess.run(
        [*command, "--rounds=2", f"--record={path}", "-k", "gather or masking"],
        cwd=record.ROOT,
        env=environment | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return record.read(path), result.stdout


def test_a_record_of_interpreted_kernels_says_so(interpreted):
    result, printed = interpreted
    assert result["kind"] == "interpreter"
    assert result["command"].endswith("--rounds=2 -k 'gather or masking'")
    assert {"copy_gb_per_s", "tflops", "launch_us", "linear_host_us"} <= result["ceilings"].keys()
    assert "says nothing about a GPU" in printed
    assert "speed-up" not in printed


def test_rows(interpreted):
    result, _ = interpreted
    rows = {(row["op"], row["pass"], row["backend"]): row for row in result["rows"]}
    chosen = [name for name in CASES if name.startswith(("gather", "random_masking"))]
    assert set(rows) == {
        (name, stage, backend)
        for name in chosen
        for stage in CASES[name](TINY).stages
        for backend in ("reference", "eager", "triton")
    }
    for (name, stage, backend), row in rows.items():
        work = CASES[name](TINY)
        passes = {"forward": (0,), "backward": (1,), "forward+backward": (0, 1)}[stage]
        assert row["logical_bytes"] == sum(work.bytes[i] for i in passes)
        assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        floor = floor_seconds(row["logical_bytes"], row["flops"], work.compute, result["ceilings"])
        assert row["of_floor"] == pytest.approx(floor * 1e3 / row["median_ms"])
        if backend != "reference":
            assert row["speedup"] == rows[name, stage, "reference"]["median_ms"] / row["median_ms"]
        if backend != "reference" and stage != "backward":
            assert row["operator_ms"] > 0
            assert row["wrapper_ms"] > 0
    both = [rows["gather_tokens", stage, "triton"]["median_ms"] for stage in STAGES]
    assert max(both[:2]) < both[2]


def test_a_wrong_op_has_no_speed(monkeypatch):
    monkeypatch.setattr(measure, "OURS", ["eager"])
    monkeypatch.setattr(test_ops, "OURS", ["eager"])
    right = mae_kernels.gather_tokens
    monkeypatch.setattr(mae_kernels, "gather_tokens", lambda tokens, ids: right(tokens, ids) * 1.001)
    with pytest.raises(AssertionError, match="the result is off by"):
        test_ops._measured("gather_tokens", TINY, False, 2)
    monkeypatch.setattr(mae_kernels, "gather_tokens", lambda tokens, ids: right(tokens.detach() + 0 * tokens, ids))
    with pytest.raises(AssertionError, match="the gradient of tokens is off by"):
        test_ops._measured("gather_tokens", TINY, False, 2)


def test_floors():
    # 8 GB at 4000 GB/s are 2 ms; 800 GFLOP at 800 TFLOP/s are 1 ms, in float32 at a third of 390 TFLOP/s 6.15 ms.
    assert floor_seconds(8 * 10**9, 8 * 10**11, torch.bfloat16, CEILINGS) == pytest.approx(2e-3)
    assert floor_seconds(8 * 10**9, 8 * 10**11, torch.float32, CEILINGS) == pytest.approx(8 / 1300)
    without_tf32 = {**CEILINGS, "tflops": {"bfloat16": 800.0, "float32": 50.0}}
    assert floor_seconds(0, 10**12, torch.float32, without_tf32) == pytest.approx(20e-3)


@pytest.mark.parametrize("name", CASES)
def test_bytes_are_those_of_the_tensors(name):
    """Inputs and outputs in use, counted from real tensors."""
    work = CASES[name](TINY)
    arguments = work.arguments(torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16, enabled=work.compute == torch.bfloat16):
        out = getattr(mae_kernels, work.op)(**arguments)
    outputs = [out] if isinstance(out, torch.Tensor) else list(out)
    sizes = {k: x.nbytes for k, x in arguments.items() if isinstance(x, torch.Tensor) and k not in ("mean", "std")}
    in_use = {"patch_embed": TINY.num_keep, "masked_mse": TINY.num_masked, "linear_masked_mse": TINY.num_masked}
    if work.op in in_use:
        sizes["images"] = sizes["images"] * in_use[work.op] // TINY.num_patches
    if work.op == "gather_tokens":
        sizes["tokens"] = sizes["tokens"] * TINY.num_keep // TINY.num_patches
    if name == "masked_mse full":
        sizes["pred"] = sizes["pred"] * TINY.num_masked // TINY.num_patches
    if work.op == "random_resized_crop":
        _, _, h, w = arguments["boxes"][0].tolist()
        sizes["images"] = TINY.batch * TINY.channels * h * w
    assert work.bytes[0] == sum(sizes.values()) + sum(x.nbytes for x in outputs)
    if work.differentiable:
        leaves = {k: x for k, x in arguments.items() if isinstance(x, torch.Tensor) and x.requires_grad}
        grads = torch.autograd.grad(outputs[0], [*leaves.values()], torch.ones_like(outputs[0]))
        read = {
            "patch_embed": outputs[0].nbytes + sizes.get("images", 0) + sizes.get("ids_keep", 0),
            "gather_tokens": outputs[0].nbytes + sizes.get("ids", 0),
            "scatter_mask_tokens": outputs[0].nbytes + sizes.get("ids_restore", 0),
            "masked_mse": sizes.get("pred", 0),
            "linear_masked_mse": 0,
        }[work.op]
        assert work.bytes[1] == read + sum(g.nbytes for g in grads)


def test_the_recorder_replays_what_reached_the_dispatcher():
    tokens = torch.randn(2, 5, 8, requires_grad=True)
    recorder = measure.OpRecorder()
    with recorder:
        mae_kernels.gather_tokens(tokens, torch.tensor([[0, 3], [4, 1]])).sum().backward()
    assert [func.name() for func, _ in recorder.calls] == [
        "mae_kernels::gather_tokens",
        "mae_kernels::gather_tokens_backward",
    ]
    recorder.replay()


def test_without_kernels_a_call_computes_nothing():
    tokens = torch.full((2, 5, 8), 3.0)
    ids = torch.tensor([[0, 3], [4, 1]])
    with measure.no_kernels():
        shapes = [mae_kernels.gather_tokens(tokens, ids).shape for _ in range(2)]
        mae_kernels.gather_tokens(tokens, ids + 100)  # not even read
    assert shapes == [(2, 2, 8)] * 2
    assert torch.equal(mae_kernels.gather_tokens(tokens, ids), torch.full((2, 2, 8), 3.0))


def test_several_calls_in_a_row_are_timed_one_by_one():
    before = measure.clock()
    short, long = measure.seconds(lambda: None, lambda: sum(range(100_000)))
    assert 0 <= short < long
    assert measure.clock() - before == pytest.approx(short + long)
