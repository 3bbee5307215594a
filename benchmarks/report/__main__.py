"""What the result files say: ``python -m benchmarks.report`` writes the numbers of README.md and docs/results.

``--check`` writes nothing and fails where those are out of step with the files. ``--compare OLD NEW`` says what got
slower, and fails if something did.
"""

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean

from benchmarks import record
from benchmarks.report import aims
from benchmarks.report.compare import compare, obstacle
from benchmarks.report.pages import page, pictures
from benchmarks.report.plots import Picture, digest_of
from benchmarks.report.result import (
    Result,
    digits,
    milliseconds,
    newest,
    over_compiled,
    paragraphs,
    peak,
    percent,
    prose,
    results,
    rounds,
    setting,
    table,
    times,
)

STALE = "**Not measured since commit "


def of_ops(found: list[Result], root: Path) -> str:
    result = newest(found, "cpu", "shown")
    if result is None:
        return "On a CPU: not measured yet."
    lines = [["op", "pass", "published pipeline", "`mae_kernels`", "speed-up", "peak memory"]]
    for row in result.shown:
        speed = [milliseconds(row["reference_ms"]), milliseconds(row["median_ms"]), times(row["speedup"])]
        lines.append([row["op"], row["pass"], *speed, peak(row)])
    return paragraphs(
        prose(
            f"{setting(result.shown)}, eager PyTorch on both sides; {result.conditions}; {rounds(result.shown)}; peak "
            f"memory of one call as PyTorch's allocator saw it. {_sources(result, found)}"
        ),
        table(lines),
        prose(_head_and_loss(result)),
    )


def of_steps(found: list[Result], root: Path) -> str:
    result = newest(found, "cpu", "steps")
    return _steps(result) if result else "The whole step on a CPU: not measured yet."


def of_gpu(found: list[Result], root: Path) -> str:
    result = newest(found, "gpu", "shown") or newest(found, "gpu")
    if result is None:
        return "On a GPU: not measured since the first commit."
    parts = [prose(f"On a GPU: {result.conditions}{_roofs(result)}. {_sources(result, found)}")]
    failed = [step["step"] for step in result.facts.get("steps", ()) if not step["passed"]]
    if failed:
        parts.append(f"**Failed in the same run:** {', '.join(failed)}.")
    changed = _kernels_changed_since(result.facts["commit"], root)
    if changed:
        parts.append(f"{STALE}{result.facts['commit']}**: the kernels have changed since, last in {changed}.")
    if result.shown:
        header = ["op", "pass", "published pipeline", "it compiled", "`mae_kernels`"]
        lines = [[*header, "speed-up", "over compiled", "% of floor", "peak memory"]]
        for row in result.shown:
            speed = [milliseconds(row.get(name)) for name in ("reference_ms", "compiled_ms", "median_ms")]
            gains = [times(row["speedup"]), times(over_compiled(row)), percent(row.get("of_floor"))]
            lines.append([row["op"], row["pass"], *speed, *gains, peak(row)])
        parts += [
            prose(
                f"{setting(result.shown)}; {rounds(result.shown)}. The floor: moving the op's logical bytes at the "
                "rate of a large copy or computing its FLOPs at that of a large product, the longer:"
            ),
            table(lines),
            aims.told(result.shown, result.own),
        ]
    if "roofline" in pictures(result):
        parts.append(f"![the ops under the roofs of the GPU](docs/results/{result.stem}-roofline.svg)")
    steps = newest(found, "gpu", "steps")
    return paragraphs(*parts, _steps(steps) if steps else "The whole step on a GPU: not measured yet.")


def of_demo(found: list[Result], root: Path) -> str:
    result = newest(found, "demo")
    if result is None:
        return "`make demo`: not measured yet."
    rows = result.facts["rows"]
    features = {name: [row[name] for row in rows] for name in rows[0] if name != "seed"}
    lines = [["features", "top-1"]]
    for name, values in features.items():
        told = values[:1] if len(set(values)) == 1 else values
        lines.append([name, ", ".join(f"{value:.1f}" for value in told) + " %"])
    before, after = features["untrained encoder"], features["pre-trained encoder"]
    return paragraphs(
        prose(
            f"Seeds {', '.join(str(row['seed']) for row in rows)}; {result.conditions} "
            f"([raw file](benchmarks/results/{result.stem}.json)):"
        ),
        table(lines),
        prose(
            f"Pre-training adds {mean(after) - mean(before):.1f} points on average; over the seeds the untrained "
            f"encoder varies by {max(before) - min(before):.1f} points and the pre-trained one by "
            f"{max(after) - min(after):.1f}."
        ),
    )


