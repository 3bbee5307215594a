"""The tuner and its table: what is searched, what is dropped, what is believed, and what is written."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
from cases import BF16, F32, U8, ids, loss_inputs, patch_embed_inputs, scatter_inputs, tokens
from conftest import DEVICE

from benchmarks.tune import __main__ as command
from benchmarks.tune import prediction, search, table, timing
from benchmarks.tune.prediction import CHIPS, Demand, Resources
from benchmarks.tune.table import Entry
from mae_kernels import gather_tokens, inspect, kernels, masked_mse, patch_embed, scatter_mask_tokens, use_backend
from mae_kernels.kernels import tuned
from mae_kernels.kernels.tuned import BlockTiles, CropTiles, GemmTiles, LossTiles, RowTiles

ROOT = Path(__file__).parent.parent
H200 = CHIPS["sm_90"]


def compiling(code: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run code in a process that compiles kernels instead of interpreting them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


SEARCHED = """
import json
from dataclasses import astuple
from benchmarks.tune import search
from mae_kernels.kernels import tuned
from mae_kernels.kernels.tuned import GemmTiles

found, keys = {}, []
for specimen in search.specimens():
    key, rule, grid = search.plan(specimen, "sm_90")
    keys.append(key)
    found[f"{specimen.kernel} {specimen.variant}"] = [
        repr(key), astuple(rule), list(map(astuple, search.candidates(specimen, rule))), grid
    ]
by_name = {f"{s.kernel} {s.variant}": s for s in search.specimens()}

def resources(name, tiles):
    found = search.compiled(by_name[name], "sm_90", tiles)
    return found and vars(found)

