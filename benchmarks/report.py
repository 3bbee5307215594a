"""What the result files say: ``python -m benchmarks.report`` writes the numbers of README.md and docs."""

import argparse
import os
import re
import shutil
import subprocess
import textwrap
from pathlib import Path
from statistics import mean

from benchmarks import charts, record
from benchmarks.quality_tables import tables
from benchmarks.result import Result, newest, results, say

# What README shows of each kind of machine: ops, and the step as the trainer runs it there by default.
FRONT = {
    "gpu": (("patch_embed uint8 bfloat16", "masked_mse uint8 bfloat16"), "e"),
    "cpu": (("patch_embed uint8",), "d"),
}
STALE = "**The kernels have changed since "


def of_front(found: list[Result]) -> list:
    """README's table: on each kind of machine an op, and the whole step as the trainer runs it by default."""
    lines = [["machine", "what", "published", "fastest of others", "`mae_kernels`", "faster", "peak memory"]]
    measured: list[Result] = []
    for kind, (names, letter) in FRONT.items():
        ops, steps = newest(found, kind, "shown"), newest(found, kind, "compared")
        measured += [result for result in (ops, steps) if result]
        for row in ops.shown if ops else []:
            if row["op"] in names and row["pass"] == "forward+backward":
                times = [say(row["reference_ms"], "ms"), "-", say(row["median_ms"], "ms"), say(row["speedup"], "x")]
                peak = f"{say(row['reference_peak_mib'])} -> {say(row['peak_mib'])} MiB"
                lines.append([_machine(ops, row), f"{row['op']}, both passes", *times, peak])
        for published, others, ours in _contests(steps, letter) if steps else []:
            rates = [x["images_per_s"] for x in (published, others, ours)]
            faster = " and ".join(say(rates[2] / rate, "x") for rate in rates[:2])
            peak = f"{published['peak_mib'] / 1024:.2f} -> {ours['peak_mib'] / 1024:.2f} GiB"
            told = [f"{say(rate)} images/s" for rate in rates]
            lines.append([_machine(steps, ours), f"training step, {ours['dtype']}", *told, faster, peak])
    if not measured:
        return ["Not measured yet."]
    when = dict.fromkeys(f"{x.kind.upper()} on {x.facts['date'][:10]}" for x in measured)
    return [
        f"""Medians of interleaved rounds at ViT-B/16, 75 % masked ({", ".join(when)}). A step is forward, backward and
        optimizer. The others are the published pipeline and Hugging Face's ViTMAE with SDPA, compiled too; ops were
        compared with eager PyTorch alone.""",
        lines,
        changed_since([x for x in measured if x.kind == "gpu"]),
    ]


def of_apply(found: list[Result]) -> list:
    """What one line gives to Hugging Face's model."""
    lines = [["machine", "dtype", "Hugging Face ViTMAE, SDPA", "the same after `apply`", "faster", "peak memory"]]
    for steps in filter(None, (newest(found, kind, "compared") for kind in FRONT)):
        rows = {(row["contender"][1], row["dtype"]): row for row in steps.compared if row["shape"] == steps.main_shape}
        for (letter, dtype), ours in rows.items():
            if letter == "g" and (plain := rows.get(("c", dtype))):
                rates = [row["images_per_s"] for row in (plain, ours)]
                peak = f"{plain['peak_mib'] / 1024:.2f} -> {ours['peak_mib'] / 1024:.2f} GiB"
                told = [f"{say(rate)} images/s" for rate in rates]
                lines.append([_machine(steps, ours), dtype, *told, say(rates[1] / rates[0], "x"), peak])
    return [lines] if lines[1:] else ["Not measured yet."]


def _machine(result: Result, row: dict) -> str:
    threads = f", {result.facts['threads']} threads" if result.kind == "cpu" else ""
    device = re.sub(r"\((R|TM)\)", "", result.facts["device"])
    if result.kind == "cpu" and "cpu" in result.facts:
        device += f" of family {result.facts['cpu']['family']}"
    return f"{device}{threads}, {row['shape'].rpartition('N=')[2]} images"


