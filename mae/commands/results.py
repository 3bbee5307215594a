"""Where the results of an evaluation go: results.json, a table of predictions, the worst mistakes, the report."""

import csv
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mae.checkpoints.saving import write_files, write_json
from mae.data import DataWarning, Labelled, Reading, printable, read_pictures
from mae.data.sources import Part
from mae.evaluation.predictions import Predictions, measures
from mae.report.figures import MOST_MISTAKES, save_mistakes
from mae.report.page import write_report
from mae.run_files import REPORT, RESULTS, mistakes_name, predictions_name
from mae.training.run import refuse_file

_WIDTH = 32  # characters of a name in a table


class Table:
    """Accuracies, printed line by line in percent: top-1, and top-5 from ten classes on."""

    def __init__(self, classes: int, labels: np.ndarray, first: str = "features") -> None:
        self.measures, self.accuracies = measures(classes), {}
        print(f"  {first:<{_WIDTH}}" + "".join(f"{f'top-{k}':>9}" for k in self.measures))
        self._line("largest class alone", {"top1": float(np.bincount(labels).max() / len(labels))})

    def add(self, name: str, predictions: Predictions) -> None:
        self._line(name, {f"top{k}": predictions.top(k) for k in self.measures})

    def _line(self, name: str, values: dict[str, float]) -> None:
        print(f"  {name:<{_WIDTH}}" + "".join(f"{x:>9.1%}" for x in values.values()), flush=True)
        for measure, x in values.items():
            self.accuracies.setdefault(measure, {})[name] = x


@dataclass(frozen=True)
class Results:
    """The results of a command in a folder, which is made if it is not there; None keeps none.

    Raises:
        RunError: there can be no such folder.
        ValueError: what its results.json holds is no list.
    """

    command: str
    folder: Path | None

    def __post_init__(self) -> None:
        self._earlier()  # what cannot be written is better known before minutes of work

    def _earlier(self) -> list[dict[str, Any]]:
        if self.folder is None:
            return []
        refuse_file(self.folder)
        file = self.folder / RESULTS
        try:
            found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
        except ValueError:
            found = None
        if not isinstance(found, list):
            raise ValueError(f"{file} is no list of results; give another --out")
        return found

    def write(
        self, table: Table, predictions: Predictions, test: Labelled, reading: Reading, conditions: dict[str, Any]
    ) -> None:
        """Add the accuracies to what is there, equal ones once, and put what was predicted beside them."""
        if self.folder is None:
            print("Nothing is kept; with --out FOLDER there are results, predictions and a report")
            return
        counts = {"test_images": len(predictions.numbers), "classes": len(test.classes)}
        entry = {"command": self.command, **conditions, **counts, **table.accuracies}
        writers = {
            predictions_name(self.command): lambda path: _write_table(path, predictions, test),
            mistakes_name(self.command): lambda path: _draw_mistakes(path, predictions, test, reading),
        }
        write_files(self.folder, writers)
        write_json(self.folder, {RESULTS: [*(x for x in self._earlier() if x != entry), entry]})
        write_report(self.folder)
        results, report = (printable(self.folder / name) for name in (RESULTS, REPORT))
        print(f"The results are in {results}; {report} shows which class is taken for which")


def _write_table(path: Path, predictions: Predictions, test: Labelled) -> None:
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "label", "predicted", "confidence", "rank"])
        for number, label, predicted, confidence, rank, _ in zip(*predictions, strict=True):
            names = test.source.name(int(number)), test.classes[label], test.classes[predicted]
            rows.writerow([*names, f"{confidence:.4f}", rank])


def _draw_mistakes(path: Path, predictions: Predictions, test: Labelled, reading: Reading) -> None:
    worst = predictions.mistakes()[:MOST_MISTAKES]
    worst = worst[np.argsort(predictions.numbers[worst])]  # the numbers of a part of a source rise
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)  # said when they were tested
        shown = Part(test.source, predictions.numbers[worst].tolist())
        read = [*read_pictures(shown, reading)] if len(worst) else []
    pictures = torch.zeros(0, reading.channels, *reading.image_size, dtype=torch.uint8)
    pictures = torch.stack([picture for picture, _ in read]) if read else pictures
    captions = [
        (test.classes[predictions.labels[i]], test.classes[predictions.predicted[i]], float(predictions.confidence[i]))
        for i in (worst[place] for _, place in read)
    ]
    save_mistakes(pictures, captions, path)