embed = "patch_embed bf16 of bf16 to bf16"
compiled = {
    "rule": resources(embed, search.plan(by_name[embed], "sm_90")[1]),
    "spills": resources(embed, GemmTiles(128, 256, 4, 16, 4, 3)),
    "shared memory": resources(embed, GemmTiles(128, 128, 8, 16, 8, 5)),
    "tensor cores": resources(embed, GemmTiles(32, 128, 4, 16, 4, 3)),
    "does not compile": resources(embed, GemmTiles(96, 128, 4, 16, 4, 3)),
}
print(json.dumps({"searched": found, "keys": len(set(keys)), "compiled": compiled}))
"""


@pytest.fixture(scope="module")
def searched():
    result = compiling(SEARCHED)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_candidates_surround_the_rule(searched):
    assert searched["keys"] == len(searched["searched"]), "two launches of one class"
    for name, (_, rule, candidates, grid) in searched["searched"].items():
        assert candidates[0] == rule, name
        unique = set(map(tuple, candidates))
        assert len(unique) == len(candidates) > 1, name
        assert all(value & (value - 1) == 0 for tiles in candidates[1:] for value in tiles[:2] if value), name
        assert all(len(tiles) == len(rule) and min(tiles) >= 1 for tiles in candidates), name
        assert all(size >= 1 for size in grid)


def test_every_kernel_with_tiles_is_searched(searched):
    asked = set()
    for path in (ROOT / "mae_kernels" / "kernels").glob("*.py"):
        asked |= set(re.findall(r'tuned\.tiles\(\("(\w+)"|key = \(?\s*"(\w+)"', path.read_text(encoding="utf-8")))
    assert {a or b for a, b in asked} == {name.split()[0] for name in searched["searched"]}


@pytest.mark.parametrize("reason", ["spills", "shared memory", "tensor cores", "does not compile"])
def test_what_cannot_run_well_is_dropped(searched, reason):
    compiled = {name: found and Resources(**found) for name, found in searched["compiled"].items()}
    rule = compiled["rule"]
    assert search.why_not(rule, rule, H200) == ""
    assert search.why_not(compiled[reason], rule, H200) == reason


def test_narrow_accesses_are_dropped():
    wide = Resources(32, 0, 0, "", 128, 128, 100)
    assert search.why_not(replace(wide, load_bits=32), wide, H200) == "narrow accesses"
    assert search.why_not(replace(wide, store_bits=64), wide, H200) == "narrow accesses"


def test_programs_that_a_multiprocessor_holds():
    light = Resources(32, 0, 0, "", 128, 128, 100)
    assert prediction.resident(light, 4, H200) == 16  # 64 warps
    assert prediction.resident(light, 1, H200) == 32  # programs
    assert prediction.resident(replace(light, registers=128), 4, H200) == 4  # 65536 registers
    assert prediction.resident(replace(light, shared=100 * 1024), 4, H200) == 2  # 228 KiB


def test_the_model_prefers_what_is_obviously_better():
    light = Resources(32, 0, 0, "", 128, 128, 100)

    def seconds(demand, resources=light, warps=4, programs=4096):
        return prediction.predicted(demand, resources, warps, programs, H200)

    copy = Demand(2, 1, 100e6)
    # No faster than memory, and not much slower where enough is in flight.
    assert 100e6 / 4.8e12 < seconds(copy) < 1.3 * 100e6 / 4.8e12
    # One program on each multiprocessor has too few bytes in flight.
    assert seconds(copy, replace(light, shared=200 * 1024)) > 1.5 * seconds(copy)
    # A second round of a product for a few programs; more trips; padded products; narrow tiles that reread operands.
    product = Demand(4, 1, 1e6, flops=1e10, steps=12, exposed=3)
    assert seconds(product, programs=133) > 1.3 * seconds(product, programs=132)
    assert seconds(replace(copy, trips=40)) > seconds(copy)
    assert seconds(replace(product, flops=2e10)) > 1.5 * seconds(product)
    assert seconds(replace(product, through_l2=1e9)) > 2 * seconds(product)


def test_the_table_is_asked_before_the_rule(monkeypatch):
    key, mine, rules = ("gather_tokens", "sm_90", 8, 4, 3), RowTiles(2, 16), RowTiles(1, 16)
    monkeypatch.setitem(tuned.TABLE, key, mine)
    assert tuned.tiles(key, lambda d: rules, 8) is mine
    assert tuned.tiles(("gather_tokens", "sm_80", 8, 4, 3), lambda d: rules, 8) is rules
    assert [tuned.size(n) for n in (1, 2, 3, 8191, 8192, 10**9)] == [1, 2, 2, 13, 14, 14]


def test_forced_tiles_are_taken_and_given_back():
    key, rules = ("gather_tokens", "sm_90", 8, 4, 3), RowTiles(1, 16)
    outer, inner = RowTiles(2, 16), RowTiles(4, 16)

    def asked(key=key):
        return tuned.tiles(key, lambda: rules)

    with tuned.forced("gather_tokens", outer):
        with tuned.forced("gather_tokens", inner):
            assert asked() is inner
            assert asked(("masking", "sm_90", 16)) is rules
        assert asked() is outer
    with pytest.raises(KeyError), tuned.forced("gather_tokens", outer):
        raise KeyError
    assert asked() is rules


ODD = {
    "gather_tokens": RowTiles(rows=1, width=32, num_warps=1),
    "gather_tokens_backward": RowTiles(rows=8, width=64, num_warps=2),
    "scatter_mask_tokens": RowTiles(rows=2, width=16, num_warps=8),
    "scatter_mask_tokens_backward": RowTiles(rows=16, width=32, num_warps=1),
    "position_gradient": RowTiles(rows=4, width=16, num_warps=1),
    "masked_mse": LossTiles(patches=4, rows=8, cols=16, turns=2, num_warps=2),
    "masked_mse_backward": BlockTiles(values=64, num_warps=1),
    "patch_embed": GemmTiles(tokens=16, width=16, rows=2, cols=16, num_warps=1, num_stages=4),
    "weight_gradient": GemmTiles(tokens=16, width=16, rows=2, cols=16, num_warps=1, num_stages=4),
    "image_gradient": GemmTiles(tokens=16, width=16, rows=2, cols=16, num_warps=1, num_stages=4),
}


def results(op, inputs: dict, wrt: tuple[str, ...]) -> list[torch.Tensor]:
    leaves = {name: inputs[name].detach().clone().requires_grad_() for name in wrt}
    out = op(**{**inputs, **leaves})
    out.backward(torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape))
    return [out.detach(), *(x.grad for x in leaves.values())]


@pytest.mark.parametrize(
    ("op", "make", "wrt"),
    [
        (gather_tokens, lambda: {"tokens": tokens(3, 7, 40), "ids": ids(3, 7, 3)}, ("tokens",)),
        (scatter_mask_tokens, lambda: scatter_inputs(3, 7, 3, 40, 1, pos=8), ("tokens", "mask_token", "pos_embed")),
        (masked_mse, lambda: loss_inputs(3, (2, 3), (6, 14), 3), ("pred",)),
        (
            patch_embed,
            lambda: patch_embed_inputs(3, (2, 3), (6, 14), 3, 40, k=4, r=1, norm=True),
            ("images", "weight", "bias", "pos_embed", "prefix"),
        ),
    ],
    ids=["gather", "scatter", "loss", "patch_embed"],
)
def test_odd_tiles_compute_the_same(op, make, wrt):
    with torch.device(DEVICE), use_backend("triton"):
        inputs = make()
        expected = results(op, inputs, wrt)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tuned, "_forced", ODD)
            ours = results(op, inputs, wrt)
    for x, y in zip(ours, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_the_committed_table():
    text = Path(tuned.__file__).read_text(encoding="utf-8")
    entries = table.read_table(text)
    assert {entry.key: entry.tiles for entry in entries} == tuned.TABLE
    assert table.rewritten(text, []) == text
    kinds = {
        BlockTiles: {"masking", "masking_of_order", "masked_mse_backward"},
        RowTiles: {
            "gather_tokens", "gather_tokens_backward", "scatter_mask_tokens", "scatter_mask_tokens_backward",
            "position_gradient",
        },
        LossTiles: {"masked_mse"},
        GemmTiles: {"patch_embed", "weight_gradient", "image_gradient"},
        CropTiles: {"random_resized_crop"},
    }  # fmt: skip
    for entry in entries:
        assert entry.key[0] in kinds[type(entry.tiles)]
        assert entry.key[1] in CHIPS
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", entry.date)
        assert entry.source
        assert 0 < entry.time <= entry.rule
        assert entry.floor < entry.time


def test_the_table_has_the_keys_that_launchers_ask_with(searched):
    asked = {key for key, *_ in searched["searched"].values()}
    assert {repr(key) for key in tuned.TABLE if key[1] == "sm_90"} == asked


KEY = ("patch_embed", "sm_90", 768, 3, 16, 16, torch.uint8, True, BF16, F32, 14)
MEASURED = Entry(KEY, GemmTiles(64, 128, 4, 16, 4, 3), "bf16 of uint8", 20.1, 22.0, 15.0, "NVIDIA H200", "2026-11-01")
PREDICTED = replace(MEASURED, tiles=GemmTiles(128, 64, 4, 16, 4, 3), time=18.2, source=table.PREDICTED)
OTHER = Entry(("gather_tokens", "sm_90", 64, 2, 9), RowTiles(8, 64), "bf16", 8.5, 9.0, 8.0, "predicted", "2026-11-02")
EMPTY = "# a head\n\nTABLE: dict[tuple, Tiles] = {}\n"


def test_a_table_is_written_sorted_and_read_back(tmp_path):
    text = table.rewritten(EMPTY, [MEASURED, OTHER])
    assert text == table.rewritten(EMPTY, [OTHER, MEASURED])
    assert text == table.rewritten(text, [MEASURED])
    assert table.read_table(text) == [OTHER, MEASURED]
    assert text.startswith("# a head\n\nTABLE: ")
    assert text.index("gather_tokens") < text.index("patch_embed")
    assert "    # bf16 of uint8: 20.1 µs, rule 22.0, floor 15.0; NVIDIA H200, 2026-11-01\n" in text
    ruff = Path(sys.executable).with_name("ruff")
    if ruff.exists() or shutil.which("ruff"):
        (tmp_path / "tuned.py").write_text(text, encoding="utf-8")
        program = str(ruff) if ruff.exists() else "ruff"
        command = [program, "format", "--check", "--config", str(ROOT / "pyproject.toml"), str(tmp_path)]
        assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_predictions_leave_measured_entries():
    measured = table.rewritten(EMPTY, [MEASURED])
    assert table.rewritten(measured, [PREDICTED]) == measured
    assert table.rewritten(table.rewritten(EMPTY, [PREDICTED]), [MEASURED]) == measured
    newer = replace(PREDICTED, time=17.0)
    assert table.read_table(table.rewritten(table.rewritten(EMPTY, [PREDICTED]), [newer])) == [newer]


class Planted:
    """A clock, and rounds that take planted times with some noise."""

    def __init__(self, *times: float, noise: float = 0.02):
        self.times, self.noise, self.now, self.rounds = times, noise, 0.0, 0

    def clock(self) -> float:
        return self.now

    def one_round(self) -> list[float]:
        self.rounds += 1
        self.now += 0.1
        swing = [((self.rounds * k * 7919) % 101 / 50 - 1) * self.noise for k in range(1, 1 + len(self.times))]
        return [t * (1 + s) for t, s in zip(self.times, swing, strict=True)]

    def fastest(self, seconds: float) -> tuple[int, list[float]]:
        return timing.fastest(self.one_round, seconds, self.clock)


def test_the_fastest_is_taken():
    planted = Planted(10.0, 9.0, 7.0, 8.0)
    best, medians = planted.fastest(100)
    assert best == 2
    assert medians == pytest.approx([10, 9, 7, 8], rel=0.02)
    assert planted.rounds < 50, "a clear lead needs few rounds"


@pytest.mark.parametrize("times", [(10.0, 9.99), (10.0, 10.0, 9.98), (7.0, 9.0), (5.0,)])
def test_the_rule_stays_within_the_noise(times):
    assert Planted(*times).fastest(20)[0] == 0


def test_measuring_ends_with_the_time():
    planted = Planted(10.0, 9.99, 9.98, noise=0.5)
    planted.fastest(3.0)
    assert 3.0 <= planted.now <= 3.2
    best, _ = Planted(10.0, 5.0).fastest(0)  # a single round proves nothing
    assert best == 0


def test_results_that_differ_are_noticed():
    x = torch.linspace(-1, 1, 100)
    assert timing.same((x + 1e-6, x), (x, x))
    assert not timing.same(x + 0.01, x)
    assert not timing.same(torch.full_like(x, torch.nan), x)
    assert timing.same(torch.arange(5), torch.arange(5))
    assert not timing.same(torch.arange(5) + 1, torch.arange(5))
    pixels = torch.arange(5, dtype=torch.uint8)
    assert timing.same(pixels + 1, pixels)
    assert not timing.same(pixels + 2, pixels)


@pytest.fixture
def small_launches(monkeypatch):
    """The inspector's launches, small enough for the interpreter."""
    sizes = {"N": 2, "IMAGE": 64, "L": 16, "K": 4, "M": 12, "d": 64}
    for name, value in sizes.items():
        monkeypatch.setattr(inspect, name, value)
    backward = inspect.patch_embed_backward
    return [
        inspect.masking("masking", 16, 4),
        inspect.gather_tokens(BF16, 64),
        inspect.gather_tokens_backward(BF16, 64),
        inspect.scatter_mask_tokens(F32),
        inspect.scatter_mask_tokens_backward(F32, learned=True),
        inspect.masked_mse(U8, BF16, "pqc", "ids_mask"),
        inspect.masked_mse(F32, F32, "cpq", "mask"),
        inspect.masked_mse_backward(BF16),
        inspect.patch_embed(U8, BF16, F32, width=64),
        *(backward(name, F32, F32, F32, width=64) for name in ("weight_gradient", "image_gradient")),
        backward("position_gradient", U8, BF16, F32, width=64),
        *map(inspect.random_resized_crop, ("packed", "batch")),
    ]