def _contests(steps: Result, letter: str) -> list[tuple[dict, dict, dict]]:
    """The published step, the fastest one that has nothing of ours, and ours of that letter, for each dtype."""
    rows = [row for row in steps.compared if row["shape"] == steps.main_shape]
    contests = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        by_letter = {row["contender"][1]: row for row in rows if row["dtype"] == dtype}
        others = [row for row in by_letter.values() if not re.search(r"mae, |mae_kernels", row["contender"])]
        if letter in by_letter:
            contests.append((by_letter["a"], max(others, key=lambda row: row["images_per_s"]), by_letter[letter]))
    return contests


def of_ops(found: list[Result], kind: str = "cpu") -> list:
    if not (result := newest(found, kind, "shown")):
        return [f"The ops on a {kind.upper()}: not measured yet."]
    links = {file.stem: f"[{file.stem}](docs/results/{file.stem}.md)" for file in [result, *found] if file.kind == kind}
    key = ("two ops", "forward+backward", result.shown[0]["shape"])
    gains = [
        f"""{say(row["median_ms"], "ms")} instead of {say(row["reference_ms"], "ms")} and {say(row["peak_mib"])} instead
        of {say(row["reference_peak_mib"])} MiB in {row["op"].split()[1]}"""
        for row in result.own if (row["op"].partition(" / ")[2], row["pass"], row["shape"]) == key
    ]  # fmt: skip
    return [
        f"""{result.setting(result.shown, ', eager PyTorch on both sides' if kind == 'cpu' else '')}; peak memory of
        one call as PyTorch's allocator saw it. [Raw file](benchmarks/results/{result.path.name}); every row and
        pictures: {", ".join(links.values()).replace(", ", "; other runs: ", 1)}.""",
        """The floor: moving the op's logical bytes at the rate of a large copy or computing its FLOPs at that of a
        large product, the longer. The copy: one of as many bytes, in the same run.""" if kind == "gpu" else "",
        against_published(result.shown, kind),
        *(f"![{name} of the ops](docs/results/{result.stem}-{name}.svg)" for name in result.pictures),
        f"""`linear_masked_mse` computes its gradients in the forward. Against the same head followed by `masked_mse`,
        forward and backward, it takes {', '.join(gains)}.""" if gains else "",
    ]  # fmt: skip


def against_published(rows: list[dict], kind: str) -> list[list[str]]:
    fields = {"op": ("op", ""), "pass": ("pass", ""), "published pipeline": ("reference_ms", "ms"),
              "published, compiled": ("compiled_ms", "ms"), "`mae_kernels`": ("median_ms", "ms"),
              "speed-up": ("speedup", "x"), "over compiled": ("over", "x"), "% of floor": ("of_floor", "%"),
              "% of a copy": ("of_clone", "%"), "peak memory": ("peak", "MiB")}  # fmt: skip
    if kind == "cpu":
        fields = {name: fields[name] for name in fields if "%" not in name}
    if not any(row.get("compiled_ms") for row in rows):
        fields = {name: fields[name] for name in fields if "compiled" not in name}
    lines = [[*fields]]
    for row in rows:
        more = {"peak": f"{say(row.get('reference_peak_mib'))} -> {say(row.get('peak_mib'))}",
                "over": row["compiled_ms"] / row["median_ms"] if row.get("compiled_ms") else None}  # fmt: skip
        lines.append([say((row | more).get(name), unit) for name, unit in fields.values()])
    return lines


def of_video(found: list[Result]) -> list:
    """The embedding of clips and the whole step on them."""
    if not (result := newest(found, "cpu", "video")):
        return ["Clips on a CPU: not measured yet."]
    return [
        f"""{result.setting(result.video)}. [Raw file](benchmarks/results/{result.path.name}); every row:
        [{result.stem}](docs/results/{result.stem}.md).""",
        against_published(result.video, "cpu"),
    ]  # fmt: skip


