"""Tables and texts of a page, escaped: names and values of a run may hold anything."""

import html
import json
import math
from pathlib import Path
from typing import Any

from mae.data.errors import counted, printable
from mae.fields import is_number

_MOST_LETTERS = 300  # in a cell


def read_json(file: Path, kind: type) -> tuple[Any, str]:
    """The JSON of a file, and why there is none of that kind: then it is empty."""
    if not file.is_file():
        return kind(), f"There is no {file.name}."
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return kind(), f"{file.name} cannot be read."
    return (found, "") if isinstance(found, kind) else (kind(), f"{file.name} does not hold what it should.")


def text_of(value: object) -> str:
    """A value as text of the page: names may hold anything, and a cell is no place for a file."""
    text = value if isinstance(value, str) else "none" if value is None else json.dumps(value, ensure_ascii=False)
    text = printable(text[: _MOST_LETTERS + 1])
    return html.escape(text if len(text) <= _MOST_LETTERS else f"{text[:_MOST_LETTERS]}…")


def abbreviated(name: str, most: int) -> str:
    """A name in visible characters and not many of them, not escaped: many names differ in their end alone."""
    name = printable(name)
    return name if len(name) <= most else f"{name[: most // 2]}…{name[-(most - most // 2) + 1 :]}"


def note(sentence: str) -> str:
    return f'<p class="note">{text_of(sentence)}</p>'


def figure(value: float) -> str:
    """A number as one reads it."""
    if math.isnan(value):
        return "not recorded"
    is_long = abs(value) >= 1e15 or (abs(value) < 1e4 and value != round(value))
    return f"{value:,.4g}" if is_long else f"{value:,.0f}"


def section(title: str, values: dict[str, Any], problem: str = "") -> list[str]:
    """A table of names and values, or why there is none."""
    heading = f"<section><h2>{title}</h2>"
    if not values:
        return [heading, note(problem or "Not known."), "</section>"]
    rows = (f'<tr><th scope="row">{text_of(name)}</th><td>{text_of(value)}</td></tr>' for name, value in values.items())
    return [heading, "<table><tbody>", *rows, "</tbody></table></section>"]


def evaluations(file: Path) -> list[str]:
    """A table of results with a line for each kind of features, and a column for each measure, such as top1."""
    heading = "<h2>Evaluations</h2>"
    found, problem = read_json(file, list)
    results = [entry for entry in found if isinstance(entry, dict)]
    if not results:
        return [heading, note(f"{problem} No evaluation is known.".strip())]
    left_out = len(found) - len(results)
    notes = [note(f"{counted(left_out, 'result')} left out: not of a known form.")] if left_out else []
    measures = list(dict.fromkeys(name for entry in results for name in _measures(entry)))
    columns = ["evaluation", "features", *measures, "conditions"]
    head = "".join(f'<th scope="col">{text_of(column)}</th>' for column in columns)
    rows = [row for entry in results for row in _rows(entry, measures)]
    start = f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>'
    return [heading, *notes, start, *rows, "</tbody></table></div>"]


def _rows(entry: dict[str, Any], measures: list[str]) -> list[str]:
    """Of one evaluation, whose name and conditions stand beside all its kinds of features."""
    measured = _measures(entry)
    kinds = list(dict.fromkeys(kind for values in measured.values() for kind in values)) or [""]
    rows = []
    for kind in kinds:
        shares = (_share(measured.get(measure, {}).get(kind)) for measure in measures)
        rows.append(f"<td>{text_of(kind)}</td>" + "".join(f'<td class="number">{share}</td>' for share in shares))
    others = {name: value for name, value in entry.items() if name != "command" and name not in measured}
    conditions = "; ".join(f"{text_of(name)}: {text_of(value)}" for name, value in others.items())
    tall = f'rowspan="{len(kinds)}"'
    rows[0] = f"<td {tall}>{text_of(entry.get('command', ''))}</td>{rows[0]}<td {tall}>{conditions}</td>"
    return [f"<tr>{row}</tr>" for row in rows]


def _measures(entry: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Shares by kind of features; a share alone is of no kind."""
    found = {name: value for name, value in entry.items() if name.startswith("top")}
    return {name: value if isinstance(value, dict) else {"": value} for name, value in found.items()}


def _share(value: object) -> str:
    if value is None:
        return ""
    return f"{100 * value:.1f} %" if is_number(value) else text_of(value)
