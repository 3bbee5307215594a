"""How long each op and the whole training step should take on a GPU: ``python -m benchmarks.model``, no GPU needed.

A kernel takes the longer of moving its bytes at the rate of a copy and computing at the rate of a product, and a gap.
Nothing here is measured, unless a result file brings these rates and times to compare with.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks import record
from benchmarks.model.chips import CHIPS, COPY, LINKS, PRODUCTS, Chip, assumed_ceilings
from benchmarks.model.ops import Prediction, predict_ops
from benchmarks.model.published import predict_published_glue
from benchmarks.model.scaling import BUCKET_BYTES, Scaling, predict_scaling
from benchmarks.model.step import ATTENTION, Part, model_of, predict_step, total_us
from benchmarks.shapes import STEP, Shape
from mae.profile import training_flops

SHAPES = {shape.name: shape for shapes in STEP.values() for shape in shapes}
GLUE = ("random_masking", "patch_embed", "scatter_mask_tokens", "linear_masked_mse")  # and their counterparts


def assumptions(chip: Chip, measured: bool) -> list[str]:
    rates = (
        "rates of copies and products and the gap of a launch are those of the result file"
        if measured
        else f"a copy reaches {COPY:.0%} of the data sheet's bandwidth, a product {PRODUCTS:.0%} of its dense rate, "
        f"and a launch costs the GPU {chip.launch_gap_us:g} us"
    )
    return f"""\
{rates}
attention reaches {ATTENTION:.0%} of a product's rate, its recomputed scores included
no kernel overlaps with another, and the host is always ahead
bytes: each tensor of a kernel once; partial sums, and chunks of the head, stay in the L2 cache
float32: patch_embed multiplies TF32 halves three times if that is faster; all else runs without tensor cores
elementwise kernels between products are fused as a compiler does; norms and gelu are computed again in the backward
in the step what is not a product costs its bytes alone, and drawing noise and making crops nothing
AdamW moves 28 bytes for each parameter: weight, gradient and two moments in, weight and moments out
the published pipeline: each op is one kernel; its transformer blocks are taken to be ours
links reach {LINKS:.0%} of the data sheet's rate
DDP: gradients leave during the backward in buckets of {BUCKET_BYTES >> 20} MiB, each closed at the end of a layer
FSDP2: each layer and its update sharded over all GPUs; weights gathered in bfloat16 in both passes, gradients reduced
    in float32
