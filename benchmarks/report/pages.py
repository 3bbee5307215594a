"""The page and the pictures of a result file."""

from benchmarks.report import aims
from benchmarks.report.plots import Bars, Picture, Point, Roofline
from benchmarks.report.result import Result, digits, paragraphs, rounds, setting, table

UNITS = {"copy_gb_per_s": "GB/s", "tflops": "TFLOP/s", "launch_us": "µs", "linear_host_us": "µs", "kernel_us": "µs"}


def page(result: Result) -> str:
    """Conditions, ceilings, pictures and every row of a file."""
    raw = f"{result.stem}.json"
    conditions = {k: v for k, v in result.facts.items() if k not in ("ceilings", "rows", "steps")}
    ceilings = [["ceiling", "value"]]
    for name, value in result.ceilings.items():
        several = value.items() if isinstance(value, dict) else [("", value)]
        for kind, rate in several:
            rates = " / ".join(digits(x) for x in (rate if isinstance(rate, list) else [rate]))
            ceilings.append([f"{name.replace('_', ' ')} {kind}".strip(), f"{rates} {UNITS.get(name, '')}".strip()])
    checks = [["check", "outcome", "last line"]]
    for step in result.facts.get("steps", ()):
        checks.append([step["step"], "passed" if step["passed"] else "**failed**", str(step.get("last_line", ""))])
    parts = [
        f"# {result.stem}",
        f"Written by `python -m benchmarks.report` from [{raw}](../../benchmarks/results/{raw}).",
        table([["condition", "value"], *([name.replace("_", " "), str(v)] for name, v in conditions.items())]),
    ]
    if result.ceilings:
        parts += ["## Ceilings of the same run", table(ceilings)]
    if len(checks) > 1:
        parts += ["## Checks of the same run", table(checks)]
    parts += [f"![{name} of the ops]({result.stem}-{name}.svg)" for name in pictures(result)]
    if result.kind == "gpu" and result.own:
        parts += ["## Aims", aims.told(result.own, result.own)]
    sorts = {"Ops": result.ops, "The whole step": result.steps, "What a call costs the host": result.hosts}
    for title, rows in sorts.items():
        if rows:
            parts += [f"## {title}", table(_every_value(rows, conditions))]
    return paragraphs(*parts) + "\n"


def pictures(result: Result) -> dict[str, Picture]:
    rows = result.shown
    if not rows:
        return {}
    twice = {row["op"] for row in rows if row["pass"] != "forward"}
    labels = [f"{row['op']}, {row['pass']}" if row["op"] in twice else row["op"] for row in rows]
    caption = f"{setting(rows)}; {result.conditions}; {rounds(rows)}".replace("`", "")
    compiled = [row["reference_ms"] / row["compiled_ms"] if row.get("compiled_ms") else None for row in rows]
    title = "Ops of mae_kernels against the published pipeline"
    found: dict[str, Picture] = {"speedups": Bars(title, caption, labels, [r["speedup"] for r in rows], compiled)}
    computing = [row for row in rows if row["flops"]]
    if computing and result.ceilings.get("tflops"):
        others = ", ".join(dict.fromkeys(row["op"] for row in rows if not row["flops"]))
        found["roofline"] = Roofline(
            "Ops of mae_kernels under the roofs of the machine",
            caption + (f"; without arithmetic, so not in the picture: {others}" if others else ""),
            [Point(*(row[k] for k in ("op", "pass", "flops", "logical_bytes", "median_ms", "reference_ms")))
             for row in computing],
            result.ceilings["copy_gb_per_s"],
            result.ceilings["tflops"],
        )  # fmt: skip
    return found


def _every_value(rows: list[dict], conditions: dict) -> list[list[str]]:
    """A line for each row; what the whole file has in common is not repeated."""
    names = dict.fromkeys(name for row in rows for name in row if name not in conditions)
    lines = [[name.replace("_", " ") for name in names]]
    for row in rows:
        values = [row.get(name) for name in names]
        lines.append(["" if v is None else digits(v) if isinstance(v, float) else str(v) for v in values])
    return lines
