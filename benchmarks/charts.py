"""Pictures of a result file, as SVG: how many times as fast each op is, and where it stands under the roofs."""

import io
import textwrap

from benchmarks.result import Result, say


def svg(result: Result, name: str) -> str:
    """One of ``result.pictures``, which shows its conditions too. The same values give the same text."""
    import matplotlib.figure

    with matplotlib.rc_context({"svg.hashsalt": "mae_kernels", "svg.fonttype": "none", "font.size": 9}):
        figure, file = matplotlib.figure.Figure(figsize=(10, 5.6), layout="constrained"), io.StringIO()
        _DRAW[name](axis := figure.subplots(), result)
        unique = {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        axis.legend(unique.values(), unique.keys(), loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
        figure.supxlabel(textwrap.fill(result.setting(result.shown).replace("`", ""), 150), fontsize=8, color="#444444")
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def _draw_speedups(axis, result: Result) -> None:
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


def _draw_roofline(axis, result: Result) -> None:
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


_DRAW = {"speedups": _draw_speedups, "roofline": _draw_roofline}
