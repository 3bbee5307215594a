"""One page about a run: its state, curves, pictures, evaluations and options, in a file that needs no other."""

import math
import os
import re
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from mae.checkpoints.saving import write_files
from mae.data.errors import counted
from mae.fields import is_number
from mae.report.classes import predictions
from mae.report.curves import Line, draw, thin
from mae.report.embedding import embedded, is_whole
from mae.report.history import History, read_history
from mae.report.style import STYLE
from mae.report.tables import evaluations, figure, note, read_json, section, text_of
from mae.run_files import CHECKPOINTS, CONFIG, METRICS, RECIPE, RECONSTRUCTIONS, REPORT, RESULTS, predictions_name

_MOST_PICTURES = 6
_WRITTEN = (RECIPE, METRICS, RESULTS, predictions_name("*"))
_OF_CLASSES = ("finetune", "linprobe")  # commands whose loss is not one of pixels
# Nothing may be loaded, even if something that should have been escaped was not.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_report(run: Path) -> Path:
    """Write ``report.html`` into the folder of an evaluation or of a run, which may still be going or lack some files.

    Raises:
        ValueError: the folder holds nothing that a run or an evaluation writes.
        CheckpointError: the page could not be written; an older one is whole.
    """
    if not any(path.is_file() for pattern in _WRITTEN for path in run.glob(pattern)):
        raise ValueError(f"{run} is no folder of a run: it holds neither {', '.join(_WRITTEN[:-1])} nor {_WRITTEN[-1]}")
    page = _page(run)
    write_files(run, {REPORT: lambda path: path.write_text(page, encoding="utf-8")})
    return run / REPORT


def _page(run: Path) -> str:
    recipe, problem = read_json(run / RECIPE, dict)
    options, versions, data = (_part(recipe, name, dict) for name in ("options", "versions", "data"))
    asked = options | _part(recipe, "schedule", dict)  # the steps that epochs come to
    history = read_history(run / METRICS) if (run / METRICS).is_file() else None
    is_evaluation = history is None and not (run / RECIPE).is_file()  # with --out, away from any run
    is_of_classes = options.get("command") in _OF_CLASSES
    begun = f"{options['command']} of {options['checkpoint']}" if {"command", "checkpoint"} <= options.keys() else ""
    model = text_of(options.get("model") or begun or ("an evaluation" if is_evaluation else "model not known"))
    name = text_of(Path(os.path.abspath(run)).name)
    labels = "".join(f"<li>{text_of(label)}</li>" for label in _part(recipe, "labels", list))
    missing = f"{problem} The options, the versions and how many steps were asked for are not known."
    of_run = [
        *section("The run", _facts(run, history, data)),
        *section("Options", options, "" if problem else "The recipe names no options."),
        *section("Versions", versions, "" if problem else "The recipe names no versions."),
    ]
    sections = [
        f"<h1>{name}</h1>",
        f'<p class="model">{model}</p>',
        f'<ul class="labels">{labels}</ul>' if labels else "",
        "" if is_evaluation else f'<p class="state">{text_of(_state(run, history, asked))}</p>',
        note(missing) if problem and not is_evaluation else "",
        *(() if is_evaluation else _curves(history, "cross entropy" if is_of_classes else "squared error")),
        *(_pictures(run) if (run / RECONSTRUCTIONS).is_dir() or not (is_of_classes or is_evaluation) else ()),
        *evaluations(run / RESULTS),
        *predictions(run),
        '<div class="side-by-side">',
        *(() if is_evaluation else of_run),
        *section("Model", *read_json(run / CONFIG, dict)),
        "</div>",
        f"<footer>Written on {_moment(datetime.now(timezone.utc))}.</footer>",
    ]
    head = (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n<title>{name}: {model}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"/>\n<style>{STYLE}</style>\n</head>'
    )
    return "\n".join([head, "<body>", *filter(None, sections), "</body>\n</html>\n"])


def _part(recipe: dict[str, Any], name: str, kind: type) -> Any:
    return recipe[name] if isinstance(recipe.get(name), kind) else kind()


def _state(run: Path, history: History | None, options: dict[str, Any]) -> str:
    """Where the run stands, in one line."""
    if history is None:
        return "There is no metrics.jsonl, so no step is known."
    if not len(history):
        return "No step has been recorded yet."
    step, epoch = history.last("step"), history.last("epoch")
    asked: Any = options.get("steps")
    unit, done = "step", step
    if not _is_amount(asked) and not math.isnan(epoch):
        unit, done, asked = "epoch", epoch, options.get("epochs")
    if not _is_amount(asked):
        state = f"At step {figure(step)}; how many were asked for is not known"
    elif done >= asked * (1 - 1e-9):  # an epoch is a sum of fractions
        state = f"Finished {unit} {figure(done)} of {figure(asked)}"
    else:
        written = datetime.fromtimestamp((run / METRICS).stat().st_mtime, timezone.utc)
        state = f"Stopped or still running at {unit} {figure(done)} of {figure(asked)} (last entry {_moment(written)})"
    words = [state]
    if math.isfinite(loss := history.columns["loss"][-1]):
        words.append(f"last loss {figure(loss)}")
    elif math.isinf(loss):
        words.append("the last loss is not a number")
    if not math.isnan(seconds := history.last("seconds")):
        words.append(f"{_duration(seconds)} of training")
    if len(rates := history.curve("images_per_second")[1]):
        words.append(f"{figure(np.median(rates))} images per second (median)")
    return f"{'; '.join(words)}."


