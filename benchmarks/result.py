"""A result file as the tables and pictures read it, and how a value is told."""

import re
from pathlib import Path

from benchmarks import record

# The cases of the tables and of the pictures, in dtypes that people train in there. docs/results has every case.
SHOWN = {
    "cpu": ("random_resized_crop", "random_masking", "patch_embed float32", "patch_embed uint8", "gather_tokens",
            "scatter_mask_tokens", "masked_mse masked-only", "masked_mse full", "linear_masked_mse float32",
            "linear_masked_mse bfloat16"),
    "gpu": ("random_resized_crop", "random_masking", "patch_embed float32", "patch_embed uint8 bfloat16",
            "gather_tokens", "gather_tokens bfloat16", "scatter_mask_tokens", "scatter_mask_tokens bfloat16",
            "masked_mse masked-only", "masked_mse uint8 bfloat16", "linear_masked_mse bfloat16"),
}  # fmt: skip


class Result:
    """A result file and its rows by what they measure; ``own`` are ops of the back-end that a user gets there."""

    def __init__(self, path: Path):
        self.path, self.stem, self.facts = path, path.stem, record.read(path)
        self.kind, rows, ceilings = self.facts.get("kind"), self.facts["rows"], self.facts["ceilings"]
        self.ops = [row for row in rows if "backend" in row and "median_ms" in row]
        self.steps = [row for row in rows if "contender" in row]
        of_images = [row for row in self.steps if not is_video(row)]
        self.compared = [row for row in of_images if row["contender"].startswith("(a)")] and of_images
        shapes = [row["shape"] for row in self.compared]
        self.main_shape = next((shape for shape in shapes if shape.startswith("ViT-B")), shapes[-1] if shapes else "")
        self.hosts = [row for row in rows if "host_us" in row and "median_ms" not in row]
        back_end = {"gpu": "triton"}.get(self.kind, "eager")
        self.own = [row for row in self.ops if row["backend"] == back_end and "speedup" in row]
        shown = [row for row in self.own if row["op"] in SHOWN.get(self.kind, ()) and row["pass"] != "backward"]
        embedded = [row for row in shown if is_video(row) and row["op"].startswith("patch_embed")]
        self.video = embedded + self._eager_steps_on_video()
        shown = [row for row in shown if not is_video(row)]
        # The tables show the shape that most of them were measured and compiled at.
        shapes = [row["shape"] for row in shown for _ in range(2 if row.get("compiled_ms") else 1)]
        self.shown = [row for row in shown if row["shape"] == max(shapes, key=shapes.count)]
        self.pictures = ["speedups"] if self.shown else []
        if ceilings.get("tflops") and any(row["flops"] for row in self.shown):
            self.pictures.append("roofline")

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
