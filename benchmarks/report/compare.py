"""What got slower or faster between two result files of one machine."""

from benchmarks.report.result import Result, milliseconds, table

LEAST = 0.03  # a change of this share or less is never told
SAME = ("kind", "device", "threads")


def obstacle(old: Result, new: Result) -> str:
    """A sentence that says why the two cannot be compared, or ""."""
    for name in SAME:
        before, after = old.facts.get(name), new.facts.get(name)
        if before != after:
            return f"{name} is {before!r} in {old.stem} and {after!r} in {new.stem}: the code is not all that differs"
    return ""


def compare(old: Result, new: Result) -> tuple[str, bool]:
    """What to print, and whether something got slower."""
    before, after = (_by_key(result) for result in (old, new))
    both = [key for key in before if key in after]
    changes = [(key, change) for key in both if (change := _change(before[key], after[key]))]
    slower = [key for key, change in changes if change > 0]
    lines = [["row", "old", "new", "change"]]
    for key, change in sorted(changes, key=lambda item: -item[1]):
        medians = [milliseconds(rows[key]["median_ms"]) for rows in (before, after)]
        lines.append([_name(key), *medians, f"{change * 100:+.0f} %, {'slower' if change > 0 else 'faster'}"])
    faster = len(changes) - len(slower)
    told = [f"{len(both)} rows in both, {len(slower)} slower, {faster} faster, the others within the noise"]
    if changes:
        told.append(table(lines))
    peers = [key for key in slower if key[3] in ("reference", "compiled")]
    if peers:
        told.append(f"{len(peers)} of the slower rows are of the published pipeline: machine or PyTorch changed too")
    for result, missing in ((old, before.keys() - after.keys()), (new, after.keys() - before.keys())):
        told += [f"only in {result.stem}: {_name(key)}" for key in sorted(missing)]
    return "\n".join(told), bool(slower)


def _name(key: tuple[str, ...]) -> str:
    return ", ".join(filter(None, key))


def _by_key(result: Result) -> dict[tuple[str, ...], dict]:
    return {
        (row["shape"], row["op"], row.get("pass", ""), row.get("contender") or row["backend"], row["dtype"]): row
        for row in result.ops + result.steps
    }


def _change(old: dict, new: dict) -> float | None:
    """Relative, if it exceeds half the spread of both rows together."""
    noise = sum((row.get("p80_ms", 0) - row.get("p20_ms", 0)) / 2 for row in (old, new))
    difference = new["median_ms"] - old["median_ms"]
    change = difference / old["median_ms"]
    return change if abs(difference) > noise and abs(change) > LEAST else None
