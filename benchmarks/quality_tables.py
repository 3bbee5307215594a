"""The tables of what the features are worth, from the rows of :mod:`benchmarks.quality`."""

from collections.abc import Callable, Iterable
from statistics import mean

Measure = Callable[[list[float]], float]

_WAYS = {  # as a row calls them: as a table does
    "raw pixels, linear": "raw pixels, linear",
    "raw pixels, kNN": "raw pixels, kNN",
    "untrained encoder, linear": "untrained encoder, linear",
    "untrained encoder, kNN": "untrained encoder, kNN",
    "pre-trained encoder, linear": "MAE, linear",
    "pre-trained encoder, kNN": "MAE, kNN",
    "pre-trained encoder, fine-tuned": "MAE, fine-tuned",
    "the same network from scratch": "the same network from scratch",
}
# Table 2 of He et al. 2021: hours with mask tokens in the encoder over hours without, for 8 and 1 decoder blocks.
_PUBLISHED = {"ViT-L": {8: 2.8, 1: 3.7}, "ViT-H": {8: 3.5, 1: 4.1}}


def tables(rows: list[dict], conditions: str, raw_file: str) -> list:
    """Paragraphs and tables, for the parts that there are."""
    parts = {name: [row for row in rows if row["part"] == name] for name in dict.fromkeys(row["part"] for row in rows)}
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    minutes, seeds = sum(row["cpu_s"] for row in rows) / 60, sorted({row["seed"] for row in rows if "seed" in row})
    result = [
        f"""Top-1 in %, mean of seeds {", ".join(map(str, seeds))}, in brackets the lowest and the highest of them;
        {minutes:.0f} CPU-minutes in all; {conditions}, rows of commits {commits} ([raw file]({raw_file}))."""
    ]
    if of_labels := parts.get("labels"):
        result += [
            """Fashion-MNIST, 2000 pictures to test. The MAE has 0.5 M parameters and was pre-trained on 5000 pictures
            without a label, for some three minutes of one core; labels of a class:""",
            _by_labels(of_labels),
            _who_wins(of_labels),
        ]
    if of_photographs := parts.get("photographs"):
        result += [
            """Eight photographs, colour, 64 x 64 pixels: from which one is a crop? Crops to test are of another part of
            it. So few pictures say nothing of objects, and 300 steps are a short pre-training; labels of a
            photograph:""",
            _by_labels(of_photographs),
            _who_wins(of_photographs),
        ]
    if of_ablations := parts.get("ablations"):
        steps = of_ablations[0]["steps"]
        result += [
            f"""One thing changed at a time, after {steps:.0f} steps of 128 pictures, probed with 500 labels of a
            class. The images have 16 patches, so that this says little of large ones:""",
            _ablations(of_ablations),
        ]
    if of_tokens := parts.get("mask tokens"):
        result += [
            """Table 2 of the paper on this machine, forward and backward, float32: how many times as long an image
            takes with mask tokens in the encoder and 8 decoder blocks as without, and the same of FLOPs:""",
            _mask_tokens(of_tokens),
        ]
    return result


def _said(values: Iterable[float]) -> str:
    shares = [100 * x for x in values]
    spread = f" ({min(shares):.1f} to {max(shares):.1f})" if len(set(shares)) > 1 else ""
    return f"{mean(shares):.1f}{spread}"


def _columns(rows: list[dict]) -> dict[int, list[dict]]:
    return {
        count: [row for row in rows if row["labels"] == count] for count in dict.fromkeys(r["labels"] for r in rows)
    }


def _by_labels(rows: list[dict]) -> list[list[str]]:
    """A line for each way to use the labels; the best of a column is bold."""
    columns = _columns(rows)
    best = {count: max(_WAYS, key=lambda way: mean(r[way] for r in of)) for count, of in columns.items()}
    lines = [["", *map(str, columns)]]
    for way, name in _WAYS.items():
        cells = [_said(row[way] for row in of) for of in columns.values()]
        lines.append(
            [name, *(f"**{x}**" if best[count] == way else x for count, x in zip(columns, cells, strict=True))]
        )
    return lines


def _who_wins(rows: list[dict]) -> str:
    """Where pre-training is ahead, and where the same network from scratch or raw pixels are."""
    tuned, scratch = "pre-trained encoder, fine-tuned", "the same network from scratch"
    frozen, pixels = "pre-trained encoder, linear", "raw pixels, linear"
    columns = _columns(rows)
    margins = [f"{100 * (mean(r[tuned] for r in of) - mean(r[scratch] for r in of)):+.1f}" for of in columns.values()]

    def counts(one: str, other: str, of_one: Measure = mean, of_other: Measure = mean) -> str:
        found = [n for n, of in columns.items() if of_one([r[one] for r in of]) > of_other([r[other] for r in of])]
        return (
            f"with {', '.join(map(str, found))} labels of a class" if found else "with none of these numbers of labels"
        )

    return f"""Fine-tuned, the MAE differs from the same network from scratch by {", ".join(margins)} points. Its worst
    seed is ahead of the other's best {counts(tuned, scratch, min, max)}, and its best seed behind the other's worst
    {counts(scratch, tuned, min, max)}. Read linearly, frozen features of the MAE are better than raw pixels on average
    {counts(frozen, pixels)}, and worse {counts(pixels, frozen)}."""


def _ablations(rows: list[dict]) -> list[list[str]]:
    lines = [["pre-training", "linear", "kNN", "steps", "CPU-seconds"]]
    for case in dict.fromkeys(row["case"] for row in rows):
        of = [row for row in rows if row["case"] == case]
        steps, took = mean(row["steps"] for row in of), mean(row["training_cpu_s"] for row in of)
        lines.append(
            [case, *(_said(row[how] for row in of) for how in ("linear", "kNN")), f"{steps:.0f}", f"{took:.0f}"]
        )
    return lines


def _mask_tokens(rows: list[dict]) -> list[list[str]]:
    lines = [["encoder", "decoder blocks without", "time", "FLOPs", "published, hours"]]
    return lines + [
        [row["case"], str(depth), f"{row[f'ratio, {depth}']:.1f}x", f"{row[f'FLOPs, {depth}']:.1f}x",
         f"{_PUBLISHED[row['case']][depth]:.1f}x"]
        for row in rows for depth in (8, 1)
    ]  # fmt: skip
