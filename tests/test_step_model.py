"""The predictions for GPUs, against sums done by hand and launches counted in the launchers. No GPU, nothing timed."""

import json
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import mae_kernels
from benchmarks import work
from benchmarks.model import __main__ as command
from benchmarks.model import ops, published, scaling, step
from benchmarks.model.__main__ import SHAPES, main
from benchmarks.model.chips import CHIPS, H100
from benchmarks.model.ops import PASSES, predict_op
from benchmarks.model.scaling import Layer, predict_scaling
from benchmarks.model.step import predict_step
from benchmarks.work import CASES
from mae.profile import training_flops
from mae_kernels.chunks import chunk_samples

CEILINGS = {"copy_gb_per_s": 1000, "tflops": {"bfloat16": 100, "float32": 10, "tf32": 60}, "launch_us": 2}
BASE = replace(SHAPES["ViT-B/16"], batch=256)
ONE_OPS = {name: make for name, make in CASES.items() if "/ two ops" not in name}


def test_an_op_bound_by_memory_by_hand():
    # bfloat16: 256 x 147 predictions of 768 values, 2 bytes each, as many of one byte, ids of 8; the residual written.
    forward, backward = (predict_op(CASES["masked_mse uint8 bfloat16"](BASE), stage, CEILINGS) for stage in PASSES)
    values = 256 * 147 * 768
    assert forward.bytes == values * (2 + 1 + 2) + 256 * 147 * 8 + 4
    assert backward.bytes == values * (2 + 2)
    assert forward.us == pytest.approx(forward.bytes / 1e6 + 2 * 2)  # at 1000 GB/s a MB takes a us
    assert backward.us == pytest.approx(values * 4 / 1e6 + 2)
    assert (forward.bound, backward.bound) == ("memory", "memory")
    full = CASES["masked_mse full"](BASE)  # the residuals of visible patches are written, and read, as zeros
    residuals = 256 * 196 * 768 * 4
    assert predict_op(full, "forward", CEILINGS).bytes == values * (4 + 4) + 256 * 196 + 4 + residuals
    assert predict_op(full, "backward", CEILINGS).bytes == 2 * residuals


def test_the_bytes_of_head_and_loss_by_hand():
    forward, backward = (predict_op(CASES["linear_masked_mse bfloat16"](BASE), stage, CEILINGS) for stage in PASSES)
    hidden, head = 256 * 147 * 512, 768 * 512 + 768
    kept = hidden * 2 + head * 4
    assert forward.bytes == (hidden + head) * 4 + 256 * 147 * (768 * 4 + 8) + 4 + kept
    assert backward.bytes == kept + (hidden + head) * 4
    assert backward.us == pytest.approx(backward.bytes / 1e6 + 3 * 2)


@pytest.mark.parametrize(
    ("case", "us"),
    [
        ("patch_embed uint8 bfloat16", 14797.504512 / 100 + 2 * 2),  # 2 x 256 x 49 x 768 x 768 FLOPs
        ("patch_embed float32", 14797.504512 / (60 / 3) + 2),
        ("linear_masked_mse float32", (3 * 29595.009024 + 289.013760) / 10 + (4 + 4 * 8) * 2),  # in 4 chunks
    ],
)
def test_a_product_by_hand(case, us):
    found = predict_op(CASES[case](BASE), "forward", CEILINGS)
    assert found.us == pytest.approx(us, rel=1e-9)
    assert found.bound == "arithmetic"


def test_products_of_tf32_halves_only_where_they_are_faster():
    slow = CEILINGS | {"tflops": CEILINGS["tflops"] | {"tf32": 27}}
    assert predict_op(CASES["patch_embed float32"](BASE), "forward", slow).tflops == 10


def test_a_launch_costs_the_gap_of_the_gpu_where_that_was_measured():
    tiny = work.random_masking(replace(BASE, batch=1))
    found = predict_op(tiny, "forward", CEILINGS | {"kernel_us": 1.25})
    assert (found.launch_us, found.bound) == (1.25, "launches")