def assert_inside(images, starts, sizes, boxes):
    top, left, height, width = boxes.unbind(1)
    rows, cols = images.shape[2:] if sizes is None else sizes.unbind(1)
    assert ((top >= 0) & (left >= 0) & (top + height <= rows) & (left + width <= cols)).all()
    if starts is not None:
        assert (starts + sizes.prod(1) <= images.shape[1]).all()


def test_launches_get_arguments_that_they_can_run_on(small_launches):
    device = torch.device(DEVICE)
    for specimen in small_launches:
        args = timing.filled(specimen, device)
        for x, y in zip(args, specimen.args, strict=True):
            if isinstance(y, torch.Tensor):
                assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride()), specimen
        if specimen.op == "random_resized_crop":
            assert_inside(*args[:4])
            continue
        out = getattr(kernels, specimen.op)(*args)
        if specimen.kernel not in ODD:
            continue
        assert timing.same(timing.run(specimen, ODD[specimen.kernel], args), out), specimen
        floats = [x for x in out if x.is_floating_point()] if isinstance(out, tuple) else [out]
        assert all(x.isfinite().all() for x in floats), specimen


def test_a_class_is_measured(small_launches, monkeypatch):
    specimen, rule = small_launches[1], RowTiles(4, 64, 4)
    wrong, right, unlikely = RowTiles(2, 64, 1), RowTiles(8, 64, 1), RowTiles(16, 64, 1)
    ran = []

    def run(specimen, tiles, args):
        ran.append(tiles)
        return kernels.gather_tokens(*args) + (tiles == wrong)

    def seconds(*calls):
        for call in calls:
            call()
        return [{rule: 3.0, right: 2.0, unlikely: 1.0}[tiles] for tiles in ran[-len(calls) :]]

    monkeypatch.setattr(timing, "run", run)
    monkeypatch.setattr(timing.measure, "seconds", seconds)
    key = ("gather_tokens", "sm_90", 64, 2, 3)
    survivors = [(rule, 1.0), (wrong, 0.5), (right, 0.6), *[(replace(rule, rows=32 << i), 0.7) for i in range(4)]]
    survivors = [*survivors[:3], (unlikely, 2.0)]
    monkeypatch.setattr(timing, "MEASURED", 2)
    case = search.Search(specimen, key, survivors)
    assert timing.by_clock(case, 60) == (right, 2.0, 3.0), "wrong results are not timed"
    assert ran.count(wrong) == 1
    monkeypatch.setitem(tuned.TABLE, key, unlikely)
    assert timing.by_clock(case, 60) == (unlikely, 1.0, 3.0), "the table's tiles compete"


