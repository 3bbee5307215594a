"""What the kernels should reach on an H200."""

from dataclasses import dataclass
from fnmatch import fnmatch

from benchmarks.report.result import digits, over_compiled, paragraphs, percent, table, times


@dataclass(frozen=True)
class Aim:
    """At least a share of the floor, or at most a time, and at least these speed-ups."""

    published: float
    compiled: float  # over the published pipeline by torch.compile
    of_floor: float | None = None
    us: float | None = None
    shape: str = "*"  # a pattern: the shapes that it is an aim at

    def missed(self, row: dict, compiled_elsewhere: bool) -> list[tuple[str, str]]:
        """Aim and value of each part that the row falls short of, or that was not measured."""
        us, over = row["median_ms"] * 1e3, over_compiled(row)
        least = [(f">= {self.published:g}x the published pipeline", row["speedup"], self.published, times)]
        if self.of_floor:
            least.append((f">= {percent(self.of_floor)} of the floor", row.get("of_floor"), self.of_floor, _exactly))
        if over or not compiled_elsewhere:
            least.append((f">= {self.compiled:g}x it compiled", over, self.compiled, times))
        missed = [(f"<= {self.us:g} µs", f"{digits(us)} µs")] if self.us and us > self.us else []
        return missed + [
            (aim, "not measured" if value is None else say(value))
            for aim, value, enough, say in least
            if value is None or value < enough
        ]


AIMS = {
    "gather_tokens": Aim(of_floor=0.90, published=8, compiled=1.5),
    "scatter_mask_tokens": Aim(of_floor=0.90, published=8, compiled=1.5),
    "masked_mse": Aim(of_floor=0.85, published=10, compiled=2),
    "random_masking": Aim(us=12, published=6, compiled=4, shape="*/16 N=1024"),
    "patch_embed": Aim(of_floor=0.75, published=5, compiled=3),
}


def _exactly(share: float) -> str:
    return f"{digits(share * 100)} %"


def told(rows: list[dict], elsewhere: list[dict]) -> str:
    """How many rows reach their aims, and what the others fall short of.

    Of an op with an aim at one shape the rows are those at that shape, ``elsewhere`` too. Compiling takes minutes: that
    it was done at one of an op's shapes is enough.
    """
    count, short, lines = 0, 0, [["op", "pass", "shape", "aim", "measured"]]
    for op, aim in AIMS.items():
        pool = rows if aim.shape == "*" else elsewhere
        aimed = [row for row in pool if row["op"].split()[0] == op and fnmatch(row["shape"], aim.shape)]
        compiled = any(map(over_compiled, aimed))
        for row in aimed:
            missed = aim.missed(row, compiled)
            short += bool(missed)
            if missed:
                lines.append([row["op"], row["pass"], row["shape"], *map("; ".join, zip(*missed, strict=True))])
        count += len(aimed)
        if not aimed:
            lines.append([op, "", aim.shape.replace("*", "any "), "all", "not measured"])
    sentence = f"Of {count} rows with an aim, set for an H200, {count - short} reach it"
    return paragraphs(f"{sentence}; what falls short:", table(lines)) if len(lines) > 1 else f"{sentence}."