def of_gpu(found: list[Result]) -> list:
    measured = [result for rows in ("shown", "compared", "facts") if (result := newest(found, "gpu", rows))]
    if not measured:
        return ["On a GPU: not measured since the first commit."]
    parts = []
    for commit in dict.fromkeys(result.facts["commit"] for result in measured):
        same = [other for other in found if other.kind == "gpu" and other.facts["commit"] == commit]
        failed = dict.fromkeys(s["stage"] for other in same for s in other.facts["stages"] if not s["passed"])
        parts.append(f"**Failed at commit {commit}:** {', '.join(failed)}." if failed else "")
    return [*parts, changed_since(measured), *of_ops(found, "gpu"), *of_steps(found, "gpu")]


def changed_since(measured: list[Result]) -> str:
    """Which of these results are older than the kernels."""
    last = {}
    for result in measured if shutil.which("git") else []:
        commit = result.facts["commit"]  # git prints nothing where it does not know it
        command = ["git", "log", "-1", "--format=%h", f"{commit}..HEAD", "--", ":/mae_kernels/kernels"]
        if newer := subprocess.run(command, cwd=result.path.parent, capture_output=True, text=True).stdout.strip():
            last[commit] = newer
    commits, newest_change = " and ".join(last), next(iter(last.values()), "")
    return f"{STALE}{commits}**, last in {newest_change}, and no GPU has run them as they are now." if last else ""


def of_steps(found: list[Result], kind: str = "cpu") -> list:
    """Images per second at each shape and dtype; memory and launches at ViT-B, or at the last shape without it."""
    if not (result := newest(found, kind, "compared")):
        return [f"The whole step on a {kind.upper()}: not measured yet."]
    rows = {(row["contender"], row["shape"], row["dtype"]): row for row in result.compared}
    names, shapes, dtypes = (list(dict.fromkeys(values)) for values in zip(*rows, strict=True))
    columns = list(dict.fromkeys(key[1:] for key in rows))
    at = result.main_shape
    batches = {shape.rpartition("N=")[2] for shape in shapes}
    short = {shape: shape.split("/")[0] if len(batches) == 1 else shape for shape in shapes}
    calls, counted = ("launches", "what the host puts on the GPU in a step") if kind == "gpu" else (
        "ops", "what a step dispatches, for compiled ones the calls in their forward and backward graphs"
    )  # fmt: skip
    header = ["step", *(f"{short[shape]} {dtype}" for shape, dtype in columns)]
    lines = [[*header, f"saved, {short[at]}", f"peak, {short[at]}", calls]]
    for name in sorted(names, key=lambda name: rows.get((name, *columns[-1]), {}).get("images_per_s", 0)):
        speeds = [say(rows.get((name, *column), {}).get("images_per_s")) for column in columns]
        lines.append([name.partition(") ")[2], *speeds])
        there = [rows.get((name, at, dtype), {}) for dtype in dtypes]
        for field, scale, digits, unit in (("saved_bytes_per_image", 1e6, 0, " MB"), ("peak_mib", 1024, 2, " GiB"),
                                           ("launches", 1, 0, "")):  # fmt: skip
            values = [f"{row[field] / scale:.{digits}f}" if field in row else "-" for row in there]
            lines[-1].append(" / ".join(values) + unit * any(field in row for row in there))
    by_letter = {(name[1], dtype): row for (name, shape, dtype), row in rows.items() if shape == at}
    pairs = [(by_letter["a", x], by_letter["d", x]) for x in dtypes if {("a", x), ("d", x)} <= by_letter.keys()]
    rates = " and ".join(f"{say(ours['mfu'], '%')} in {ours['dtype']}" for _, ours in pairs)
    kept = " and ".join(f"{a['saved_bytes_per_image'] / d['saved_bytes_per_image']:.1f}" for a, d in pairs)
    return [
        f"""The whole step, forward, backward and optimizer{f", {batches.pop()} images" if len(batches) == 1 else ""},
        in images/s; {result.conditions()}; medians of {result.compared[0]["rounds"]} interleaved steps. "Saved" is what
        autograd keeps for the backward, per image, in {" / ".join(dtypes)}; "{calls}" counts {counted}:""",
        lines,
        f"""As shares of the rate of a large matrix product in the same run, a {at.split("/")[0]} step by `mae`, eager,
        runs at {rates} ([notes](benchmarks/NOTES.md) say where the rest goes). The published pipeline as written keeps
        {kept} times as much for the backward.""" if pairs else "",
    ]  # fmt: skip