def test_what_an_op_cannot_do_is_refused():
    masking = CASES["random_masking"](BASE)
    with pytest.raises(ValueError, match="random_masking has no backward"):
        predict_op(masking, "backward", CEILINGS)
    with pytest.raises(ValueError, match="stage must be 'forward' or 'backward', got 'both'"):
        predict_op(masking, "both", CEILINGS)


class _Launches(published.EagerTraffic):
    """Runs the launchers in place of our ops, and counts what they launch of PyTorch's."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "mae_kernels":
            return super().__torch_dispatch__(func, types, args, kwargs)
        from mae_kernels import kernels

        with self:
            return getattr(kernels, func.overloadpacket.__name__)(*args)


@pytest.mark.parametrize("case", ONE_OPS)
def test_launches_are_those_of_the_launchers(case):
    pytest.importorskip("triton")
    from mae_kernels.kernels import chips
    from mae_kernels.kernels.masking import masking_kernel

    ours = []

    def launched(kernel, *args, **options):
        ours.append(kernel)

    op, counts = CASES[case](BASE), []
    with (
        patch.object(type(masking_kernel), "run", launched),
        patch("mae_kernels.chunks.chunk_samples", lambda *sizes: chunk_samples(*sizes[:3], "cuda")),
        chips.assume("sm_90"),
        FakeTensorMode(),
    ):
        arguments = op.arguments(torch.device("cpu"))
        leaves = [x for x in arguments.values() if isinstance(x, Tensor) and x.requires_grad]
        for stage in PASSES[: 1 + op.differentiable]:
            with _Launches() as eager, torch.autocast("cpu", torch.bfloat16, op.compute == torch.bfloat16):
                if stage == "forward":
                    out = getattr(mae_kernels, op.op)(**arguments)
                else:
                    torch.autograd.grad(out, leaves, out.detach())
            counts.append(len(ours) + eager.launches)
            assert ours
            ours.clear()
    assert ops.launches(op)[: len(counts)] == tuple(counts)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_flops_of_the_step_are_those_of_training(name, dtype):
    shape = SHAPES[name]
    parts = predict_step(shape, CEILINGS, dtype)
    flops = training_flops(step.model_of(shape).config, shape.mask_ratio) * shape.batch
    assert sum(part.total("flops") for part in parts) == flops


@pytest.mark.parametrize(("residual", "r"), [("float32", 4), ("bfloat16", 2)])
def test_bytes_between_the_products_by_hand(residual, r):
    parts = predict_step(BASE, CEILINGS, residual=residual)
    forward, backward = (
        next(x for x in parts if (x.group, x.name[:5], x.stage) == ("encoder", "norms", stage)) for stage in PASSES
    )
    values, casts = 256 * 50 * 768, 12 * 12 * 768**2 * (4 + 2)  # 12 weights of 768 x 768 in each of 12 blocks
    assert forward.total("bytes") == values * (12 * (4 * r + 12 * 2) + r + 2) + casts
    assert backward.total("bytes") == values * (12 * (12 * r + 43 * 2) + 3 * r + 2 * 2) + casts
    ours = {(x.name, x.stage): x.total("bytes") for x in parts if x.name in ("patch_embed", "scatter_mask_tokens")}
    expected = {
        (op.op, stage): op.bytes[i] - values_out * (4 - r)
        for op, values_out in (
            (CASES["patch_embed uint8 bfloat16"](BASE), 256 * 49 * 768 + 256 * 768),
            (CASES["scatter_mask_tokens bfloat16"](BASE), 256 * 197 * 512),
        )
        for i, stage in enumerate(PASSES)
    }
    assert ours == expected


def test_the_step_is_the_sum_of_its_kernels():
    parts = predict_step(BASE, CEILINGS)
    names = [(part.group, part.name, part.stage) for part in parts]
    assert len(set(names)) == len(names)
    assert {group for group, *_ in names} == {"embed", "encoder", "unshuffle", "decoder", "head", "update"}
    by_hand = sum(
        max(kernel.bytes / 1e6, kernel.flops / kernel.tflops / 1e6) + 2 * kernel.launches
        for part in parts
        for kernel in part.kernels
    )
    assert step.total_us(parts) == pytest.approx(by_hand)
    products = next(part for part in parts if part[:3] == ("encoder", "products", "forward"))
    assert products.total("us") == pytest.approx(12 * (12800 * 24 * 768**2 / 1e8 + 4 * 2))  # 24 D² for each token
    (attention, *_) = next(part for part in parts if part[:3] == ("encoder", "attention", "forward")).kernels
    assert (attention.flops, attention.tflops) == (4 * 256 * 50 * 50 * 768, step.ATTENTION * 100)
    update = parts[-1]
    trained = 111_907_840 - 197 * (768 + 512)  # less the fixed positions
    assert update.total("bytes") == 28 * trained


def test_twice_the_images_take_twice_the_time():
    once, twice = (predict_step(replace(BASE, batch=n), CEILINGS) for n in (256, 512))
    for a, b in zip(once, twice, strict=True):
        ratio = b.total("us") / a.total("us")
        if a.group == "update":
            assert ratio == 1
        elif a.total("us") > 1000:
            assert 1.8 < ratio <= 2, a[:3]


def test_an_all_reduce_by_hand():
    gb = 1e9
    assert 2 * scaling.one_way_us(gb, 8, H100) == pytest.approx(2 * 7 / 8 / (450 * 0.8) * 1e6)
    assert scaling.one_way_us(gb, 1, H100) == 0
    between = 2 * 1 / 2 / 8 / (50 * 0.8) * 1e6  # an eighth of the bytes over each GPU's port
    assert 2 * scaling.one_way_us(gb, 16, H100) == pytest.approx(2 * 7 / 8 / (450 * 0.8) * 1e6 + between)
    for gpus in (12, 0, -8):
        with pytest.raises(ValueError, match=f"{gpus} GPUs are neither"):
            scaling.one_way_us(gb, gpus, H100)


def test_gradients_leave_while_the_backward_goes_on():
    bucket = scaling.BUCKET_BYTES
    us = 2 * scaling.one_way_us(bucket, 8, H100)
    full, half = bucket / 4, bucket / 8  # parameters
    slow = [Layer(0, 10 * us, full), Layer(0, 10 * us, full)]
    assert scaling._all_reduced(slow, 8, H100) == pytest.approx((2 * us, us))  # all but the last bucket is hidden
    fast = [Layer(0, us / 4, full), Layer(0, us / 4, full)]
    assert scaling._all_reduced(fast, 8, H100) == pytest.approx((2 * us, 2 * us - us / 4))
    halves = [Layer(0, us, half)] * 4
    assert scaling._all_reduced(halves, 8, H100) == pytest.approx((2 * us, us))  # two layers a bucket


def test_sharded_weights_are_gathered_a_layer_ahead():
    gather, scatter = (scaling.one_way_us(size * 1e6, 8, H100) for size in (2, 4))
    hidden = [Layer(1e6, 1e6, 1e6)] * 3
    assert scaling._sharded(hidden, 8, H100) == pytest.approx((6 * gather + 3 * scatter, 2 * gather + scatter))
    nothing = [Layer(0, 0, 1e6)] * 3
    total = 6 * gather + 3 * scatter
    assert scaling._sharded(nothing, 8, H100) == pytest.approx((total, total))
    some = [Layer(gather / 4, scatter / 2, 1e6)] * 2  # a quarter of a gather, half of a scatter, or a gather
    exposed = (2 * gather + scatter) + 3 / 4 * gather + 1 / 2 * scatter
    assert scaling._sharded(some, 8, H100) == pytest.approx((4 * gather + 2 * scatter, exposed))


@pytest.mark.parametrize("strategy", ["DDP", "FSDP2"])
def test_scaling(strategy):
    parts = predict_step(BASE, CEILINGS)
    alone, node, many = (predict_scaling(BASE, parts, H100, n, strategy) for n in (1, 8, 512))
    assert (alone.communication_ms, alone.exposed_ms, alone.efficiency) == (0, 0, 1)
    assert alone.step_ms == pytest.approx(step.total_us(parts) / 1e3)
    assert 0 < node.exposed_ms < node.communication_ms < many.communication_ms
    assert node.images_per_s == pytest.approx(8 * 256 / node.step_ms * 1e3)
    assert node.efficiency == pytest.approx(node.images_per_s / 8 / alone.images_per_s)
    with pytest.raises(ValueError, match="must be 'DDP' or 'FSDP2', got 'TP'"):
        predict_scaling(BASE, parts, H100, 8, "TP")


def test_layers_hold_every_parameter_and_all_time_but_the_update():
    parts = predict_step(BASE, CEILINGS)
    found = scaling.layers(BASE, parts)
    assert len(found) == 12 + 8 + 3
    assert sum(layer.parameters for layer in found) * 28 == pytest.approx(parts[-1].total("bytes"))
    us = sum(layer.forward_us + layer.backward_us for layer in found)
    assert us == pytest.approx(step.total_us(parts) - parts[-1].total("us"))


def test_eager_ops_read_and_write_all_of_their_tensors():
    x, one, ids = torch.zeros(8, 4), torch.zeros(1, 4), torch.zeros(2, 4, dtype=torch.int64)
    for run, moved in (
        (lambda: x + one.expand(8, 4), 128 + 16 + 128),
        (lambda: x.t()[1:].reshape(4, 6), 96 + 96),
        (lambda: x.add_(1), 128 + 128),
        (lambda: torch.gather(x, 0, ids), 2 * 32 + 64),  # two of the rows
        (lambda: x[1:].view(-1), 0),
    ):
        with published.EagerTraffic() as traffic:
            run()
        assert (traffic.bytes, traffic.launches) == (moved, int(moved > 0))


def test_the_published_glue_moves_and_computes_more():
    ours = [part for part in predict_step(BASE, CEILINGS) if part.name in command.GLUE]
    glue = published.predict_published_glue(BASE, CEILINGS)
    assert glue.total("flops") == 4 * 256 * 196 * 768**2 + 6 * 256 * 197 * 512 * 768
    assert glue.total("bytes") > 5 * sum(part.total("bytes") for part in ours)
    assert glue.total("us") > step.total_us(ours)


def printed(capsys, *arguments: str) -> list[str]:
    main([*arguments])
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("chip", CHIPS)
def test_the_command_says_that_it_predicts(chip, capsys):
    lines = printed(capsys, "--chip", chip, "--model", "ViT-L/16", "--batch", "64", "--gpus", "8", "64")
    assert lines[0].startswith(f"PREDICTED, not measured: ViT-L/16 N=64 on {CHIPS[chip].name}.")
    assert not any("| measured" in line for line in lines)
    for case, make in ONE_OPS.items():
        stages = PASSES[: 1 + make(BASE).differentiable]
        assert [f"{case}  {s}  " for s in PASSES if any(x.startswith(f"{case}  {s}  ") for x in lines)] == [
            f"{case}  {stage}  " for stage in stages
        ]
    assert sum(line.startswith(("DDP ", "FSDP2 ")) for line in lines) == 4
    assert any("glue" in line and "published" in line for line in lines)
    assert lines.index("Assumptions:") > max(i for i, line in enumerate(lines) if line.startswith("FSDP2 "))


def test_the_arithmetic_of_an_op_is_printed(capsys):
    line = next(x for x in printed(capsys) if x.startswith("patch_embed uint8 bfloat16  forward"))
    assert line == (
        "patch_embed uint8 bfloat16  forward  52.0 MB / 4320 GB/s = 12.0 us | 14.8 GFLOP / 791 TFLOP/s = 18.7 us"
        " | 2 launches x 1.5 us -> 21.7 us, bound by arithmetic"
    )


@pytest.fixture
def result_file(tmp_path):
    def write(**facts):
        row = {"shape": "ViT-B/16 N=256", "op": "gather_tokens", "pass": "forward", "backend": "triton"}
        step = {"shape": "ViT-B/16 N=256", "op": "training step", "dtype": "bfloat16"}
        rows = [
            row | {"host_us": 7.0},
            row | {"backend": "eager", "median_ms": 9.0},
            row | {"median_ms": 0.1},
            row | {"pass": "forward+backward", "median_ms": 0.5},
            step | {"contender": "(a) published pipeline as written", "median_ms": 99.0},
            step | {"contender": "(e) mae, compiled", "median_ms": 88.0},
        ]
        ceilings = CEILINGS | {"kernel_us": 1.0}
        facts = {"kind": "gpu", "device": "NVIDIA H100 80GB HBM3", "ceilings": ceilings, "rows": rows, **facts}
        path = tmp_path / "result.json"
        path.write_text(json.dumps(facts), encoding="utf-8")
        return str(path)

    return write


def test_measured_times_stand_beside_predicted_ones(result_file, capsys):
    lines = printed(capsys, "--chip", "h100", "--results", result_file())
    assert "Ceilings measured, in result.json: copy 1000 GB/s" in lines[0]
    predicted = predict_op(CASES["gather_tokens"](BASE), "forward", CEILINGS | {"kernel_us": 1.0}).us
    beside = [line for line in lines if "| measured" in line]
    assert [line.partition("  ")[0] for line in beside[:2]] == ["gather_tokens"] * 2
    assert beside[0].endswith(f"| measured 100.0 us, {100 / predicted:.2f} x predicted")
    assert "forward+backward" in beside[1]
    assert beside[2].startswith("(e) mae, compiled | measured 88.00 ms, ")
    assert len(beside) == 3


def test_json_holds_what_the_text_says(result_file, capsys):
    found = json.loads("".join(printed(capsys, "--chip", "h100", "--results", result_file(), "--json")))
    assert found["predicted"] is True
    assert {row["op"] for row in found["ops"]} == set(ONE_OPS)
    assert [row["measured_ms"] for row in found["ops"] if row["measured_ms"]] == [0.1]
    parts = predict_step(BASE, CEILINGS | {"kernel_us": 1.0})
    times = [row["us"] for row in found["step"] if row["group"] != "glue"]
    assert sum(times) == pytest.approx(step.total_us(parts))
    assert [(row["strategy"], row["gpus"]) for row in found["scaling"]][:2] == [("DDP", 1), ("DDP", 8)]


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"kind": "cpu"}, "result.json is of kind 'cpu', and only a GPU has the ceilings of one"),
        ({"ceilings": {}}, "result.json holds no ceilings; leave out --results"),
        ({"device": "NVIDIA H200"}, "result.json was measured on NVIDIA H200, not on H100 SXM; see --chip"),
    ],
)
def test_files_that_cannot_serve_are_refused(facts, message, result_file):
    with pytest.raises(SystemExit) as stop:
        main(["--chip", "h100", "--results", result_file(**facts)])
    assert stop.value.code == f"benchmarks.model: {message}"


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"cannot read .*nowhere\.json"):
        main(["--results", str(tmp_path / "nowhere.json")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "12"], "12 GPUs are neither part of a node of 8 nor whole nodes"),
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--model", "ViT-X"], "invalid choice: 'ViT-X'"),
    ],
)
def test_bad_options_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
