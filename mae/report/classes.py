"""What an evaluation took pictures for: accuracy by class, confusions and the worst mistakes, as sections of a page."""

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mae.data.errors import counted
from mae.report.embedding import embedded, is_whole
from mae.report.tables import abbreviated, note, text_of
from mae.run_files import mistakes_name, predictions_name

FIELDS = ["file", "label", "predicted", "confidence", "rank"]
_MANY = 20  # classes, from which on a matrix is no longer looked at as a whole
_MOST_OPEN, _MOST_SHOWN = 50, 1000  # rows of a table, and those that are unfolded with it
_TOP5_FROM = 10  # classes; among fewer ones it says little
_HEADER_LETTERS = 18


@dataclass(frozen=True)
class Predictions:
    """Pictures counted by what they show and what they were taken for."""

    counts: Counter[tuple[str, str]]  # of (label, predicted)
    top5: int  # pictures whose label is among the five most probable classes
    problems: tuple[str, ...]  # sentences about the file


def read_predictions(file: Path) -> Predictions:
    """Lines that cannot be read are counted and left out."""
    nothing = Counter(), 0
    try:
        text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError:
        return Predictions(*nothing, (f"{file.name} cannot be read.",))
    whole, end, torn = text.rpartition("\n")
    rows = _rows(whole + end)
    if next(rows, None) != (FIELDS, 1):
        return Predictions(*nothing, (f"{file.name} does not begin with a line {','.join(FIELDS)}.",))
    counts, top5 = nothing
    unreadable = contradicting = 0
    for row, lines in rows:
        prediction = _prediction(row)
        if prediction is None:
            unreadable += lines if row else 0  # an empty line holds nothing to be missed
            continue
        label, predicted, rank = prediction
        counts[label, predicted] += 1
        top5 += rank < 5
        contradicting += (rank == 0) != (label == predicted)
    problems = []
    if torn.strip():  # its rank may have had more digits
        problems.append(f"The last line of {file.name} is cut off, as when a command is killed; it is left out.")
    if unreadable:
        problems.append(f"Left out of {file.name}: {counted(unreadable, 'line')} that cannot be read.")
    if contradicting:
        problems.append(
            f"In {file.name} the rank contradicts the names in {counted(contradicting, 'line')}; the names count."
        )
    return Predictions(counts, top5, tuple(problems))


def _rows(text: str) -> Iterator[tuple[list[str], int]]:
    """Rows, and how many lines each takes: a quoted name may hold newlines."""
    reader, before = csv.reader(io.StringIO(text)), 0
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error:  # such as a quote that is never closed
            row = ["unreadable"]
        yield row, reader.line_num - before
        before = reader.line_num


def _prediction(row: list[str]) -> tuple[str, str, int] | None:
    """Label, predicted and rank."""
    try:
        _, label, predicted, confidence, rank = row
        is_sound = 0 <= float(confidence) <= 1.001 and int(rank) >= 0  # a sum of rounded shares may exceed 1
    except ValueError:
        return None
    return (label, predicted, int(rank)) if is_sound else None


def predictions(run: Path) -> list[str]:
    """A section of the page for each command that has left predictions in the folder."""
    start, end = predictions_name("*").split("*")
    files = sorted(file for file in run.glob(predictions_name("*")) if file.is_file())
    return [part for file in files for part in _section(file, file.name[len(start) : -len(end)])]


def _section(file: Path, command: str) -> list[str]:
    found = read_predictions(file)
    parts = [f"<section><h2>Predictions of {text_of(command)}</h2>", *map(note, found.problems)]
    if found.counts:
        pictures = found.counts.total()
        names = {name for pair in found.counts for name in pair}
        right = sum(count for (label, predicted), count in found.counts.items() if label == predicted)
        top5 = f", top-5 {_percent(found.top5 / pictures)}" if len(names) >= _TOP5_FROM else ""
        of = f"pictures: {pictures:,}; classes: {len(names):,}"
        parts.append(f'<p class="state">Top-1 {_percent(right / pictures)}{top5}; {of}.</p>')
        parts += _accuracies(found.counts)
        parts += _matrix(found.counts, sorted(names, key=_order)) if len(names) <= _MANY else _list(found.counts)
        parts += _mistakes(file.with_name(mistakes_name(command)))
    else:
        parts.append(note(f"{file.name} holds no predictions."))
    return [*parts, "</section>"]