def of_demo(found: list[Result]) -> list:
    if not (result := newest(found, "demo")):
        return ["`make demo`: not measured yet."]
    features = {name: [row[name] for row in result.facts["rows"]] for name in result.facts["rows"][0]}
    seeds, lines = ", ".join(map(str, features.pop("seed"))), [["features", "top-1"]]
    for name, values in features.items():
        told = values if len(set(values)) > 1 else values[:1]
        lines.append([name, ", ".join(f"{value:.1f}" for value in told) + " %"])
    a, b = features["untrained encoder"], features["pre-trained encoder"]
    return [
        f"Seeds {seeds}; {result.conditions()} ([raw file](benchmarks/results/{result.path.name})):",
        lines,
        f"""Pre-training adds {mean(b) - mean(a):.1f} points on average; over the seeds the untrained encoder varies by
        {max(a) - min(a):.1f} points and the pre-trained one by {max(b) - min(b):.1f}.""",
    ]


def of_quality(found: list[Result]) -> list:
    if not (result := newest(found, "quality")):
        return ["What the features are worth: not measured yet."]
    return tables(result.facts["rows"], result.conditions(), f"benchmarks/results/{result.path.name}")


BLOCKS = {
    "README.md": {"front": of_front},
    "docs/drop-in.md": {"apply": of_apply},
    "docs/performance.md": {"ops": of_ops, "step": of_steps, "video": of_video, "gpu": of_gpu},
    "docs/evaluation.md": {"demo": of_demo, "quality": of_quality},
}


def update(root: Path, check: bool) -> list[str]:
    """What is out of step with the result files, which is written unless ``check``."""
    folder, found, stale, made, texts = root / "docs" / "results", results(root), [], {}, {}
    for place, blocks in BLOCKS.items():
        text = (root / place).read_text(encoding="utf-8")
        for name, block in blocks.items():
            begin, end = (f"<!-- numbers of {name}: {edge} -->\n" for edge in ("begin", "end"))
            parts, new = re.split(f"({begin}|{end})", text), f"\n{markdown(as_of(place, block(found)))}\n"
            if parts[1::2] != [begin, end]:
                raise SystemExit(f"{place} needs {begin.strip()} and {end.strip()}, once each and in this order")
            text = "".join([*parts[:2], new, *parts[3:]])
            if check:  # the commit that changes kernels cannot know its own name
                new, parts[2] = (
                    re.sub(rf"^{re.escape(STALE)}.*?\n\n", "", x, flags=re.M | re.S) for x in (new, parts[2])
                )
            stale += [f"{place}, numbers of {name}"] if new != parts[2] else []
        texts[root / place] = text
    for result in (result for result in found if result.kind in ("cpu", "gpu")):
        made[folder / f"{result.stem}.md"] = markdown(page(result))
        for name in result.pictures:  # another matplotlib draws other bytes
            made[folder / f"{result.stem}-{name}.svg"] = None if check else charts.svg(result, name)
    for path, content in made.items():
        if not path.is_file() or content not in (None, path.read_text(encoding="utf-8")):
            stale.append(str(path.relative_to(root)))
    extra = [path for path in sorted(folder.glob("*")) if path.suffix in (".md", ".svg") and path not in made]
    for path, content in [] if check else (texts | made).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    for path in [] if check else extra:
        path.unlink()
    return stale + [f"{path.relative_to(root)}, which has no result file" for path in extra]


