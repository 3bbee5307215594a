"""What the result files say: ``python -m benchmarks.report`` writes the numbers of README.md and docs/results."""

import argparse
import io
import re
import shutil
import subprocess
import textwrap
from pathlib import Path
from statistics import mean

from benchmarks import record
from benchmarks.quality_tables import tables

# The cases of README's tables and of the pictures, in dtypes that people train in there. The pages have every case.
SHOWN = {
    "cpu": ("random_resized_crop", "random_masking", "patch_embed float32", "patch_embed uint8", "gather_tokens",
            "scatter_mask_tokens", "masked_mse masked-only", "masked_mse full", "linear_masked_mse float32",
            "linear_masked_mse bfloat16"),
    "gpu": ("random_resized_crop", "random_masking", "patch_embed float32", "patch_embed uint8 bfloat16",
            "gather_tokens", "gather_tokens bfloat16", "scatter_mask_tokens", "scatter_mask_tokens bfloat16",
            "masked_mse masked-only", "masked_mse uint8 bfloat16", "linear_masked_mse bfloat16"),
}  # fmt: skip
STALE = "**Not measured since commit "


class Result:
    """A result file and its rows by what they measure; ``own`` are ops of the back-end that a user gets there."""

    def __init__(self, path: Path):
        self.path, self.stem, self.facts = path, path.stem, record.read(path)
        self.kind, rows, ceilings = self.facts.get("kind"), self.facts["rows"], self.facts["ceilings"]
        self.ops = [row for row in rows if "backend" in row and "median_ms" in row]
        self.steps = [row for row in rows if "contender" in row]
        of_images = [row for row in self.steps if not is_video(row)]
        self.compared = [row for row in of_images if row["contender"].startswith("(a)")] and of_images
        self.hosts = [row for row in rows if "host_us" in row and "median_ms" not in row]
        back_end = {"gpu": "triton"}.get(self.kind, "eager")
        self.own = [row for row in self.ops if row["backend"] == back_end and "speedup" in row]
        shown = [row for row in self.own if row["op"] in SHOWN.get(self.kind, ()) and row["pass"] != "backward"]
        embedded = [row for row in shown if is_video(row) and row["op"].startswith("patch_embed")]
        self.video = embedded + self._eager_steps_on_video()
        shown = [row for row in shown if not is_video(row)]
        # README shows the shape that most of them were measured and compiled at.
        shapes = [row["shape"] for row in shown for _ in range(2 if row.get("compiled_ms") else 1)]
        self.shown = [row for row in shown if row["shape"] == max(shapes, key=shapes.count)]
        self.pictures = {"speedups": draw_speedups} if self.shown else {}
        if ceilings.get("tflops") and any(row["flops"] for row in self.shown):
            self.pictures["roofline"] = draw_roofline

    def _eager_steps_on_video(self) -> list[dict]:
        """Rows of ours that say what the published pipeline took, as those of ops do."""
        rows = {(row["contender"][1], row["dtype"]): row for row in self.steps if is_video(row)}
        return [
            ours | {"op": f"training step {dtype}", "reference_ms": published["median_ms"],
                    "reference_peak_mib": published["peak_mib"], "speedup": published["median_ms"] / ours["median_ms"]}
            for (letter, dtype), ours in rows.items()
            if letter == "d" and (published := rows.get(("a", dtype)))
        ]  # fmt: skip

    def conditions(self) -> str:
        forms = {"device": "{}", "cpu": "family {0[family]} model {0[model]}", "threads": "{} threads",
                 "load": "load {} before the run", "driver": "driver {}", "torch": "torch {}", "triton": "triton {}",
                 "date": "{}", "commit": "commit {}", "uncommitted_changes": "with uncommitted changes",
                 "command": "`{}`"}  # fmt: skip
        hidden = ("cpu", "threads", "load") if self.kind == "gpu" else ("triton",)
        facts = {k: v for k, v in self.facts.items() if k not in hidden and str(v) not in ("False", "unknown")}
        told = [form.format(facts[name]) for name, form in forms.items() if name in facts]
        return re.sub(r"\((R|TM)\)", "", ", ".join(told))

    def setting(self, rows: list[dict], more: str = "") -> str:
        counts, shape = sorted({row["rounds"] for row in rows}), rows[0]["shape"].replace(" N=", ", ")
        rounds = f"{counts[0]} to {counts[-1]}" if counts[1:] else counts[0]
        masked = say(rows[0].get("mask_ratio", 0.75), "%")  # older files lack it
        what = f"{shape} {'clips' if is_video(rows[0]) else 'images'}, {masked} masked"
        setting = f"{what}, float32 unless a row says otherwise{more}"
        return f"{setting}; {self.conditions()}; medians of {rounds} interleaved rounds"


def is_video(row: dict) -> bool:
    return "video" in row["shape"]


