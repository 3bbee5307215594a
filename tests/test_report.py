"""The report says what the result files say, and README claims nothing that they do not."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from benchmarks.report import __main__ as report
from benchmarks.report.aims import AIMS
from benchmarks.report.pages import pictures
from benchmarks.report.plots import digest_of
from benchmarks.report.result import SHOWN, newest, results
from benchmarks.work import CASES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BY_HAND = " ".join(
    re.sub(r"<!-- numbers of (\w+): begin -->.*?<!-- numbers of \1: end -->", "", README, flags=re.S).split()
)

NUMBER_WORDS = "a|an|one|two|three|four|five|six|seven|eight|nine|ten|some"
UNITS = r"[mµun]?s|seconds?|minutes?|hours?|[TGMk]?B/s|[TG]FLOP/s|[kMG]i?B|images/s|points?"
DURATION = rf"\b(?:{NUMBER_WORDS}) (?:seconds|minutes?|hours?)\b"
FIGURE = re.compile(rf"\d[\d.,]*(?: ?%| ?x\b| times\b| ?(?:{UNITS})\b)|{DURATION}|\bhalf the memory")
ALLOWED = {
    "hide 75 % of an image's patches": "the mask ratio of He et al.",
    "He et al. report 84.8 % instead of 84.9 %": "quoted from its table 1",
    "at 3.7x instead of 2.8x the speed": "quoted from its table 2",
    "65.5 % instead of 73.5 % by linear probe": "quoted from its table 1",
    "151 kB each instead of 602": "3 x 224 x 224 bytes, and four times that",
    "in about half the memory": "held against the newest result file below",
    "about three minutes on two cores": "how long to wait for a command",
    "in about four minutes": "how long to wait for a command",
    "compiling takes a minute": "how long to wait for a command",
    "all four chips, a minute": "how long to wait for a command",
}


def test_readme_and_pages_are_in_step_with_the_result_files(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().out


def test_a_claim_without_a_result_file_fails():
    text = BY_HAND
    for phrase in ALLOWED:
        assert text.count(phrase) == 1, phrase
        text = text.replace(phrase, "")
    found = [text[max(0, m.start() - 40) : m.end() + 20] for m in FIGURE.finditer(text)]
    assert not found, f"measured figures belong into generated blocks, or into ALLOWED with a reason: {found}"


@pytest.mark.parametrize(
    "claim",
    ["2.3x faster", "at 68 % of the rate", "25.0 MiB", "1.5 times as much", "12 µs", "35 images/s", "8.6 points",
     "760 TFLOP/s", "4.1 TB/s", "in two minutes", "1,200 ms", "half the memory"],
)  # fmt: skip
def test_figures_are_seen(claim):
    assert FIGURE.search(claim)


def test_the_claims_in_words_hold_in_the_newest_result_files():
    found = results(ROOT)
    steps = {(row["shape"], row["dtype"], row["contender"][1]): row for row in newest(found, "cpu", "steps").steps}
    shapes = {shape for shape, _, _ in steps}
    for shape in shapes:  # "in about half the memory"
        published, ours = steps[shape, "float32", "a"], steps[shape, "float32", "d"]
        for name in ("saved_bytes_per_image", "peak_mib"):
            assert 0.4 <= ours[name] / published[name] <= 0.6, (shape, name)
    for (shape, dtype, letter), row in steps.items():  # "on a CPU compiling gains little"
        if letter == "e":
            assert row["images_per_s"] <= 1.25 * steps[shape, dtype, "d"]["images_per_s"], (shape, dtype)
    assert ("No kernel has been run on a GPU yet" in BY_HAND) == (newest(found, "gpu") is None)
    assert ("None of this was measured on a GPU yet" in BY_HAND) == (newest(found, "gpu", "steps") is None)


def test_what_the_tables_show_is_measured():
    assert {op for shown in SHOWN.values() for op in shown} <= CASES.keys()
    assert all(any(case.split()[0] == op for case in SHOWN["gpu"]) for op in AIMS)


@pytest.fixture
def root(tmp_path):
    """A project whose numbers have not been written."""
    blocks = "".join(f"<!-- numbers of {n}: begin -->\n<!-- numbers of {n}: end -->\n\n" for n in report.BLOCKS)
    (tmp_path / "README.md").write_text(f"# Title\n\n{blocks}The end.\n", encoding="utf-8")
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "NOTES.md").touch()
    return tmp_path


def op_row(op, median, *, backend="eager", stage="forward", shape="ViT-B/16 N=32", spread=0.02, **more):
    row = {
        "shape": shape, "op": op, "pass": stage, "backend": backend, "dtype": "float32", "rounds": 20,
        "median_ms": median, "p20_ms": median * (1 - spread), "p80_ms": median * (1 + spread),
        "logical_bytes": 4_000_000, "flops": 40_000_000, "images_per_s": 1.0, "gb_per_s": 1.0, "peak_mib": 2.0,
    }  # fmt: skip
    if backend != "reference":
        row |= {"reference_ms": 4 * median, "speedup": 4.0, "reference_peak_mib": 10.0}
    return row | more


def step_row(letter, name, images_per_s, **more):
    row = {
        "shape": "ViT-B/16 N=16", "op": "training step", "contender": f"({letter}) {name}", "dtype": "float32",
        "rounds": 5, "median_ms": 16e3 / images_per_s, "p20_ms": 15e3 / images_per_s, "p80_ms": 17e3 / images_per_s,
        "images_per_s": images_per_s, "mfu": 0.61, "peak_mib": 2048.0, "saved_bytes_per_image": 9e7, "launches": 77,
    }  # fmt: skip
    return row | more


def save(root, stem, rows, **facts):
    defaults = {
        "kind": "cpu", "command": "pytest benchmarks/", "commit": "abc1234", "date": "2026-01-02",
        "device": "Synthetic(R) Machine", "threads": 2, "load": 0.1, "torch": "2.13.0", "triton": "3.7.1", "rows": rows,
    }  # fmt: skip
    path = root / "benchmarks" / "results" / f"{stem}.json"
    path.write_text(json.dumps(defaults | facts), encoding="utf-8")
    return path


def save_gpu(root, rows, **facts):
    ceilings = {"copy_gb_per_s": 4000.0, "tflops": {"bfloat16": 700.0, "float32": 50.0}, "launch_us": 4.0,
                "linear_host_us": [7.0, 40.0]}  # fmt: skip
    defaults = {"kind": "gpu", "device": "SYNTHETIC GPU", "driver": "1.2.3", "ceilings": ceilings}
    return save(root, "synthetic-gpu", rows, **defaults | facts)


def written(root):
    assert report.main([], root) == 0
    assert report.main(["--check"], root) == 0
    return (root / "README.md").read_text(encoding="utf-8")


def words(text):
    return " ".join(text.split())


def test_the_tables_hold_the_numbers_of_the_newest_file(root, capsys):
    save(root, "old", [op_row("gather_tokens", 99.0)], date="2025-12-31")
    rows = [
        op_row("gather_tokens", 48.0, backend="reference"),
        op_row("gather_tokens", 12.0),
        op_row("gather_tokens", 8.0, stage="backward"),
        op_row("gather_tokens", 0.25, stage="forward+backward", speedup=3.456, rounds=500),
        op_row("linear_masked_mse float32", 5.0),
        op_row("linear_masked_mse float32 / two ops", 6.5, stage="forward+backward", peak_mib=25.0),
        step_row("a", "published pipeline as written", 2.5, saved_bytes_per_image=18e7),
        step_row("d", "mae, eager", 5.25),
        {"op": "gather_tokens", "pass": "forward", "backend": "eager", "host_us": 14.0, "operator_host_us": 6.0},
    ]
    save(root, "new", rows)
    seeds = [{"seed": 0, "raw pixels": 80.0, "untrained encoder": 70.0, "pre-trained encoder": 81.0},
             {"seed": 1, "raw pixels": 80.0, "untrained encoder": 73.0, "pre-trained encoder": 83.0}]  # fmt: skip
    save(root, "demo", seeds, kind="demo", command="python -m mae demo")
    text = written(root)
    assert text.startswith("# Title\n")
    assert text.endswith("The end.\n")
    for line in (
        "| gather_tokens | forward | 48.0 ms | 12.0 ms | 4.00x | 10.0 -> 2.00 MiB |",
        "| gather_tokens | forward+backward | 1.00 ms | 0.250 ms | 3.46x | 10.0 -> 2.00 MiB |",
        "| published pipeline as written | 2.50 | 180 MB | 2.00 GiB | 77 |",
        "| mae, eager | 5.25 | 90 MB | 2.00 GiB | 77 |",
        "| raw pixels | 80.0 % |",
        "| untrained encoder | 70.0, 73.0 % |",
    ):
        assert f"\n{line}\n" in text
    for sentence in (
        "ViT-B/16, 32 images, 75 % masked",
        "Synthetic Machine, 2 threads, load 0.1 before the run, torch 2.13.0, 2026-01-02, commit abc1234, `pytest",
        "benchmarks/`; medians of 20 to 500 interleaved rounds; peak memory",
        "[Raw file](benchmarks/results/new.json)",
        "other runs: [old](docs/results/old.md)",
        "it takes 6.50 ms instead of 26.0 ms and 25.0 instead of 10.0 MiB in float32.",
        "runs at 61 % in float32",
        "keeps 2.0 times as much for the backward",
        "Pre-training adds 10.5 points on average;",
        "the untrained encoder varies by 3.0 points and the pre-trained one by 2.0.",
        "On a GPU: not measured since the first commit.",
    ):
        assert sentence in words(text)
    assert "99.0" not in text
    assert "| backward |" not in text
    page = (root / "docs" / "results" / "new.md").read_text(encoding="utf-8")
    assert "| backward |" in page
    assert "## What a call costs the host" in page
    links = re.findall(r"\]\((.*?)\)", text)
    links_of_page = [f"docs/results/{link}" for link in re.findall(r"\]\((.*?)\)", page)]
    assert all((root / link).is_file() for link in links + links_of_page)


def test_a_readme_without_a_block_is_told_in_one_sentence(root):
    path = root / "README.md"
    path.write_text(path.read_text(encoding="utf-8").replace("<!-- numbers of step: end -->\n", ""), encoding="utf-8")
    for arguments in ([], ["--check"]):
        with pytest.raises(SystemExit) as stop:
            report.main(arguments, root)
        assert stop.value.code == (
            "README.md needs the lines <!-- numbers of step: begin --> and <!-- numbers of step: end -->, once each "
            "and in this order"
        )


def test_check_names_what_is_out_of_step(root, capsys):
    path = save(root, "cpu", [op_row("gather_tokens", 12.0)])
    written(root)
    capsys.readouterr()
    save(root, "cpu", [op_row("gather_tokens", 13.0)])
    assert report.main(["--check"], root) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"out of step: {name}" for name in (
        "README.md, numbers of ops", "docs/results/cpu.md")]  # fmt: skip
    written(root)
    capsys.readouterr()
    path.unlink()
    assert report.main(["--check"], root) == 1
    assert "docs/results/cpu.md, which has no result file" in capsys.readouterr().out
    written(root)
    assert not list((root / "docs" / "results").iterdir())


def test_times_of_the_interpreter_are_no_speeds(root):
    rows = [op_row("gather_tokens", 123.0, backend="triton"), op_row("gather_tokens", 456.0)]
    path = save(root, "interpreted", [*rows, step_row("d", "mae, eager", 78.9)], kind="interpreter")
    text = written(root)
    assert not re.search("123|456|78.9|interpreted", text)
    assert not (root / "docs").exists()
    with pytest.raises(SystemExit, match="interpreted holds no speeds of ops or steps"):
        report.main(["--compare", str(path), str(path), "--anyway"], root)


def test_the_block_of_a_gpu(root):
    at = {"backend": "triton", "shape": "ViT-B/16 N=256"}
    rows = [
        op_row("gather_tokens", 0.02, **at, compiled_ms=0.04, floor_ms=0.019, of_floor=0.95, reference_ms=0.2,
               speedup=10.0, flops=0),
        op_row("masked_mse masked-only", 0.5, **at, compiled_ms=0.75, floor_ms=0.3, of_floor=0.6, reference_ms=6.0,
               speedup=12.0),
        op_row("scatter_mask_tokens", 0.5, **at, of_floor=0.97, speedup=9.0),
        op_row("patch_embed float32", 0.5, **at, of_floor=0.9, speedup=6.0, compiled_ms=1.6),
        op_row("random_masking", 0.0135, backend="triton", shape="ViT-B/16 N=1024", compiled_ms=0.1, speedup=6.5),
        op_row("gather_tokens", 7.77, shape="ViT-B/16 N=256"),  # the eager back-end there
        step_row("d", "mae, eager", 5000.0),
    ]  # fmt: skip
    checks = [{"step": "memcheck", "passed": True}, {"step": "racecheck", "passed": False, "last_line": "1 hazard"}]
    save_gpu(root, rows, steps=checks)
    text = written(root)
    block = text[text.index("<!-- numbers of gpu: begin") : text.index("<!-- numbers of gpu: end")]
    for line in (
        "| gather_tokens | forward | 0.200 ms | 40.0 µs | 20.0 µs | 10.0x | 2.00x | 95 % | 10.0 -> 2.00 MiB |",
        "| scatter_mask_tokens | forward | 2.00 ms | - | 0.500 ms | 9.00x | - | 97 % | 10.0 -> 2.00 MiB |",
        "| masked_mse masked-only | forward | ViT-B/16 N=256 | >= 85 % of the floor; >= 2x it compiled | 60.0 %; 1.50x |",  # noqa: E501
        "| scatter_mask_tokens | forward | ViT-B/16 N=256 | >= 1.5x it compiled | not measured |",
        "| random_masking | forward | ViT-B/16 N=1024 | <= 12 µs | 13.5 µs |",
        "| mae, eager | 5000 | 90 MB | 2.00 GiB | 77 |",
        "![the ops under the roofs of the GPU](docs/results/synthetic-gpu-roofline.svg)",
    ):
        assert f"\n{line}\n" in block
    assert "SYNTHETIC GPU, driver 1.2.3, torch 2.13.0, triton 3.7.1, 2026-01-02, commit abc1234" in words(block)
    assert "a large copy 4000 GB/s, a large product in bfloat16 700 TFLOP/s" in words(block)
    assert "Of 5 rows with an aim, set for an H200, 2 reach it" in words(block)
    assert "not measured since" not in block.lower()
    assert "\n**Failed in the same run:** racecheck.\n" in block
    assert "7.77" not in block
    for name in ("speedups", "roofline"):
        svg = (root / "docs" / "results" / f"synthetic-gpu-{name}.svg").read_text(encoding="utf-8")
        assert "SYNTHETIC GPU" in svg


def test_a_gpu_file_older_than_the_kernels_says_so(root):
    def git(*arguments):
        who = ("-c", "user.name=Test", "-c", "user.email=test@example.com", "-c", "commit.gpgsign=false")
        done = subprocess.run(["git", *who, *arguments], cwd=root, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    def commit():
        git("add", "mae_kernels")
        git("commit", "--quiet", "--message", "kernels")
        return git("rev-parse", "--short", "HEAD")

    kernel = root / "mae_kernels" / "kernels" / "one.py"
    kernel.parent.mkdir(parents=True)
    kernel.write_text("1\n", encoding="utf-8")
    git("init", "--quiet")
    measured = commit()
    save_gpu(root, [op_row("gather_tokens", 0.02, backend="triton")], commit=measured)
    assert report.STALE not in written(root)
    kernel.write_text("2\n", encoding="utf-8")
    last = commit()
    assert report.main(["--check"], root) == 0  # a commit cannot write its own name
    sentence = f"**Not measured since commit {measured}**: the kernels have changed since, last in {last}."
    assert f"\n{sentence}\n" in written(root)
    save_gpu(root, [op_row("gather_tokens", 0.02, backend="triton")], commit="0000000")
    assert report.STALE not in written(root)  # git does not know


def test_pictures_are_drawn_the_same_twice(root):
    save_gpu(root, [op_row("patch_embed float32", 0.5, backend="triton", compiled_ms=0.7)])
    (result,) = results(root)
    drawn = pictures(result)
    assert list(drawn) == ["speedups", "roofline"]
    for picture in drawn.values():
        svg = picture.svg()
        assert svg == picture.svg()
        assert digest_of(svg) == picture.digest


def compared(root, old, new, *options, **facts):
    paths = [save(root, "old", old), save(root, "new", new, **facts)]
    return report.main(["--compare", *map(str, paths), *options], root)


def test_compare_finds_what_got_slower_and_leaves_noise_alone(root, capsys):
    old = [
        op_row("gather_tokens", 10.0),
        op_row("masked_mse full", 10.0, spread=0.2),
        op_row("random_masking", 10.0, spread=0.001),
        op_row("patch_embed uint8", 10.0),
        op_row("patch_embed float32", 10.0, backend="reference"),
        op_row("scatter_mask_tokens", 10.0),
        step_row("d", "mae, eager", 5.0),
    ]
    new = [
        op_row("gather_tokens", 11.0),  # planted
        op_row("masked_mse full", 12.0, spread=0.2),  # within the spread of both
        op_row("random_masking", 10.2, spread=0.001),  # outside of it, but small
        op_row("patch_embed uint8", 5.0),
        op_row("patch_embed float32", 20.0, backend="reference"),
        step_row("d", "mae, eager", 5.0),
        step_row("e", "mae, compiled", 5.0),
    ]
    assert compared(root, old, new) == 1
    told = capsys.readouterr().out
    assert told.splitlines()[0] == "6 rows in both, 2 slower, 1 faster, the others within the noise"
    assert "| ViT-B/16 N=32, gather_tokens, forward, eager, float32 | 10.0 ms | 11.0 ms | +10 %, slower |" in told
    assert "| ViT-B/16 N=32, patch_embed uint8, forward, eager, float32 | 10.0 ms | 5.00 ms | -50 %, faster |" in told
    assert "1 of the slower rows are of the published pipeline" in told
    assert "only in old: ViT-B/16 N=32, scatter_mask_tokens, forward, eager, float32" in told
    assert "only in new: ViT-B/16 N=16, training step, (e) mae, compiled, float32" in told
    assert "masked_mse full" not in told
    assert "random_masking" not in told
    assert compared(root, old, old) == 0


def test_compare_refuses_what_cannot_be_compared(root, capsys):
    rows = [op_row("gather_tokens", 10.0)]
    slow = [op_row("gather_tokens", 20.0)]
    for facts, sentence in (
        ({"device": "Other"}, "device is 'Synthetic(R) Machine' in old and 'Other' in new"),
        ({"kind": "gpu"}, "kind is 'cpu' in old and 'gpu' in new"),
        ({"threads": 8}, "threads is 2 in old and 8 in new"),
    ):
        with pytest.raises(SystemExit) as stop:
            compared(root, rows, slow, **facts)
        assert stop.value.code == (f"{sentence}: the code is not all that differs; --anyway compares them all the same")
        assert compared(root, rows, slow, "--anyway", **facts) == 1
    assert "+100 %" in capsys.readouterr().out