def as_of(place: str, parts: list) -> list:
    """The parts with links, which are relative to the root, as a page there needs them."""
    here = Path(place).parent
    return [
        re.sub(r"\]\(([^)]+)", lambda x: f"]({os.path.relpath(x[1], here)}", part) if isinstance(part, str) else part
        for part in parts
    ]


def page(result: Result) -> list:
    """Conditions, ceilings, checks, pictures and every row of a file."""
    facts, raw = result.facts, f"[{result.path.name}](../../benchmarks/results/{result.path.name})"
    parts = [f"# {result.stem}", f"Written by `python -m benchmarks.report` from {raw}."]
    # What record.read adds to the conditions are the ceilings and lists.
    conditions = {name: value for name, value in facts.items() if name != "ceilings" and not isinstance(value, list)}
    for title, values in (("condition", conditions), ("ceiling of the same run", facts["ceilings"])):
        lines = [[name.replace("_", " "), say(value)] for name, value in values.items()]
        parts += [[[title, "value"], *lines]] if lines else []
    parts += [f"![{name} of the ops]({result.stem}-{name}.svg)" for name in result.pictures]
    sorts = {"Checks of the same run": facts["stages"], "Ops": result.ops, "The whole step": result.steps}
    for title, rows in (sorts | {"What a call costs the host": result.hosts}).items():
        names = dict.fromkeys(name for row in rows for name in row)
        lines = [[say(row.get(name)) for name in names] for row in rows]
        parts += [f"## {title}", [[name.replace("_", " ") for name in names], *lines]] if rows else []
    return parts


def compare(old: Result, new: Result, anyway: bool) -> int:
    """Print changes of medians by more than 3 % and half the spread of both; 1 if something got slower."""
    if {old.kind, new.kind} - {"cpu", "gpu"}:
        raise SystemExit("only files of kind cpu and gpu hold speeds")
    for name in ("kind", "device", "threads", "cpu"):
        was, now = old.facts.get(name), new.facts.get(name)
        if was and now and was != now and not anyway:  # older files lack some
            raise SystemExit(f"{name} is {was!r} in {old.stem} and {now!r} in {new.stem}: see --anyway")
    changes = []
    before, after = ({", ".join(row[name] for name in record.KEY if name in row): row for row in file.ops + file.steps}
                     for file in (old, new))  # fmt: skip
    both = {name: (before[name], after[name]) for name in before.keys() & after}
    for name, rows in both.items():
        was, now = (row["median_ms"] for row in rows)
        if abs(now - was) > max(0.03 * was, sum(row["p80_ms"] - row["p20_ms"] for row in rows) / 2):
            changes.append((now / was - 1, f"{name}: {say(was, 'ms')} -> {say(now, 'ms')}"))
    for change, name in sorted(changes, reverse=True):
        print(f"{change * 100:+.0f} %, {name}")
    slower = sum(change > 0 for change, _ in changes)
    print(f"{len(both)} rows in both: {slower} slower, {len(changes) - slower} faster, the others within the noise")
    return int(slower > 0)


def markdown(parts: list) -> str:
    """Paragraphs of strings, and tables of lines, the first one their header; what is empty is left out."""
    told = []
    for part in filter(None, parts):
        if isinstance(part, str):
            told.append(textwrap.fill(" ".join(part.split()), 120, break_long_words=False, break_on_hyphens=False))
        else:
            told.append("\n".join(f"| {' | '.join(x)} |" for x in [part[0], ["---"] * len(part[0]), *part[1:]]))
    return "\n\n".join(told) + "\n"


def main(argv: list[str] | None = None, root: Path = record.ROOT) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail and name what is out of step")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="two result files of one machine")
    parser.add_argument("--anyway", action="store_true", help="compare different devices too")
    options = parser.parse_args(argv)
    if options.compare:
        return compare(*map(Result, options.compare), options.anyway)
    stale, word = update(root, options.check), "out of step:" if options.check else "wrote"
    print("\n".join(f"{word} {name}" for name in stale) or "README.md and docs are in step")
    return int(options.check and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