def results(root: Path) -> list[Result]:
    """The oldest first. What Triton's interpreter made holds no speed: it is left out here, and so everywhere."""
    found = map(Result, (root / "benchmarks" / "results").glob("*.jsonl"))
    return sorted(
        (x for x in found if x.kind in ("cpu", "gpu", "demo", "quality")), key=lambda x: (x.facts["date"], x.stem)
    )


def newest(found: list[Result], kind: str, rows: str = "facts") -> Result | None:
    """The latest result of that kind among those that have such rows."""
    return next((result for result in reversed(found) if result.kind == kind and getattr(result, rows)), None)


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
        large product, the longer. The clone: a copy of as many bytes, in the same run.""" if kind == "gpu" else "",
        against_published(result.shown, kind),
        f"""`linear_masked_mse` computes its gradients in the forward. Against the same head followed by `masked_mse`,
        forward and backward, it takes {', '.join(gains)}.""" if gains else "",
    ]  # fmt: skip


def against_published(rows: list[dict], kind: str) -> list[list[str]]:
    fields = {"op": ("op", ""), "pass": ("pass", ""), "published pipeline": ("reference_ms", "ms"),
              "it compiled": ("compiled_ms", "ms"), "`mae_kernels`": ("median_ms", "ms"), "speed-up": ("speedup", "x"),
              "over compiled": ("over", "x"), "% of floor": ("of_floor", "%"), "% of clone": ("of_clone", "%"),
              "peak memory": ("peak", "MiB")}  # fmt: skip
    if kind == "cpu":
        fields = {name: fields[name] for name in fields if "compiled" not in name and "%" not in name}
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
        if shutil.which("git"):  # it prints nothing where it does not know the commit
            command = ["git", "log", "-1", "--format=%h", f"{commit}..HEAD", "--", ":/mae_kernels/kernels"]
            last = subprocess.run(command, cwd=same[0].path.parent, capture_output=True, text=True).stdout.strip()
            parts.append(f"{STALE}{commit}**: the kernels have changed since, last in {last}." if last else "")
    picture = f"![ops under the roofs of the GPU](docs/results/{measured[0].stem}-roofline.svg)"
    pictures = [picture] if "roofline" in measured[0].pictures else []
    return parts + of_ops(found, "gpu") + pictures + of_steps(found, "gpu")


def of_steps(found: list[Result], kind: str = "cpu") -> list:
    """Images per second at each shape and dtype; memory and launches at ViT-B, or at the last shape without it."""
    if not (result := newest(found, kind, "compared")):
        return [f"The whole step on a {kind.upper()}: not measured yet."]
    rows = {(row["contender"], row["shape"], row["dtype"]): row for row in result.compared}
    names, shapes, dtypes = (list(dict.fromkeys(values)) for values in zip(*rows, strict=True))
    columns = list(dict.fromkeys(key[1:] for key in rows))
    at = next((shape for shape in shapes if shape.startswith("ViT-B")), shapes[-1])
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


def update(root: Path, check: bool) -> list[str]:
    """What is out of step with the result files, which is written unless ``check``."""
    readme, folder, found = root / "README.md", root / "docs" / "results", results(root)
    text, stale, made = readme.read_text(encoding="utf-8"), [], {}
    blocks = {"ops": of_ops, "step": of_steps, "video": of_video, "gpu": of_gpu, "demo": of_demo, "quality": of_quality}
    for name, block in blocks.items():
        begin, end = (f"<!-- numbers of {name}: {edge} -->\n" for edge in ("begin", "end"))
        parts, new = re.split(f"({begin}|{end})", text), f"\n{markdown(block(found))}\n"
        if parts[1::2] != [begin, end]:
            raise SystemExit(f"README.md needs {begin.strip()} and {end.strip()}, once each and in this order")
        text = "".join([*parts[:2], new, *parts[3:]])
        if check:  # the commit that changes kernels cannot know its own name
            new, parts[2] = (re.sub(rf"^{re.escape(STALE)}.*\n\n", "", x, flags=re.M) for x in (new, parts[2]))
        stale += [f"README.md, numbers of {name}"] if new != parts[2] else []
    for result in (result for result in found if result.kind in ("cpu", "gpu")):
        made[folder / f"{result.stem}.md"] = markdown(page(result))
        for name, draw in result.pictures.items():  # another matplotlib draws other bytes
            made[folder / f"{result.stem}-{name}.svg"] = None if check else svg(result, draw)
    for path, content in made.items():
        if not path.is_file() or content not in (None, path.read_text(encoding="utf-8")):
            stale.append(str(path.relative_to(root)))
    extra = [path for path in sorted(folder.glob("*")) if path.suffix in (".md", ".svg") and path not in made]
    for path, content in [] if check else [(readme, text), *made.items()]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    for path in [] if check else extra:
        path.unlink()
    return stale + [f"{path.relative_to(root)}, which has no result file" for path in extra]


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


def svg(result: Result, draw) -> str:
    """The same text from the same values. The conditions are in the picture, so that they travel with it."""
    import matplotlib.figure

    with matplotlib.rc_context({"svg.hashsalt": "mae_kernels", "svg.fonttype": "none", "font.size": 9}):
        figure, file = matplotlib.figure.Figure(figsize=(10, 5.6), layout="constrained"), io.StringIO()
        draw(axis := figure.subplots(), result)
        unique = {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        axis.legend(unique.values(), unique.keys(), loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
        figure.supxlabel(textwrap.fill(result.setting(result.shown).replace("`", ""), 150), fontsize=8, color="#444444")
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def draw_speedups(axis, result: Result) -> None:
    for place, row in enumerate(result.shown):
        axis.barh(place, row["speedup"], height=0.68, color="#6fa8dc", label="mae_kernels")
        compiled = row["reference_ms"] / row["compiled_ms"] if row.get("compiled_ms") else 0
        if compiled:
            axis.plot(compiled, place, "|k", markersize=12, label="published pipeline, torch.compile")
        end = max(1, row["speedup"], compiled)  # a number in a line is hard to read
        axis.annotate(say(row["speedup"], "x"), (end, place), (4, 0), textcoords="offset points", va="center")
    axis.axvline(1, color="#777777", linewidth=1, linestyle="--", label="published pipeline, eager: 1")
    axis.set_yticks(range(len(result.shown)), [f"{row['op']}, {row['pass']}" for row in result.shown])
    axis.set(title="Times as fast as the published pipeline in eager PyTorch", xmargin=0.15, ylim=(place + 0.6, -0.6))


def draw_roofline(axis, result: Result) -> None:
    """FLOP/s over FLOP per logical byte, under the rates of a large copy and of large products of the same run."""
    copy, best = result.facts["ceilings"]["copy_gb_per_s"] * 1e9, {}
    for function, rates in result.facts["ceilings"]["tflops"].items():
        for dtype, rate in rates.items():
            best[dtype] = max(best.get(dtype, (0, "")), (rate * 1e12, f"{function}, {dtype}: {say(rate)} TFLOP/s"))
    rows = [row for row in result.shown if row["flops"]]
    ops, xs = list(dict.fromkeys(row["op"] for row in rows)), [row["flops"] / row["logical_bytes"] for row in rows]
    top, left = max(best.values())[0], min(xs) / 2
    right = 4 * max(*xs, top / copy)
    for rate, _ in best.values():
        axis.plot([left, rate / copy, right], [left * copy, rate, rate], color="black", linewidth=1.2)
    # Nothing can be above the roofs: that is where their names have room.
    for rate, name in [*best.values(), ((left * top * copy) ** 0.5, f"copy: {say(copy / 1e9)} GB/s")]:
        axis.annotate(name, (rate / copy, rate), (-6, 0), textcoords="offset points", ha="right", va="center")
    for x, row in zip(xs, rows, strict=True):
        color, marker = f"C{ops.index(row['op'])}", "o" if row["pass"] == "forward" else "s"
        published, ours = (row["flops"] / row[name] * 1e3 for name in ("reference_ms", "median_ms"))
        axis.plot([x, x], [published, ours], f"{marker}-", color=color, linewidth=0.8, markerfacecolor="white")
        axis.plot(x, ours, marker, color=color, markersize=7, label=f"{row['op']}, {row['pass']}")
    axis.plot([], [], "ow", markeredgecolor="black", label="published pipeline")
    axis.set(xscale="log", yscale="log", title="Ops of mae_kernels with arithmetic, under the roofs of the machine")
    axis.set(xlabel="FLOP per logical byte (each input read once, each output written once)", ylabel="FLOP/s")


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


def say(value, unit: str = "") -> str:
    """In a cell: of a float three digits, or all before the point; "-" of what was not measured."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {say(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return " / ".join(map(say, value))
    if unit == "ms" and value and value < 0.1:
        value, unit = value * 1e3, "µs"
    if isinstance(value, float):
        form = ".0f" if abs(value) >= 100 else "#.3g"
        value = f"{value:.0%}"[:-1] if unit == "%" else f"{value:{form}}".rstrip(".")
    return "-" if value is None else f"{value}{'' if unit == 'x' else ' '}{unit}".strip().replace("|", r"\|")


def main(argv: list[str] | None = None, root: Path = record.ROOT) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail and name what is out of step")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="two result files of one machine")
    parser.add_argument("--anyway", action="store_true", help="compare different devices too")
    options = parser.parse_args(argv)
    if options.compare:
        return compare(*map(Result, options.compare), options.anyway)
    stale, word = update(root, options.check), "out of step:" if options.check else "wrote"
    print("\n".join(f"{word} {name}" for name in stale) or "README.md and docs/results are in step")
    return int(options.check and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
