"""The report says what the result files say, and README and docs claim nothing that they do not."""

import re
import subprocess
from pathlib import Path

import pytest

from benchmarks import record, report, result
from benchmarks.work import CASES

ROOT = Path(__file__).parent.parent
PAGES = (path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))))
ALL = " ".join(" ".join(PAGES).split())
BY_HAND = re.sub(r"<!-- numbers of (\w+): begin -->.*?<!-- numbers of \1: end -->", "", ALL)

DURATION = r"\b(?:a|an|one|two|three|four|five|six|seven|eight|nine|ten|some) (?:seconds|minutes?|hours?)\b"
UNITS = r"[mµun]?s|seconds?|minutes?|hours?|[TGMk]?B/s|[TG]FLOP/s|[kMG]i?B|images/s|points?"
FIGURE = re.compile(rf"\d[\d.,]*(?: ?%|x\b| times\b| ?(?:{UNITS})\b)|{DURATION}|\bhalf the memory")
FIGURES = ("2.3x faster", "at 68 % of the rate", "25.0 MiB", "1.5 times as much", "12 µs", "35 images/s", "8.6 points",
           "760 TFLOP/s", "4.1 TB/s", "in two minutes", "1,200 ms", "half the memory")  # fmt: skip
# Quoted from He et al. or counted in bytes; held against the newest result file below; how long to wait for a command;
# what a caption says of its picture; a setting of the code.
ALLOWED = (
    "| 8 | 84.9 % | 73.5 % | 2.8x | | 1 | 84.8 % | 65.5 % | 3.7x |", "at most 1.5 times as much",
    "151 kB each instead of 602", "in about half the memory", "in about three minutes on two cores",
    "about five minutes on two cores", "in about four minutes", "compiling takes a minute", "fit into fifteen minutes",
    "Training, for a minute or a month", "two minutes before the end", "30 seconds after a signal", "1 GiB of memory",
    "`pack` have 4 MB", "about half a minute", "75 % hidden", "8 bands and 8 times", "in a few minutes on one core",
    "in 40 CPU-minutes",
)  # fmt: skip