several GPUs: no latency, no straggler, no kernel slowed by communication, so efficiencies are upper bounds
""".replace("\n    ", " ").splitlines()


def measured_ms(rows: list[dict], shape: Shape, case: str, stage: str) -> float | None:
    wanted = {"shape": shape.id, "op": case, "pass": stage, "backend": "triton"}
    found = (row for row in rows if "median_ms" in row and wanted.items() <= row.items())
    return next((row["median_ms"] for row in found), None)


def against(predicted_us: float, ms: float | None) -> str:
    if ms is None:
        return ""
    time = f"{ms:.2f} ms" if ms >= 10 else f"{ms * 1e3:.1f} us"
    return f" | measured {time}, {ms * 1e3 / predicted_us:.2f} x predicted"


def op_lines(shape: Shape, ops: dict[str, dict[str, Prediction]], rows: list[dict]) -> Iterator[str]:
    for case, passes in ops.items():
        for stage, found in passes.items():
            yield f"{case}  {stage}  {found}{against(found.us, measured_ms(rows, shape, case, stage))}"
        if both := measured_ms(rows, shape, case, "forward+backward"):
            us = sum(found.us for found in passes.values())
            yield f"{case}  forward+backward  {us:.1f} us{against(us, both)}"


def step_lines(shape: Shape, parts: list[Part], glue: Part, chip: Chip, dtype: str) -> Iterator[str]:
    us = total_us(parts)
    yield f"{'':56}{'GB':>8}{'TFLOP':>8}{'launches':>10}{'ms':>8}{'share':>8}"
    for part in parts:
        gb, tflop, own = part.total("bytes") / 1e9, part.total("flops") / 1e12, part.total("us")
        name = f"{part.group}: {part.name}, {part.stage}"
        yield f"{name:56}{gb:8.2f}{tflop:8.3f}{part.total('launches'):10}{own / 1e3:8.2f}{own / us:8.1%}"
    flops = training_flops(model_of(shape).config, shape.mask_ratio) * shape.batch
    peak = chip.bfloat16_tflops if dtype == "bfloat16" else chip.float32_tflops
    yield (
        f"step {us / 1e3:.2f} ms, {shape.batch / us * 1e6:.0f} images/s, {flops / us / 1e6:.0f} TFLOP/s, "
        f"MFU {flops / us / 1e6 / peak:.1%} of the data sheet's {peak:g} TFLOP/s"
    )
    ours = [part for part in parts if part.name in GLUE]
    for whose, pieces in (("ours", ours), ("the published pipeline's, eager", [glue])):
        gb, tflop, count = (sum(part.total(what) for part in pieces) for what in ("bytes", "flops", "launches"))
        own = total_us(pieces)
        whole = us - total_us(ours) + own
        yield (
            f"glue with head and loss, {whose}: {gb / 1e9:.2f} GB, {tflop / 1e12:.3f} TFLOP, {count} launches: "
            f"{own / 1e3:.2f} ms, {own / whole:.1%} of a step of {whole / 1e3:.2f} ms"
        )
    pixels, link = shape.batch * shape.channels * shape.image**2, LINKS * chip.pcie_gb_per_s
    yield (
        f"input copy, overlapped and not counted: {pixels / 1e6:.1f} MB of uint8 / {link:.0f} GB/s = "
        f"{pixels / link / 1e6:.2f} ms; published, in float32, not counted either: {pixels * 4 / link / 1e6:.2f} ms"
    )
    state = sum(p.numel() * p.requires_grad for p in model_of(shape).parameters()) * 16 / 2**30
    yield f"weights, gradients and moments: {state:.2f} GiB of {chip.memory_gib:.0f} GiB"


def scaling_lines(found: list[Scaling]) -> Iterator[str]:
    yield f"{'':6}{'GPUs':>5}{'communication ms':>18}{'exposed ms':>12}{'step ms':>9}{'images/s':>12}{'efficiency':>12}"
    for x in found:
        yield (
            f"{x.strategy:6}{x.gpus:5}{x.communication_ms:18.2f}{x.exposed_ms:12.2f}{x.step_ms:9.2f}"
            f"{x.images_per_s:12.0f}{x.efficiency:12.1%}"
        )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model", description=__doc__.partition("\n")[0])
    parser.add_argument("--chip", choices=CHIPS, default="h200")
    parser.add_argument("--model", choices=SHAPES, default="ViT-B/16")
    parser.add_argument("--batch", type=int, default=256, help="images of each GPU")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the step's products")
    parser.add_argument("--residual", choices=["float32", "bfloat16"], default="float32", help="of the step's tokens")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--results", type=Path, metavar="FILE", help="ceilings, and times to compare with, of a GPU")
    parser.add_argument("--json", action="store_true", help="JSON instead of text")
    options = parser.parse_args(argv)
    if options.batch < 1:
        parser.error(f"--batch must be at least 1, got {options.batch}")
    chip, shape = CHIPS[options.chip], dataclasses.replace(SHAPES[options.model], batch=options.batch)
    ceilings, rows, source = assumed_ceilings(chip), [], "from its data sheet, see the assumptions"
    if options.results:
        result, source = _readable(options.results, chip), f"measured, in {options.results.name}"
        rows = result["rows"]
        ceilings |= result["ceilings"]
    parts = predict_step(shape, ceilings, options.dtype, options.residual)
    glue = predict_published_glue(shape, ceilings, options.dtype)
    try:
        scaling = [predict_scaling(shape, parts, chip, n, s) for s in ("DDP", "FSDP2") for n in options.gpus]
    except ValueError as error:
        parser.error(f"--gpus: {error}")
    ops, notes = predict_ops(shape, ceilings), assumptions(chip, bool(options.results))
    if options.json:
        print(_json(shape, chip, ceilings, ops, rows, [*parts, glue], scaling, notes))
        return
    # Measured steps have the residual stream's default.
    wanted = {"op": "training step", "shape": shape.id, "dtype": options.dtype}
    steps = [row for row in rows if wanted.items() <= row.items() and ") mae," in row["contender"]]
    steps = steps if options.residual == "float32" else []
    rates = ", ".join(f"{name} {rate:.0f} TFLOP/s" for name, rate in ceilings["tflops"].items())
    print(
        f"PREDICTED, not measured: {shape.id} on {chip.name}. Ceilings {source}: "
        f"copy {ceilings['copy_gb_per_s']:.0f} GB/s, {rates}.\n",
        *op_lines(shape, ops, rows),
        f"\nThe training step, predicted, products in {options.dtype}, tokens between blocks in {options.residual}:",
        *step_lines(shape, parts, glue, chip, options.dtype),
        *(f"{row['contender']}{against(total_us(parts), row['median_ms'])}" for row in steps),
        f"\n{shape.batch} images on each GPU, predicted:",
        *scaling_lines(scaling),
        "\nAssumptions:",
        *(f"- {note}" for note in notes),
        sep="\n",
    )


def _readable(path: Path, chip: Chip) -> dict:
    try:
        result = record.read(path)
    except (OSError, ValueError) as error:
        sys.exit(f"benchmarks.model: cannot read {path}: {error}")
    kind, device = result.get("kind"), str(result.get("device"))
    if kind != "gpu":
        sys.exit(f"benchmarks.model: {path.name} is of kind {kind!r}, and only a GPU has the ceilings of one")
    if not result.get("ceilings"):
        sys.exit(f"benchmarks.model: {path.name} holds no ceilings; leave out --results")
    if chip.name.split()[0] not in device:
        sys.exit(f"benchmarks.model: {path.name} was measured on {device}, not on {chip.name}; see --chip")
    return result


def _json(shape, chip, ceilings, ops, rows, parts, scaling, notes) -> str:
    def numbers(get) -> dict:
        return {name: get(name) for name in ("bytes", "flops", "launches", "us")}

    facts = {"predicted": True, "shape": shape.id, "chip": dataclasses.asdict(chip), "ceilings": ceilings}
    facts["ops"] = [
        {"op": case, "pass": stage, **numbers(found.__getattribute__), "bound": found.bound}
        | {"measured_ms": measured_ms(rows, shape, case, stage)}
        for case, passes in ops.items()
        for stage, found in passes.items()
    ]
    facts["step"] = [{"group": x.group, "part": x.name, "pass": x.stage, **numbers(x.total)} for x in parts]
    return json.dumps({**facts, "scaling": [x._asdict() for x in scaling], "assumptions": notes}, indent=1)


if __name__ == "__main__":
    main()