BLOCKS: dict[str, Callable[[list[Result], Path], str]] = {
    "ops": of_ops,
    "step": of_steps,
    "gpu": of_gpu,
    "demo": of_demo,
}


def outputs(root: Path) -> dict[Path, str | Picture]:
    """Every generated file but README."""
    made: dict[Path, str | Picture] = {}
    for result in results(root):
        if result.kind != "demo":
            made[root / "docs" / "results" / f"{result.stem}.md"] = page(result)
            for name, picture in pictures(result).items():
                made[root / "docs" / "results" / f"{result.stem}-{name}.svg"] = picture
    return made


def outdated(root: Path) -> list[str]:
    """Names of blocks and files that are not what the result files say.

    Whether the kernels changed since a GPU ran them is not compared: the commit that changes them cannot know its name.
    """
    text, found = (root / "README.md").read_text(encoding="utf-8"), results(root)
    names = [
        f"README.md, numbers of {name}"
        for name, block in BLOCKS.items()
        if _without_age(_split(text, name)[1]) != _without_age(f"\n{block(found, root)}\n\n")
    ]
    made = outputs(root)
    names += [str(path.relative_to(root)) for path, content in made.items() if not _is_up_to_date(path, content)]
    return names + [f"{path.relative_to(root)}, which has no result file" for path in _left_over(root, made)]


def write(root: Path) -> list[Path]:
    """Write what is out of step, and remove pages and pictures without a result file."""
    readme, found = root / "README.md", results(root)
    text = before = readme.read_text(encoding="utf-8")
    for name, block in BLOCKS.items():
        head, _, tail = _split(text, name)
        text = f"{head}\n{block(found, root)}\n\n{tail}"
    written = []
    if text != before:
        readme.write_text(text, encoding="utf-8")
        written.append(readme)
    made = outputs(root)
    for path, content in made.items():
        if not _is_up_to_date(path, content):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content if isinstance(content, str) else content.svg(), encoding="utf-8")
            written.append(path)
    for path in _left_over(root, made):
        path.unlink()
    return written


def _is_up_to_date(path: Path, content: str | Picture) -> bool:
    if not path.is_file():
        return False
    there = path.read_text(encoding="utf-8")
    return there == content if isinstance(content, str) else digest_of(there) == content.digest


def _left_over(root: Path, made: dict) -> list[Path]:
    folder = root / "docs" / "results"
    return [path for path in sorted(folder.glob("*")) if path.suffix in (".md", ".svg") and path not in made]


def _split(text: str, name: str) -> tuple[str, str, str]:
    """Up to the end of the first marker, between the markers, and from the second on."""
    begin, end = (f"<!-- numbers of {name}: {edge} -->\n" for edge in ("begin", "end"))
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise SystemExit(f"README.md needs the lines {begin.strip()} and {end.strip()}, once each and in this order")
    head, _, rest = text.partition(begin)
    inside, _, tail = rest.partition(end)
    return head + begin, inside, end + tail


def _without_age(block: str) -> str:
    return re.sub(rf"^{re.escape(STALE)}.*\n\n", "", block, flags=re.M)


def _kernels_changed_since(commit: str, root: Path) -> str:
    """The last commit that touched the kernels if it is not in the given one's past; "" where git cannot tell."""
    if shutil.which("git") is None:
        return ""

    def git(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)

    last = git("log", "-1", "--format=%h", "--", "mae_kernels/kernels").stdout.strip()
    return last if last and git("merge-base", "--is-ancestor", last, commit).returncode == 1 else ""


def _steps(result: Result) -> str:
    """Images per second at each shape and dtype; memory and launches at ViT-B, or at the last shape without it."""
    rows, on_gpu = result.steps, result.kind == "gpu"
    shapes, dtypes = (list(dict.fromkeys(row[name] for row in rows)) for name in ("shape", "dtype"))
    at = next((shape for shape in shapes if shape.startswith("ViT-B")), shapes[-1])
    batches = {shape.rpartition("N=")[2] for shape in shapes}
    names = {shape: shape.split("/")[0] if len(batches) == 1 else shape for shape in shapes}
    measured = {(row["contender"], row["shape"], row["dtype"]): row for row in rows}
    columns = list(dict.fromkeys((row["shape"], row["dtype"]) for row in rows))

    def there(contender: str, key: str, say: Callable, unit: str = "") -> str:
        values = [measured.get((contender, at, dtype), {}).get(key) for dtype in dtypes]
        return " / ".join("-" if value is None else say(value) for value in values) + unit

    calls = "launches" if on_gpu else "ops"
    lines = [["step", *(f"{names[shape]} {dtype}" for shape, dtype in columns)]]
    lines[0] += [f"saved, {names[at]}", f"peak, {names[at]}", calls]
    for contender in dict.fromkeys(row["contender"] for row in rows):
        speeds = [measured.get((contender, *column), {}).get("images_per_s") for column in columns]
        lines.append([
            contender.partition(") ")[2],
            *("-" if speed is None else digits(speed) for speed in speeds),
            there(contender, "saved_bytes_per_image", lambda value: f"{value / 1e6:.0f}", " MB"),
            there(contender, "peak_mib", lambda value: f"{value / 1024:.2f}", " GiB"),
            there(contender, "launches", str),
        ])  # fmt: skip
    batch = f", {batches.pop()} images" if len(batches) == 1 else ""
    counted = "what the host puts on the GPU in a step" if on_gpu else (
        "what a step dispatches, for compiled ones the calls in their forward and backward graphs"
    )  # fmt: skip
    return paragraphs(
        prose(
            f"The whole step, forward, backward and optimizer{batch}, in images/s; {result.conditions}; medians of "
            f'{rows[0]["rounds"]} interleaved steps. "Saved" is what autograd keeps for the backward, per image, in '
            f'{" / ".join(dtypes)}; "{calls}" counts {counted}:'
        ),
        table(lines),
        prose(_shares(measured, at, dtypes)),
    )


