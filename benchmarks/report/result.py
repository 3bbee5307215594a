"""Result files with speeds as the report reads them, and how it writes what is in them."""

import re
import textwrap
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from benchmarks import record

# The cases of README's tables and of the pictures, in dtypes that people train in there. The pages have every case.
SHOWN = {
    "cpu": [
        "random_resized_crop",
        "random_masking",
        "patch_embed float32",
        "patch_embed uint8",
        "gather_tokens",
        "scatter_mask_tokens",
        "masked_mse masked-only",
        "masked_mse full",
        "linear_masked_mse float32",
        "linear_masked_mse bfloat16",
    ],
    "gpu": [
        "random_resized_crop",
        "random_masking",
        "patch_embed float32",
        "patch_embed uint8 bfloat16",
        "gather_tokens",
        "gather_tokens bfloat16",
        "scatter_mask_tokens",
        "scatter_mask_tokens bfloat16",
        "masked_mse masked-only",
        "masked_mse uint8 bfloat16",
        "linear_masked_mse bfloat16",
    ],
}


@dataclass(frozen=True)
class Result:
    stem: str
    facts: dict

    @property
    def kind(self) -> str:
        return self.facts["kind"]

    @property
    def ceilings(self) -> dict:
        return self.facts.get("ceilings") or {}

    @cached_property
    def ops(self) -> list[dict]:
        return [row for row in self.facts["rows"] if "backend" in row and "median_ms" in row]

    @cached_property
    def steps(self) -> list[dict]:
        return [row for row in self.facts["rows"] if "contender" in row]

    @cached_property
    def hosts(self) -> list[dict]:
        return [row for row in self.facts["rows"] if "host_us" in row and "median_ms" not in row]

    @cached_property
    def own(self) -> list[dict]:
        """Rows of the back-end that ``"auto"`` takes on this kind of machine."""
        backend = "triton" if self.kind == "gpu" else "eager"
        return [row for row in self.ops if row["backend"] == backend and row.get("speedup")]

    @cached_property
    def shown(self) -> list[dict]:
        """Those of README, at the shape that most of them were measured and compiled at."""
        rows = [row for row in self.own if row["op"] in SHOWN.get(self.kind, ()) and row["pass"] != "backward"]
        shapes = [row["shape"] for row in rows for _ in range(2 if row.get("compiled_ms") else 1)]
        return [row for row in rows if row["shape"] == max(shapes, key=shapes.count)]

    @property
    def conditions(self) -> str:
        facts, on_cpu = self.facts, self.kind == "cpu"
        load = facts.get("load", "unknown")
        parts = [
            re.sub(r"\((R|TM)\)", "", facts["device"]),
            f"{facts['threads']} threads" if on_cpu else "",
            f"load {load} before the run" if on_cpu and load != "unknown" else "",
            f"driver {facts['driver']}" if "driver" in facts else "",
            f"torch {facts['torch']}",
            f"triton {facts.get('triton', 'unknown')}" if self.kind == "gpu" else "",
            facts["date"],
            f"commit {facts['commit']}" + (" with uncommitted changes" if facts.get("uncommitted_changes") else ""),
            f"`{facts['command']}`",
        ]
        return ", ".join(filter(None, parts))


def results(root: Path) -> list[Result]:
    """The oldest first. What Triton's interpreter made holds no speed: it is left out here, and so everywhere."""
    read = [Result(path.stem, record.read(path)) for path in (root / "benchmarks" / "results").glob("*.json")]
    return sorted(
        (result for result in read if result.facts.get("kind") in ("cpu", "gpu", "demo")),
        key=lambda result: (result.facts["date"], result.stem),
    )


def newest(found: list[Result], kind: str, rows: str = "facts") -> Result | None:
    """The result of that kind with the latest date, of several the last by name, among those that have such rows."""
    return next((result for result in reversed(found) if result.kind == kind and getattr(result, rows)), None)


def over_compiled(row: dict) -> float | None:
    """Speed-up over what torch.compile makes of the published pipeline."""
    return row["compiled_ms"] / row["median_ms"] if row.get("compiled_ms") else None


def setting(rows: list[dict]) -> str:
    model, _, batch = rows[0]["shape"].partition(" N=")
    return f"{model}, {batch} images, 75 % masked, float32 unless a row says otherwise"


def rounds(rows: list[dict]) -> str:
    counts = sorted({row["rounds"] for row in rows})
    return f"medians of {' to '.join(map(str, counts[:: max(1, len(counts) - 1)]))} interleaved rounds"


def digits(value: float) -> str:
    """Three of them, or all before the point."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")


def milliseconds(value: float | None) -> str:
    if not value:
        return "-"
    return f"{digits(value)} ms" if value >= 0.1 else f"{digits(value * 1e3)} µs"


def times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x" if value < 10 else f"{value:.1f}x"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value * 100:.0f} %"


def peak(row: dict) -> str:
    before, after = ("-" if row.get(k) is None else digits(row[k]) for k in ("reference_peak_mib", "peak_mib"))
    return f"{before} -> {after} MiB"


def prose(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def table(lines: list[list[str]]) -> str:
    """In Markdown, the first line its header."""
    header, *rest = lines
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rest])


def paragraphs(*parts: str) -> str:
    return "\n\n".join(filter(None, parts))