def test_the_model_needs_a_lead():
    rule, other = RowTiles(1, 16), RowTiles(2, 16)
    for seconds, taken in ((0.96, rule), (0.94, other)):
        case = search.Search(None, (), [(rule, 1.0), (other, seconds)])
        tiles, predicted, rules = search.by_model(case)
        assert (tiles, rules) == (taken, 1.0)
        assert predicted == (1.0 if taken is rule else seconds)


MAIN = "import sys; from benchmarks.tune.__main__ import main; main(sys.argv[1:])"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_nothing_is_measured(tmp_path):
    out = tmp_path / "tuned.py"
    result = compiling(MAIN, "--out", str(out))
    assert (result.returncode, result.stdout, out.exists()) == (1, "", False)
    assert result.stderr == "PyTorch sees no GPU on this machine: nothing was tuned; --predict asks the model instead\n"


def test_interpreted_kernels_are_not_tuned(capsys):
    if not triton.knobs.runtime.interpret:
        pytest.skip("kernels are compiled here")
    with pytest.raises(SystemExit) as stop:
        command.main(["--predict"])
    assert stop.value.code == 1
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


def test_a_prediction(tmp_path):
    out, rows = tmp_path / "tuned.py", tmp_path / "rows.json"
    options = ("--predict", "--chip", "sm_80", "--kernel", "masking_of_order", "--workers", "1")
    result = compiling(MAIN, *options, "--out", str(out), "--json", str(rows))
    assert result.returncode == 0, result.stderr
    text = out.read_text(encoding="utf-8")
    new = [entry for entry in table.read_table(text) if entry.key[:2] == ("masking_of_order", "sm_80")]
    assert [(entry.what, entry.source) for entry in new] == [("fp32 L=6272", "predicted")]
    committed = Path(tuned.__file__).read_text(encoding="utf-8")
    assert text.partition("TABLE: ")[0] == committed.partition("TABLE: ")[0]
    assert len(table.read_table(text)) == len(tuned.TABLE) + len(new) - sum(e.key in tuned.TABLE for e in new)
    found = json.loads(rows.read_text(encoding="utf-8"))
    assert found["kind"] == "prediction"
    assert [(row["kernel"], row["source"], row["chip"]) for row in found["rows"]] == [
        ("masking_of_order", "predicted", "sm_80")
    ]
    for entry, row in zip(new, found["rows"], strict=True):
        assert row["us"] == pytest.approx(entry.time, abs=0.06)
        assert f"{entry.time:.1f}" in result.stdout
