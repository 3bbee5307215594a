"""What the kernels compile to, on chips that need not be here: nothing spills and no register is taken unseen."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
from benchmarks.inspect import CHIPS  # noqa: E402

pytestmark = pytest.mark.slow  # all that test_launches.py compiles in a moment for one chip, for each with its limits

ROOT = Path(__file__).parent.parent
MINOR = triton.__version__.rpartition(".")[0]
RECORD = ROOT / "tests" / "recorded" / f"triton-{MINOR}.json"
REMEDY = (
    f"if that is meant, record it under Triton {MINOR}, without TRITON_INTERPRET: "
    f"python -m benchmarks.inspect --json > tests/recorded/{RECORD.name}"
)

# Bytes of stack of a thread, by Triton: losses that ptxas keeps at 128 registers.
SPILLS = {"masked_mse of masked_mse uint8 bfloat16 channels_first, sm_100": {"3.8": 8, "3.9": 8}}

# Copies whose widest access is less than 128 bits, by kernel and case, each with its reason.
NARROW = {
    "gather_patches of patch_embed bfloat16 ViT-H/14": "rows of 14 pixels",
    "gather_patches of patch_embed uint8": "8 pixels a thread, each a byte",
    "gather_patches of patch_embed uint8 bfloat16": "8 pixels a thread, each a byte",
    "masked_mse of masked_mse full": "two values a thread, so that pixels of interleaved channels lie close together",
    "masked_mse of masked_mse masked-only": "the same",
    "masked_mse of masked_mse uint8 bfloat16": "the same, and the forward writes sums alone",
    "masked_mse of masked_mse uint8 bfloat16 backward": "the same",
    "masked_mse of masked_mse uint8 bfloat16 channels_first": "the forward writes sums alone",
}


@pytest.fixture(scope="module")
def inspector(tmp_path_factory):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    environment.pop("TRITON_INTERPRET", None)

    def run(*options: str, **more: str):
        command = [sys.executable, "-m", "benchmarks.inspect", *options]
        return subprocess.run(command, cwd=ROOT, env=environment | more, capture_output=True, text=True, check=False)

    return run


@pytest.fixture(scope="module")
def rows(inspector, tmp_path_factory) -> dict[str, dict]:
    """Each launch of sm_90 is compiled here. For other chips only new ones are: the same one compiles to the same."""
    known = tmp_path_factory.mktemp("known") / "rows.json"
    recorded = json.loads(RECORD.read_text("utf-8"))["rows"] if RECORD.is_file() else []
    known.write_text(json.dumps({"rows": [row for row in recorded if row["chip"] != "sm_90"]}), "utf-8")
    result = inspector("--json", "--known", str(known))
    assert result.returncode == 0, result.stderr
    return named(result.stdout)


def named(report: str) -> dict[str, dict]:
    listed = json.loads(report)["rows"]
    rows = {f"{row['kernel']} of {row['case']}, {row['chip']}": row for row in listed}
    assert len(rows) == len(listed)
    return rows


def test_every_kernel_is_compiled_for_every_chip(rows):
    launches = {(row["kernel"], row["case"]) for row in rows.values()}
    assert {row["chip"] for row in rows.values()} == {*CHIPS}
    assert len(rows) == len(CHIPS) * len(launches)
    sources = (ROOT / "mae_kernels" / "kernels").glob("*.py")
    defined = {name for f in sources for name in re.findall(r"^def (\w+)_kernel\(", f.read_text("utf-8"), re.M)}
    assert {kernel for kernel, _ in launches} == defined


def test_no_other_kernel_spills(rows):
    known = {name: spills[MINOR] for name, spills in SPILLS.items() if MINOR in spills}
    assert {name: row["spills"] for name, row in rows.items() if row["spills"]} == known


def test_copies_access_memory_in_128_bits(rows):
    narrow = {
        name.partition(",")[0]
        for name, row in rows.items()
        if row["kernel"].startswith(("add_positions", "gather", "masked_mse", "scatter"))
        if min(row["load_bits"], row["store_bits"]) < 128
    }
    assert narrow == {*NARROW}


def test_rows_and_registers_are_those_recorded(rows):
    assert RECORD.is_file(), f"no record for Triton {triton.__version__}; {REMEDY}"
    recorded = named(RECORD.read_text("utf-8"))
    assert sorted(rows) == sorted(recorded), REMEDY
    registers = {name: (recorded[name]["registers"], row["registers"]) for name, row in rows.items()}
    changed = {name: f"{was} -> {now}" for name, (was, now) in registers.items() if abs(now - was) > 8}
    assert changed == {}, REMEDY


def test_table(inspector, rows):
    kernels, asked_for = ("gather_tokens", "masking_of_order"), ("sm_90", "gfx942")
    result = inspector(*(x for k in kernels for x in ("--kernel", k)), *(x for c in asked_for for x in ("--chip", c)))
    header, *lines = result.stdout.splitlines()
    asked = [row for row in rows.values() if row["kernel"] in kernels and row["chip"] in asked_for]
    assert header.split() == [column for column in asked[0] if column != "key"]
    assert len(lines) == len(asked) == 6
    told = {tuple(str(value) for column, value in row.items() if column != "key") for row in asked}
    assert {tuple(re.split(r"\s{2,}", line)) for line in lines} == told


@pytest.mark.parametrize(
    ("options", "environment", "sentence"),
    [
        ((), {"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET is set, and interpreted kernels are not compiled; unset it"),
        (("--kernel", "gather"), {}, "--kernel must be one of add_positions, "),
    ],
)
def test_refusals(inspector, options, environment, sentence):
    result = inspector(*options, **environment)
    assert result.returncode != 0
    assert result.stdout == ""
    assert sentence in result.stderr