def test_readme_and_pages_are_in_step_with_the_result_files(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().out
    assert {op for shown in result.SHOWN.values() for op in shown} <= CASES.keys()


def test_a_claim_without_a_result_file_fails():
    assert all(map(FIGURE.search, FIGURES))
    text = BY_HAND
    for phrase in ALLOWED:
        assert phrase in text, phrase
        text = text.replace(phrase, "")
    found = [text[max(0, m.start() - 40) : m.end() + 20] for m in FIGURE.finditer(text)]
    assert not found, f"measured figures belong into generated blocks, or into ALLOWED with a reason: {found}"


def test_the_claims_in_words_hold_in_the_newest_result_files():
    found = report.results(ROOT)
    steps = {(x["shape"], x["dtype"], x["contender"][1]): x for x in report.newest(found, "cpu", "compared").compared}
    for (shape, dtype, letter), row in steps.items():
        ours = steps[shape, dtype, "d"]
        for name in ("saved_bytes_per_image", "peak_mib"):  # "in about half the memory"
            assert (letter, dtype) != ("a", "float32") or 0.4 <= ours[name] / row[name] <= 0.6, (shape, name)
        # "on a CPU compiling gains little"
        assert letter != "e" or row["images_per_s"] <= 1.25 * ours["images_per_s"], (shape, dtype)
    assert ("No kernel has been run on a GPU yet" in BY_HAND) == (report.newest(found, "gpu") is None)
    assert ("None of this was measured on a GPU yet" in BY_HAND) == (report.newest(found, "gpu", "steps") is None)


@pytest.fixture
def root(tmp_path):
    """A project whose numbers have not been written."""
    edges = "<!-- numbers of {0}: begin -->\n<!-- numbers of {0}: end -->\n\n"
    (tmp_path / "docs").mkdir()
    for page, blocks in report.BLOCKS.items():
        text = "".join(map(edges.format, blocks))
        (tmp_path / page).write_text(f"# Title\n\n{text}The end.\n", encoding="utf-8")
    return tmp_path


def op(name, median, spread=0.02, **more):
    row = {"shape": "ViT-B/16 N=32", "op": name, "pass": "forward", "dtype": "float32", "rounds": 20, "flops": 4e7,
           "median_ms": median, "p20_ms": median * (1 - spread), "p80_ms": median * (1 + spread), "peak_mib": 2.0,
           "logical_bytes": 4e6, "reference_ms": 4 * median, "speedup": 4.0, "reference_peak_mib": 10.0}  # fmt: skip
    return row | ({} if "contender" in more else {"backend": "eager"}) | more


def step(name, images_per_s, **more):
    costs = {"mfu": 0.61, "saved_bytes_per_image": 9e7, "launches": 77, "peak_mib": 2048.0, "shape": "ViT-B/16 N=16"}
    row = op("training step", 1.0, contender=name, images_per_s=images_per_s, **costs | more)
    del row["pass"]
    return row


def save(root, stem, *rows, lines=(), **more):
    facts = {"kind": "cpu", "commit": "abc1234", "date": "2026-01-02", "device": "Synthetic(R) Machine", "threads": 2,
             "load": 0.1, "torch": "2.13.0", "command": "pytest benchmarks/", "triton": "3.7.1"}  # fmt: skip
    path = root / "benchmarks" / "results" / f"{stem}.jsonl"
    path.unlink(missing_ok=True)
    for line in ({"conditions": facts | more}, *lines, *({"row": row} for row in rows)):
        record.append(path, **line)
    return path


def written(root, *wanted):
    assert report.main([], root) == report.main(["--check"], root) == 0
    text = "".join((root / page).read_text(encoding="utf-8") for page in report.BLOCKS)
    assert [part for part in wanted if part not in " ".join(text.split())] == []
    return text


def test_the_tables_hold_the_numbers_of_the_newest_file(root):
    save(root, "old", op("gather_tokens", 99.0), date="2025-12-31")
    both = {"pass": "forward+backward"}
    rows = [op("gather_tokens", 48.0, backend="reference"), op("gather_tokens", 12.0),
            op("gather_tokens", 0.25, speedup=3.456, rounds=90) | both, op("gather_tokens", 8.0) | {"pass": "backward"},
            op("linear_masked_mse float32 / two ops", 6.5, peak_mib=25.0) | both,
            step("(a) published pipeline as written", 2.5, saved_bytes_per_image=18e7), step("(d) mae, eager", 5.25),
            {"op": "gather_tokens", "pass": "forward", "backend": "eager", "host_us": 14.0}]  # fmt: skip
    save(root, "new", *rows, cpu={"brand": "Synthetic", "family": 25, "model": 17})
    seed = {"seed": 0, "raw pixels": 80.0, "untrained encoder": 70.0, "pre-trained encoder": 81.0}
    clips = {"shape": "ViT-B/16 video 16x224x224 N=2", "mask_ratio": 0.9}
    steps = [step("(a) published", 1.0, **clips), step("(d) mae, eager", 1.0, **clips, peak_mib=1.0, rounds=5)]
    rows = [op("patch_embed uint8", 12.0, **clips), op("gather_tokens", 12.0, **clips)]
    save(root, "clips", *rows, steps[0] | {"median_ms": 3.0}, steps[1] | {"median_ms": 2.0}, date="2026-01-03")
    save(root, "demo", seed, seed | {"seed": 1, "untrained encoder": 73.0, "pre-trained encoder": 83.0}, kind="demo")
    text = written(
        root, "# Title <!-- ", "--> The end.", "16, 32 images, 75 % masked", "; other runs: [old](results/old.md)",
        "Synthetic Machine, family 25 model 17, 2 threads, load 0.1 before the run, torch 2.13.0, 2026-01-02, commit ",
        "commit abc1234, `pytest benchmarks/`; medians of 20 to 90 interleaved rounds; peak memory",
        "[Raw file](../benchmarks/results/new.jsonl)", "On a GPU: not measured since the first commit.",
        "| gather_tokens | forward | 48.0 ms | 12.0 ms | 4.00x | 10.0 -> 2.00 MiB |",
        "| gather_tokens | forward+backward | 1.00 ms | 0.250 ms | 3.46x | 10.0 -> 2.00 MiB |",
        "ViT-B/16 video 16x224x224, 2 clips, 90 % masked", "medians of 5 to 20", "[clips](results/clips.md)",
        "| patch_embed uint8 | forward | 48.0 ms | 12.0 ms | 4.00x | 10.0 -> 2.00 MiB |",
        "| training step float32 | - | 3.00 ms | 2.00 ms | 1.50x | 2048 -> 1.00 MiB |",
        "it takes 6.50 ms instead of 26.0 ms and 25.0 instead of 10.0 MiB in float32.", "runs at 61 % in float32",
        "| published pipeline as written | 2.50 | 180 MB | 2.00 GiB | 77 | | mae, eager | 5.25 | 90 MB | 2.00 GiB | 77",
        "keeps 2.0 times as much for the backward", "| raw pixels | 80.0 % | | untrained encoder | 70.0, 73.0 % |",
        "adds 10.5 points on average; over the seeds the untrained encoder varies by 3.0 points and the pre-trained",
    )  # fmt: skip
    assert not re.search(r"99\.0|\| backward \|", text)
    page = (root / "docs" / "results" / "new.md").read_text(encoding="utf-8")
    assert all(x in page for x in ("| cpu | brand Synthetic, family 25, model 17 |", "| backward |", "| host us |"))
    for page in (*report.BLOCKS, "docs/results/new.md"):
        links = re.findall(r"\]\((.*?)\)", (root / page).read_text(encoding="utf-8"))
        missing = {link for link in links if not (root / page).parent.joinpath(link).is_file()}
        assert missing <= {"../benchmarks/NOTES.md"}, page


def test_the_table_of_features_says_who_wins_and_where(root):
    def row(part, seed, labels, *shares):
        ways = [
            f"{x}, {y}" for x in ("raw pixels", "untrained encoder", "pre-trained encoder") for y in ("linear", "kNN")
        ]
        ways += ["pre-trained encoder, fine-tuned", "the same network from scratch"]
        values = dict(zip(ways, shares, strict=True))
        return {"part": part, "seed": seed, "labels": labels, "cpu_s": 90.0, "commit": "abc1234"} | values

    few = [row("labels", seed, 5, 0.5, 0.4, 0.2, 0.2, 0.6, 0.6, 0.6 + seed / 10, 0.55) for seed in (0, 1)]
    many = [row("labels", seed, 500, 0.9, 0.8, 0.7, 0.7, 0.85, 0.8, 0.8, 0.75 + seed / 10) for seed in (0, 1)]
    tuned = {"part": "ablations", "cpu_s": 6.0, "commit": "abc1234", "case": "25 % hidden", "steps": 9.0}
    ablations = [tuned | {"seed": x, "linear": 0.5 + x / 10, "kNN": 0.25, "training_cpu_s": 7.0} for x in (0, 1)]
    of_tokens = {"ratio, 8": 2.71, "ratio, 1": 3.6, "FLOPs, 8": 3.2, "FLOPs, 1": 4.2, "ms": 9.0}
    tokens = {"part": "mask tokens", "case": "ViT-L", "cpu_s": 0.0, "commit": "f00"} | of_tokens
    save(root, "features", *few, *many, *ablations, tokens, kind="quality")
    written(
        root, "mean of seeds 0, 1, in brackets the lowest and the highest of them; 6 CPU-minutes in all;",
        "rows of commits abc1234, f00 ([raw file](../benchmarks/results/features.jsonl))", "| | 5 | 500 |",
        "| raw pixels, linear | 50.0 | **90.0** |", "| MAE, fine-tuned | **65.0 (60.0 to 70.0)** | 80.0 |",
        "differs from the same network from scratch by +10.0, +0.0 points. Its worst seed is ahead of the other's best",
        "with none of these numbers of labels. Read linearly, frozen features of the MAE are better than raw pixels on",
        "on average with 5 labels of a class, and worse with 500 labels of a class.",
        "| 25 % hidden | 55.0 (50.0 to 60.0) | 25.0 | 9 | 7 |",
        "| ViT-L | 8 | 2.7x | 3.2x | 2.8x | | ViT-L | 1 | 3.6x | 4.2x | 3.7x |",
    )  # fmt: skip


def test_check_names_what_is_out_of_step(root, capsys):
    path, picture = save(root, "cpu", op("gather_tokens", 12.0)), root / "docs" / "results" / "cpu-speedups.svg"
    written(root)
    drawn = picture.read_bytes()
    picture.unlink()
    save(root, "cpu", op("gather_tokens", 13.0))
    names = ["docs/performance.md, numbers of ops", "docs/results/cpu.md", "docs/results/cpu-speedups.svg"]
    assert report.main(["--check"], root) == 1
    assert capsys.readouterr().out.splitlines()[-3:] == [f"out of step: {name}" for name in names]
    save(root, "cpu", op("gather_tokens", 12.0))
    written(root)
    assert picture.read_bytes() == drawn  # the same from the same values
    path.unlink()
    assert report.main(["--check"], root) == 1
    assert "docs/results/cpu.md, which has no result file" in capsys.readouterr().out
    written(root)
    assert not list((root / "docs" / "results").iterdir())
    (root / "README.md").write_text("no blocks", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"README.md needs <!-- numbers of front: begin --> and <!-- numbers of fr"):
        report.main([], root)


def test_times_of_the_interpreter_are_no_speeds(root):
    rows = [op("gather_tokens", 123.0, backend="triton"), op("gather_tokens", 456.0), step("(d) mae", 78.9)]
    path = save(root, "interpreted", *rows, kind="interpreter")
    assert not re.search("123|456|78.9|interpreted", written(root))
    assert not (root / "docs" / "results").exists()
    with pytest.raises(SystemExit, match="only files of kind cpu and gpu hold speeds"):
        report.main(["--compare", str(path), str(path), "--anyway"], root)


def test_the_block_of_a_gpu_takes_the_newest_ops_and_the_newest_step(root):
    at, gpu = {"backend": "triton", "shape": "ViT-B/16 N=256"}, {"kind": "gpu", "device": "SYNTHETIC GPU"}
    tflops = {"linear": {"bfloat16": 700.0, "float32": 50.0}, "convolution": {"bfloat16": 600.0, "float32": 55.0}}
    # Not in the block are another shape, the eager back-end and a case that only the page shows.
    rows = [op("gather_tokens", 0.02, **at, flops=0, compiled_ms=0.04, speedup=10.0, of_floor=0.95, of_clone=0.98),
            op("scatter_mask_tokens", 0.5, **at, of_floor=0.97), op("random_masking", 1.11, backend="triton"),
            op("gather_tokens", 7.77, shape="ViT-B/16 N=256"), op("masked_mse full", 6.66, **at)]  # fmt: skip
    passed, failed = ({"stage": x, "passed": x == "memcheck", "last_line": "0 | 0"} for x in ("memcheck", "racecheck"))
    lines = [{"ceilings": {"copy_gb_per_s": 4000.0, "tflops": tflops}}, {"stage": passed}]
    save(root, "call-1", *rows, lines=lines, driver="1.2.3", cpu={"family": 25, "model": 17}, **gpu)
    both = [step("(d) mae, eager", 5000.0), step("(a) published pipeline as written", 2000.0)]
    save(root, "call-2", *both, lines=[{"stage": failed}], **gpu, commit="def5678")
    save(root, "call-3", step("(d) mae, eager", 888.0), **gpu, commit="def5678", date="2026-01-02 12:34")
    block = written(
        root, "**Failed at commit def5678:** racecheck.", "| mae, eager | 5000 | 90 MB | 2.00 GiB | 77 |",
        "SYNTHETIC GPU, driver 1.2.3, torch 2.13.0, triton 3.7.1, 2026-01-02, commit abc1234",
        "[call-1](results/call-1.md); other runs: [call-2](results/call-2.md), [call-3](results/call-3.md)",
        "| gather_tokens | forward | 80.0 µs | 40.0 µs | 20.0 µs | 10.0x | 2.00x | 95 % | 98 % | 10.0 -> 2.00 MiB |",
        "| scatter_mask_tokens | forward | 2.00 ms | - | 0.500 ms | 4.00x | - | 97 % | - | 10.0 -> 2.00 MiB |",
        "![roofline of the ops](results/call-1-roofline.svg)",
    ).partition("numbers of gpu: begin")[2].partition("numbers of gpu: end")[0]  # fmt: skip
    assert not re.search(r"not measured since|7\.77|6\.66|1\.11|888|family", block, flags=re.I)
    made = "".join((root / "docs/results" / f"call-1{end}").read_text("utf-8") for end in (".md", "-roofline.svg"))
    labels = ("SYNTHETIC GPU", "linear, bfloat16: 700 TFLOP/s", "convolution, float32: 55.0 TFLOP/s")
    assert all(part in made for part in (r"| memcheck | True | 0 \| 0 |", *labels))


def test_readme_shows_ops_and_the_step_that_is_the_default_beside_the_fastest_of_others(root):
    both = {"pass": "forward+backward"}
    save(
        root,
        "ops",
        op("patch_embed uint8", 2.0) | both,
        op("patch_embed uint8", 7.77),
        op("gather_tokens", 6.66) | both,
    )
    steps = [step("(a) published pipeline as written", 2.0, peak_mib=4096.0), step("(b) published, compiled", 3.5),
             step("(c) Hugging Face", 3.0), step("(g) Hugging Face ViTMAE, mae_kernels.apply", 9.99)]  # fmt: skip
    ours = [step("(d) mae, eager", 7.0), step("(e) mae, compiled", 8.88)]
    save(root, "steps", *steps, *ours, date="2026-01-03", commit="def5678")
    ours = [step("(d) mae, eager", 8.88), step("(e) mae, compiled", 70.0)]
    save(root, "gpu", steps[0], *ours, kind="gpu", device="SYNTHETIC GPU")
    block = written(
        root, "75 % masked (GPU on 2026-01-02, CPU on 2026-01-02, CPU on 2026-01-03). ",
        "| SYNTHETIC GPU, 16 images | training step, float32 | 2.00 images/s | 2.00 images/s | 70.0 images/s | 35.0x "
        "and 35.0x | 4.00 -> 2.00 GiB | ",
        "images | patch_embed uint8, both passes | 8.00 ms | - | 2.00 ms | 4.00x | 10.0 -> 2.00 MiB | ",
        "| Synthetic Machine, 2 threads, 16 images | training step, float32 | 2.00 images/s | 3.50 images/s | "
        "7.00 images/s | 3.50x and 2.00x | 4.00 -> 2.00 GiB |",
        "| float32 | 3.00 images/s | 9.99 images/s | 3.33x | 2.00 -> 2.00 GiB |",
    ).partition("numbers of front: end")[0]  # fmt: skip
    assert not re.search(r"7\.77|6\.66|8\.88|9\.99", block)


def test_a_gpu_file_older_than_the_kernels_says_so(root):
    def commit(text):
        (root / "mae_kernels" / "kernels").mkdir(parents=True, exist_ok=True)
        (root / "mae_kernels" / "kernels" / "one.py").write_text(text, encoding="utf-8")
        who = "-c user.name=Test -c user.email=test@example.com -c commit.gpgsign=false"
        for command in ("init -q", "add mae_kernels", f"{who} commit -q -m kernels", "rev-parse --short HEAD"):
            run = subprocess.run(["git", *command.split()], cwd=root, check=True, capture_output=True, text=True)
        return run.stdout.strip()

    first, row = commit("1\n"), op("gather_tokens", 0.02, backend="triton")
    save(root, "gpu", row, kind="gpu", commit=first)
    assert report.STALE not in written(root)
    last = commit("2\n")
    assert report.main(["--check"], root) == 0  # a commit cannot write its own name
    written(root, f"{report.STALE}{first}**, last in {last}, and no GPU has run them as they are now.")
    save(root, "gpu", row, kind="gpu", commit="0000000")
    assert report.STALE not in written(root)  # git does not know


def test_compare_finds_what_got_slower_leaves_noise_alone_and_refuses_other_machines(root, capsys):
    def compared(old, new, *options, **facts):
        paths = [save(root, "old", *old), save(root, "new", *new, **facts)]
        return report.main(["--compare", *map(str, paths), *options], root)

    # One got slower, one changed within the spread of both, one outside of it but by little, one got faster.
    old = [op("gather_tokens", 10.0), op("masked_mse full", 10.0, 0.2), op("random_masking", 10.0, 0.001),
           op("patch_embed uint8", 10.0), step("(d) mae, eager", 5.0), op("scatter_mask_tokens", 10.0)]  # fmt: skip
    new = [op("gather_tokens", 11.0), op("masked_mse full", 12.0, 0.2), op("random_masking", 10.2, 0.001),
           op("patch_embed uint8", 5.0), step("(d) mae, eager", 5.0)]  # fmt: skip
    assert compared(old, new) == 1
    assert capsys.readouterr().out.splitlines() == [
        "+10 %, ViT-B/16 N=32, gather_tokens, forward, eager, float32: 10.0 ms -> 11.0 ms",
        "-50 %, ViT-B/16 N=32, patch_embed uint8, forward, eager, float32: 10.0 ms -> 5.00 ms",
        "5 rows in both: 1 slower, 1 faster, the others within the noise",
    ]
    assert compared(old, old) == 0
    for name, was, now in (("device", "Synthetic(R) Machine", "Other"), ("kind", "cpu", "gpu"), ("threads", 2, 8)):
        with pytest.raises(SystemExit, match=re.escape(f"{name} is {was!r} in old and {now!r} in new: see --anyway")):
            compared(old, new, **{name: now})
        assert compared(old, new, "--anyway", **{name: now}) == 1
