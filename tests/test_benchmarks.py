"""The benchmarks measure what they say: run in Triton's interpreter, which proves all but the speed."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import mae_kernels
from benchmarks import measure, race, record, test_ops
from benchmarks.ceilings import floor_seconds
from benchmarks.work import CASES, OP_SHAPES, STAGES
from mae import MAEConfig, MaskedAutoencoder
from mae_kernels.kernels.tiles import RowTiles

(TINY,) = OP_SHAPES["tiny"]
CLIP = replace(TINY, image_size=(4, 32, 32), patch_size=(2, 16, 16), mask_ratio=0.5)
CEILINGS = {
    "copy_gb_per_s": 4000.0,
    "tflops": {
        "linear": {"bfloat16": 800.0, "float32": 40.0, "tf32": 390.0},
        "convolution": {"bfloat16": 700.0, "float32": 50.0},
    },
}


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> tuple[dict, str]:
    pytest.importorskip("triton")
    path = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", "pytest", "benchmarks/test_ops.py", "--benchmark-only", "--size=tiny"]
    # Inside a worker of pytest-xdist, whose variables it would inherit, pytest-benchmark measures nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    result = subprocess.run(
        [*command, "--rounds=2", "--max-rounds=2", f"--record={path}", "-k", "gather or masking"],
        cwd=record.ROOT,
        env=environment | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    (file,) = path.iterdir()
    assert file.name.startswith("interpreter-")
    return record.read(file), result.stdout


@pytest.mark.slow
def test_a_record_of_interpreted_kernels_says_so(interpreted):
    result, printed = interpreted
    assert result["kind"] == "interpreter"
    assert result["command"].endswith("--rounds=2 --max-rounds=2 -k 'gather or masking'")
    assert {"copy_gb_per_s", "tflops", "launch_us", "linear_host_us"} <= result["ceilings"].keys()
    assert "says nothing about a GPU" in printed
    assert "speed-up" not in printed


@pytest.mark.slow
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
        assert row["of_clone"] == row["clone_ms"] / row["median_ms"]
        assert row["clone_ms"] > 0
        if backend != "reference":
            assert row["speedup"] == rows[name, stage, "reference"]["median_ms"] / row["median_ms"]
        if backend != "reference" and stage != "backward":
            assert row["operator_ms"] > 0
            assert row["wrapper_ms"] > 0
    both = [rows["gather_tokens", stage, "triton"]["median_ms"] for stage in STAGES]
    assert max(both[:2]) < both[2]


def test_a_wrong_op_has_no_speed(monkeypatch):
    def check():
        work = CASES["gather_tokens"](TINY)
        ops = {"reference": work.reference, "eager": mae_kernels.gather_tokens}
        contenders = {name: test_ops._Contender(name, op, work) for name, op in ops.items()}
        test_ops._assert_accurate(contenders, test_ops._arguments(work))

    monkeypatch.setattr(test_ops, "OURS", ["eager"])
    right = mae_kernels.gather_tokens
    check()
    monkeypatch.setattr(mae_kernels, "gather_tokens", lambda tokens, ids: right(tokens, ids) * 1.001)
    with pytest.raises(AssertionError, match="the result is off by"):
        check()
    monkeypatch.setattr(mae_kernels, "gather_tokens", lambda tokens, ids: right(tokens.detach() + 0 * tokens, ids))
    with pytest.raises(AssertionError, match="the gradient of tokens is off by"):
        check()


def test_floors():
    # 8 GB at 4000 GB/s are 2 ms; 800 GFLOP at 800 TFLOP/s are 1 ms, in float32 at a third of 390 TFLOP/s 6.15 ms.
    assert floor_seconds(8 * 10**9, 8 * 10**11, torch.bfloat16, CEILINGS) == pytest.approx(2e-3)
    assert floor_seconds(8 * 10**9, 8 * 10**11, torch.float32, CEILINGS) == pytest.approx(8 / 1300)
    without_tf32 = {**CEILINGS, "tflops": {"linear": {"float32": 40.0}, "convolution": {"float32": 50.0}}}
    assert floor_seconds(0, 10**12, torch.float32, without_tf32) == pytest.approx(20e-3)  # of the faster library


@pytest.mark.parametrize(
    ("shape", "m", "k", "values", "frames", "box"),
    [(TINY, 12, 4, 768, 1, (82, 111, 64, 64)), (CLIP, 4, 4, 1536, 4, (41, 55, 32, 32))],
)
def test_bytes(shape, m, k, values, frames, box):
    """Each input in use once, each result once: by hand."""
    n, d, num_patches = 2, 64, m + k  # of a batch, hidden and visible patches, E and D
    h, w, rows, columns = box  # cut out, and what becomes of it
    hidden, visible, pred = n * m * values, n * k * values, n * m * values * 4
    parameters, tokens = (d * values + 2 * d) * 4, n * (1 + k) * d * 4
    by_hand = {
        # pixels, box and flip of each frame
        "random_resized_crop": (n * frames * (3 * h * w + 4 * 8 + 1 + 3 * rows * columns), 0),
        # noise; ids_keep and ids_mask, ids_restore, mask
        "random_masking": (n * num_patches * (4 + 8 + 8 + 1), 0),
        "gather_tokens": (2 * n * k * d * 4 + n * k * 8, n * k * d * 4 + n * k * 8 + n * num_patches * d * 4),
        "patch_embed uint8": (
            visible + n * k * 8 + parameters + num_patches * d * 4 + tokens, tokens + visible + n * k * 8 + parameters
        ),
        # the residual is written, read, and becomes the gradient
        "masked_mse masked-only": (2 * pred + n * m * 8 + pred + 4, 4 + pred + pred),
        "masked_mse full": (2 * pred + n * num_patches + pred + 4, 4 + pred + pred * num_patches // m),
        # one byte of a pixel instead of two of a residual
        "masked_mse uint8 bfloat16": (pred // 2 + hidden + n * m * 8 + 4, 4 + pred + hidden + n * m * 8),
    }  # fmt: skip
    assert {name: CASES[name](shape).bytes for name in by_hand} == by_hand


@pytest.mark.parametrize(
    ("image_size", "patch_size", "run"), [((32, 32), (8, 8), "acgd"), ((4, 32, 32), (2, 16, 16), "ad")]
)
def test_all_contenders_train_the_same_model_on_the_same_masks(image_size, patch_size, run):
    """Hugging Face's are left out where theirs is not that model."""
    pytest.importorskip("transformers")
    from benchmarks.contenders import Batch, contenders

    torch.manual_seed(0)
    sizes = {"embed_dim": 48, "depth": 2, "num_heads": 4, "decoder_embed_dim": 32, "decoder_depth": 2}
    model = MaskedAutoencoder(MAEConfig(image_size, patch_size, **sizes, decoder_num_heads=4))
    images, noise = torch.randint(256, (3, 3, *image_size), dtype=torch.uint8), torch.rand(3, model.config.num_patches)
    runners = contenders("acgd", model, Batch(images, noise, 0.6), bfloat16=False)
    assert "".join(runner.name for runner in runners) == run
    published, *others = (runner.loss_and_gradients() for runner in runners)
    for found in others:
        torch.testing.assert_close(found, published, rtol=1e-4, atol=1e-6)


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
    short, long = measure.seconds(lambda: None, lambda: sum(range(100_000)))
    assert 0 <= short < long


