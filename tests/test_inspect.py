"""What the kernels compile to, on chips that need not be here: nothing spills, and no register is taken unseen."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

MINOR = ".".join(triton.__version__.split(".")[:2])
RECORD = Path(__file__).parent / "recorded" / f"triton-{MINOR}.json"
REMEDY = (
    f"if that is meant, record it under Triton {MINOR}, without TRITON_INTERPRET: "
    f"python -m mae_kernels.inspect --json > tests/recorded/{RECORD.name}"
)

PRODUCTS = {"patch_embed", "weight_gradient", "image_gradient"}

# Bytes that cannot be helped. The ptxas of Triton 3.6 stops at 128 registers in some products for sm_100.
SPILLS = {"3.6": {"patch_embed fp32 of fp32 to fp32 sm_100": 24, "patch_embed ViT-H/14 bf16 of bf16 to bf16 sm_100": 8}}

# Copies whose widest access is less than 128 bits, each with its reason: {"kernel variant chip": "..."}.
NARROW: dict[str, str] = {}


@pytest.fixture(scope="module")
def inspector(tmp_path_factory):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    environment.pop("TRITON_INTERPRET", None)

    def run(*options: str, command: tuple[str, ...] = ("-m", "mae_kernels.inspect"), **more: str):
        command = [sys.executable, *command, *options]
        return subprocess.run(command, env=environment | more, capture_output=True, text=True, check=False)

    return run


@pytest.fixture(scope="module")
def report(inspector) -> dict:
    result = inspector("--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def rows(report) -> dict[str, dict]:
    return named(report)


def named(report: dict) -> dict[str, dict]:
    return {f"{row['kernel']} {row['variant']} {row['chip']}": row for row in report["rows"]}


def test_every_kernel_is_compiled_for_every_chip(report, rows):
    specimens = {(row["kernel"], row["variant"]) for row in rows.values()}
    assert report["triton"] == triton.__version__
    assert {row["chip"] for row in rows.values()} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert len(report["rows"]) == len(rows) == 4 * len(specimens)
    sources = (Path(__file__).parent.parent / "mae_kernels" / "kernels").glob("*.py")
    defined = {name for f in sources for name in re.findall(r"^def (\w+)_kernel\(", f.read_text("utf-8"), re.M)}
    assert {kernel for kernel, _ in specimens} == defined


def test_no_kernel_spills(rows):
    spills = {name: row["spills"] for name, row in rows.items() if row["spills"]}
    assert spills == SPILLS.get(MINOR, {})


def test_products_run_on_tensor_cores(rows):
    products = {name: row for name, row in rows.items() if row["kernel"] in PRODUCTS}
    assert {row["kernel"] for row in products.values()} == PRODUCTS
    assert [name for name, row in products.items() if row["mma"] == 0] == []


def test_copies_access_memory_in_128_bits(rows):
    copies = {
        name: (row["load_bits"], row["store_bits"])
        for name, row in rows.items()
        if row["kernel"].startswith(("gather", "scatter", "masked_mse")) and "pqc" not in row["variant"]
    }
    assert {name: bits for name, bits in copies.items() if min(bits) < 128 and name not in NARROW} == {}
    assert [name for name in NARROW if name not in copies or min(copies[name]) >= 128] == []


def test_rows_and_registers_are_those_recorded(rows):
    assert RECORD.is_file(), f"no record for Triton {triton.__version__}; {REMEDY}"
    recorded = named(json.loads(RECORD.read_text("utf-8")))
    assert sorted(rows) == sorted(recorded), REMEDY
    registers = {name: (recorded[name]["registers"], row["registers"]) for name, row in rows.items()}
    changed = {name: f"{was} -> {now}" for name, (was, now) in registers.items() if abs(now - was) > 8}
    assert changed == {}, REMEDY


def test_table(inspector, rows):
    result = inspector(
        "--kernel", "gather_tokens", "--kernel", "masking_of_order", "--chip", "sm_90", "--chip", "gfx942"
    )
    header, *lines = result.stdout.partition("\n\n")[0].splitlines()
    assert header.split()[:3] == ["kernel", "variant", "chip"]
    asked = [
        row
        for row in rows.values()
        if row["kernel"] in ("gather_tokens", "masking_of_order") and row["chip"] in ("sm_90", "gfx942")
    ]
    assert len(lines) == len(asked) == 6
    for line, row in zip(lines, asked, strict=True):
        assert line.startswith(row["kernel"])
        for value in (row["variant"], row["chip"], row["registers"], f"{row['bytes'] / 1e6:.1f}"):
            assert f" {value} " in line
    assert f"Triton {triton.__version__}" in result.stdout


def test_floors(inspector, rows):
    # 2 N K D values of 2 bytes and N K ids of 8; 2 N K E D operations.
    moved, flops = 2 * 256 * 49 * 768 * 2 + 256 * 49 * 8, 2 * 256 * 49 * 768 * 768
    copy, product = rows["gather_tokens bf16 sm_90"], rows["patch_embed bf16 of bf16 to bf16 sm_90"]
    assert (copy["bytes"], copy["flops"], product["flops"]) == (moved, 0, flops)
    assert copy["floor_us"] == 8.05  # 38.64 MB at 4800 GB/s
    assert product["floor_us"] == 14.96  # 14.80 GFLOP at 989 TFLOP/s

    options = ("--json", "--chip", "sm_90", "--kernel", "gather_tokens", "--kernel", "patch_embed")
    slower = named(json.loads(inspector(*options, "--bandwidth", "1000", "--tflops", "100").stdout))
    assert slower["gather_tokens bf16 sm_90"]["floor_us"] == 38.64
    assert slower["patch_embed bf16 of bf16 to bf16 sm_90"]["floor_us"] == 147.98


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ({"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET is set, and interpreted kernels are not compiled; unset it"),
        (
            {
                "command": (
                    "-c",
                    "import sys; sys.modules['triton'] = None; from mae_kernels import inspect; inspect.main()",
                )
            },
            "the package triton is not installed",
        ),
    ],
    ids=["interpreted", "without triton"],
)
def test_refusals(inspector, how, sentence):
    result = inspector(**how)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"mae_kernels.inspect: {sentence}\n"


def test_unknown_names_are_refused(inspector):
    result = inspector("--kernel", "gather")
    assert result.returncode == 2
    assert "--kernel must be one of masking, " in result.stderr
    assert result.stderr.endswith("got 'gather'\n")