def _shares(measured: dict, at: str, dtypes: list[str]) -> str:
    by_letter = [
        (dtype, {name[1]: row for (name, shape, d), row in measured.items() if (shape, d) == (at, dtype)})
        for dtype in dtypes
    ]
    pairs = [(dtype, of["a"], of["d"]) for dtype, of in by_letter if {"a", "d"} <= of.keys()]
    if not pairs:
        return ""
    rates = " and ".join(f"{percent(ours.get('mfu'))} in {dtype}" for dtype, _, ours in pairs)
    kept = " and ".join(f"{a['saved_bytes_per_image'] / d['saved_bytes_per_image']:.1f}" for _, a, d in pairs)
    return (
        f"As shares of the rate of a large matrix product in the same run, a {at.split('/')[0]} step by `mae`, eager, "
        f"runs at {rates} ([notes](benchmarks/NOTES.md) say where the rest goes). The published pipeline as written "
        f"keeps {kept} times as much for the backward."
    )


def _head_and_loss(result: Result) -> str:
    parts = [
        f"{milliseconds(row['median_ms'])} instead of {milliseconds(row['reference_ms'])} and "
        f"{digits(row['peak_mib'])} instead of {digits(row['reference_peak_mib'])} MiB in {dtype}"
        for dtype in ("float32", "bfloat16")
        for row in result.own
        if (row["op"], row["pass"]) == (f"linear_masked_mse {dtype} / two ops", "forward+backward")
        and row["shape"] == result.shown[0]["shape"]
    ]
    if not parts:
        return ""
    return (
        "`linear_masked_mse` computes its gradients in the forward. Against the same head followed by `masked_mse`, "
        f"forward and backward, it takes {', '.join(parts)}."
    )


def _roofs(result: Result) -> str:
    copy, rates = result.ceilings.get("copy_gb_per_s"), result.ceilings.get("tflops", {})
    parts = [f"a large copy {digits(copy)} GB/s"] if copy else []
    parts += [f"a large product in {name} {digits(rate)} TFLOP/s" for name, rate in rates.items()]
    return f"; in the same run {', '.join(parts)}" if parts else ""


def _sources(result: Result, found: list[Result]) -> str:
    def link(other: Result) -> str:
        return f"[{other.stem}](docs/results/{other.stem}.md)"

    others = [link(other) for other in found if other is not result and other.kind == result.kind]
    return (
        f"[Raw file](benchmarks/results/{result.stem}.json); every row and pictures: {link(result)}"
        f"{'; other runs: ' + ', '.join(others) if others else ''}."
    )


def main(argv: list[str] | None = None, root: Path = record.ROOT) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail and name what is out of step")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="two result files of one machine")
    parser.add_argument("--anyway", action="store_true", help="compare different devices too")
    options = parser.parse_args(argv)
    if options.compare:
        old, new = (Result(path.stem, record.read(path)) for path in options.compare)
        if no_speeds := [result.stem for result in (old, new) if result.kind not in ("cpu", "gpu")]:
            raise SystemExit(f"{no_speeds[0]} holds no speeds of ops or steps")
        if (problem := obstacle(old, new)) and not options.anyway:
            raise SystemExit(f"{problem}; --anyway compares them all the same")
        told, slower = compare(old, new)
        print(told)
        return int(slower)
    if options.check:
        names = outdated(root)
        print("\n".join([f"out of step: {name}" for name in names] or ["README.md and docs/results are in step"]))
        return int(bool(names))
    for path in write(root):
        print(f"wrote {path.relative_to(root)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