def _is_amount(value: object) -> bool:
    return is_number(value, 0) and value < 1e15


def _curves(history: History | None, loss: str) -> list[str]:
    heading = "<h2>Curves</h2>"
    if history is None:
        return [heading, note("There is no metrics.jsonl, so there are no curves.")]
    notes = map(note, history.problems)
    if not len(history):
        return [heading, *notes, note("There are no curves before the first step.")]
    figures = [
        _curve(history, "Loss", loss, {"loss": "training", "val_loss": "held-out images"}, from_zero=False),
        _curve(history, "Accuracy on held-out pictures", "%", {"val_top1": "top-1"}, factor=100, from_zero=False),
        _curve(history, "Learning rate", "", {"lr": "rate"}),
        _curve(history, "Speed", "images per second", {"images_per_second": "training"}),
        _curve(history, "Waiting for data", "% of the time", {"waiting": "waiting"}, factor=100),
        _curve(history, "Norm of the gradient", "", {"grad_norm": "norm"}),
    ]
    return [heading, *notes, '<div class="side-by-side">', *filter(None, figures), "</div>"]


def _curve(
    history: History, title: str, unit: str, names: dict[str, str], factor: float = 1, from_zero: bool = True
) -> str:
    """A figure of columns of the history by their names in words, or no text where nothing is known of any."""
    lines, said = [], []
    for name, words in names.items():
        steps, values = history.means(name) if name == "loss" else history.curve(name)
        parts = []
        if len(values):
            line, size = thin(Line(words, steps, values * factor))
            lines.append(line)
            entries = history.curve(name)[1]
            low, high, last = (figure(factor * x) for x in (entries.min(), entries.max(), entries[-1]))
            parts.append(f"last {last}, lowest {low}, highest {high}")
            if size > 1:
                parts.append(f"each point is the mean of {size} entries")
        if count := history.unusable(name):
            parts.append(f"{counted(count, 'entry', 'entries')} left out: not a number, or far too large")
        if parts:
            said.append((words, "; ".join(parts)))
    if not said:
        return ""
    keys = dict(zip((line.label for line in lines), ("one", "two"), strict=False))
    caption = "<br/>".join(f'<span class="key {keys.get(words, "none")}">{words}</span>: {x}' for words, x in said)
    picture = ""
    if lines:
        steps = f"steps {figure(lines[0].steps[0])} to {figure(lines[0].steps[-1])}"
        described = "; ".join(f"{words}: {x}" for words, x in said)
        picture = draw(f"{title}, {steps}; {described}", unit, lines, from_zero)
    return f"<figure><h3>{title}</h3>\n{picture}\n<figcaption>{caption}</figcaption></figure>"


def _pictures(run: Path) -> list[str]:
    """The last reconstruction, large, and up to five before it, from the first one on."""
    heading = "<h2>Reconstructions</h2>"
    files = _numbered(run / RECONSTRUCTIONS, r"step-(\d+)\.png")
    whole = [(file, step) for file, step in files if is_whole(file)]
    damaged = len(files) - len(whole)
    notes = [note(f"{counted(damaged, 'picture')} left out: not a whole PNG file.")] if damaged else []
    if not whole:
        return [heading, *notes, note("There are no reconstructions to show.")]
    places = sorted({round(x) for x in np.linspace(0, len(whole) - 1, _MOST_PICTURES)})
    *before, last = [_picture(*whole[i]) for i in places]
    small = ['<div class="pictures">', *(f"<figure>{x}</figure>" for x in before), "</div>"] if before else []
    return [heading, *notes, f'<figure class="large">{last}</figure>', *small]


def _picture(file: Path, step: int) -> str:
    alternative = f"Images as the model sees them, as it completes them, and as they are, at step {step:,}"
    return f"{embedded(file, alternative)}<figcaption>Step {step:,}</figcaption>"


def _numbered(folder: Path, pattern: str) -> list[tuple[Path, int]]:
    """What lies in a folder under names with a step, by that step."""
    paths = folder.iterdir() if folder.is_dir() else ()
    found = [(path, int(name[1])) for path in paths if (name := re.fullmatch(pattern, path.name))]
    return sorted(found, key=lambda each: each[1])


def _facts(run: Path, history: History | None, data: dict[str, Any]) -> dict[str, str]:
    facts = {f"{name} of the data": value for name, value in data.items()}
    if history is not None and len(history):
        facts["epochs"] = figure(history.last("epoch"))
        skipped = history.last("skipped")
        facts["skipped updates"] = figure(0.0 if math.isnan(skipped) else skipped)  # said where there are any
        memory, waiting = (history.curve(name)[1] for name in ("memory_mb", "waiting"))
        facts["most memory"] = f"{figure(memory.max())} MB" if len(memory) else figure(math.nan)
        facts["time waiting for data"] = f"{figure(100 * waiting.mean())} %" if len(waiting) else figure(math.nan)
    steps = [step for path, step in _numbered(run / CHECKPOINTS, r"step-(\d+)") if path.is_dir()]
    span = f", step {steps[0]:,} to step {steps[-1]:,}" if len(steps) > 1 else f", step {steps[0]:,}" if steps else ""
    return facts | {"checkpoints": f"{len(steps) or 'none'}{span}"}


def _duration(seconds: float) -> str:
    for size, unit in ((3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return counted(round(seconds), "second")


def _moment(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d at %H:%M} UTC"