def test_the_file_of_a_machine_is_named_by_what_it_is(monkeypatch):
    cpu = {"brand": "AMD EPYC", "vendor": "AuthenticAMD", "family": 26, "model": 2, "instruction_sets": ["avx2"]}
    assert record.conditions()["cpu"].keys() == cpu.keys()
    facts = {"kind": "cpu", "device": "AMD EPYC", "cpu": cpu, "threads": 2}
    monkeypatch.setattr(record, "conditions", lambda: facts)
    assert record.name() == "cpu-amd-family-26-model-2-2-threads"
    facts |= {"kind": "gpu", "device": "NVIDIA H100 80GB HBM3"}
    assert record.name() == "nvidia-h100-80gb-hbm3"


@pytest.fixture
def gather():
    """The dispatcher's op and arguments, and the rule that its launcher asks."""
    op, args = torch.ops.mae_kernels.gather_tokens.default, (torch.randn(2, 9, 24), torch.tensor([[0, 3], [8, 1]]))
    with mae_kernels.use_backend("triton"):
        ((rule, own),) = race.consulted(op, args).items()
        yield op, args, rule, own


def test_a_race_finds_the_rules_that_launchers_ask(gather):
    *_, rule, own = gather
    assert rule == ("mae_kernels.kernels.gather_tokens", "row_tiles")
    assert isinstance(own, RowTiles)
    names = {name for _, name in race.rules()}
    assert {"row_tiles", "loss_tiles", "backward_tiles", "sort_tiles", "crop_tiles"} <= names


def test_tiles_with_other_results_are_dropped(gather):
    op, args, rule, own = gather
    found = race.race(op, args, rule, own, [RowTiles(16, 32), RowTiles(8, 16, 1)], rounds=2)
    assert (found["rule"], found["raced"], found["dropped"]) == ("gather_tokens.row_tiles", 3, 0)
    noise = torch.rand(2, 20)
    op, rule = torch.ops.mae_kernels.masking.default, ("mae_kernels.kernels.masking", "sort_tiles")
    ((_, own),) = race.consulted(op, (noise, None, 5, noise.shape[1] - 5)).items()
    found = race.race(
        op, (noise, None, 5, noise.shape[1] - 5), rule, own, [type(own)(16, 1), type(own)(64, 2)], rounds=2
    )  # 16 are too few
    assert (found["raced"], found["dropped"]) == (2, 1)


def test_neighbours_of_tiles():
    found = race.neighbours(RowTiles(8, 256, num_warps=8))
    assert RowTiles(4, 256, 8) in found
    assert RowTiles(16, 128, 8) in found
    assert all(tiles.num_warps <= 16 for tiles in found)
    assert len(set(found)) == len(found)