def _accuracies(counts: Counter[Any]) -> list[str]:
    """Classes from the worst on; of very many the worst stand open and others unfold."""
    pictures, right, others = Counter(), Counter(), {}
    for (label, predicted), count in counts.items():
        pictures[label] += count
        if label == predicted:
            right[label] = count
        else:
            others.setdefault(label, []).append((-count, _order(predicted), predicted))
    labels = sorted(pictures, key=lambda x: (right[x] / pictures[x], -pictures[x], _order(x)))
    rows = []
    for label in labels[:_MOST_SHOWN]:
        share = right[label] / pictures[label]
        bar = f'<span class="bar"><span style="width:{100 * share:.1f}%"></span></span>'
        taken = ""
        if label in others:
            count, _, predicted = min(others[label])
            taken = f"{text_of(predicted)} ({counted(-count, 'time')})"
        rows.append([text_of(label), f"{pictures[label]:,}", f"{bar}{_percent(share)}", taken])
    columns = ["class", "pictures", "right", "most often taken for"]
    is_open = len(labels) <= _MOST_OPEN
    first = len(labels) if is_open else _MANY
    title = "A row for each class, from the worst on." if is_open else f"The {_MANY} worst of {len(labels):,} classes."
    parts = ["<h3>Accuracy of each class</h3>", *_table(title, columns, rows[:first])]
    if not is_open:
        rest = "The others" if len(rows) == len(labels) else f"The next ones, up to {_MOST_SHOWN:,} classes"
        rest = f"{rest}, from the worst on."
        parts += [f"<details><summary>{rest}</summary>", *_table(rest, columns, rows[first:]), "</details>"]
    return parts


def _matrix(counts: Counter[Any], names: list[str]) -> list[str]:
    """Counts of true class by predicted class, coloured by their share of the row."""
    caption = (
        "Rows are what the pictures show, columns what they were taken for. A cell counts pictures; the stronger its "
        "colour, the larger its share of the row."
    )
    head = "".join(f'<th scope="col"><span>{_head(name)}</span></th>' for name in names)
    rows = []
    for label in names:
        total = sum(counts[label, predicted] for predicted in names)
        cells = "".join(_cell(counts[label, name], total, label == name) for name in names)
        rows.append(f'<tr><th scope="row">{_head(label)}</th>{cells}</tr>')
    return [
        f'<h3>Confusions</h3><div class="wide"><table class="matrix"><caption><span>{caption}</span></caption>',
        f'<thead><tr><td class="corner">shown ↓ taken for →</td>{head}</tr></thead><tbody>',
        *rows,
        "</tbody></table></div>",
    ]


def _head(name: str) -> str:
    return text_of(abbreviated(name, _HEADER_LETTERS))


def _cell(count: int, total: int, is_right: bool) -> str:
    if not count:
        return '<td class="zero">0</td>'
    heat = math.sqrt(count / total)  # so that a few per cent are seen
    return f'<td class="{"right" if is_right else "wrong"}" style="--heat:{heat:.2f}">{count:,}</td>'


def _list(counts: Counter[Any]) -> list[str]:
    """The most frequent confusions, where a matrix would be too large."""
    pictures = Counter()
    for (label, _), count in counts.items():
        pictures[label] += count
    wrong = [(-count, _order(x), _order(y), x, y) for (x, y), count in counts.items() if x != y]
    rows = [
        [text_of(label), text_of(predicted), f"{-count:,}", _percent(-count / pictures[label])]
        for count, *_, label, predicted in sorted(wrong)[:_MANY]
    ]
    if not rows:
        return ["<h3>Confusions</h3>", note("No picture was taken for another class.")]
    title = f"The {_MANY} most frequent ones of {len(wrong):,}." if len(wrong) > _MANY else "All of them."
    title = f"{title} A row for each true class and the class that it was taken for."
    return ["<h3>Confusions</h3>", *_table(title, ["class", "taken for", "times", "share of the class"], rows)]


def _mistakes(file: Path) -> list[str]:
    if not file.is_file():
        return []
    if not is_whole(file):
        return [note(f"{file.name} left out: not a whole PNG file.")]
    image = embedded(file, "Pictures that were taken for another class, with both names and the confidence")
    caption = "<figcaption>What it was wrong about, the most confident mistakes first.</figcaption>"
    return [f"<h3>Worst mistakes</h3><figure>{image}{caption}</figure>"]


def _table(title: str, columns: list[str], rows: list[list[str]]) -> list[str]:
    """Of cells that are escaped; the first of a row names it."""
    head = "".join(f'<th scope="col">{column}</th>' for column in columns)
    start = f'<div class="wide"><table class="classes"><caption>{title}</caption><thead><tr>{head}</tr></thead><tbody>'
    body = (f'<tr><th scope="row">{name}</th>{"".join(map(_td, cells))}</tr>' for name, *cells in rows)
    return [start, *body, "</tbody></table></div>"]


def _td(cell: str) -> str:
    return f"<td>{cell}</td>"


def _order(name: str) -> str:
    """By which 2 comes before 10."""
    return re.sub(r"\d+", lambda digits: digits[0].zfill(20), name)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
