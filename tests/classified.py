"""What tests of commands on labelled pictures share: folders of pictures, good and bad, a run, a fine-tuned run."""

import contextlib
import csv
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from pictures import good_folder, unreadable_files
from PIL import Image

from mae.__main__ import main
from mae.commands.demo import fashion_mnist
from mae.data import ImageFiles, Reading, find_images, whole_batches

NAMES = ["bag, small", "boot", "co\nat", "dress", "jumper", "sandal", "shirt", "sneaker", "top", "trouser"]
READING = Reading(1, image_size=(28, 28))
HERE = ["--workers", "0", "--device", "cpu"]
STEPS = ["--steps", "4", "--batch-size", "4", "--log-every", "1"]
COMMANDS = {"finetune": STEPS, "linprobe": [], "knn": []}


def said(*arguments) -> str:
    """What a command prints, apart from warnings and progress."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        main([*map(str, arguments)])
    return output.getvalue()


def refusal(*arguments) -> str:
    with pytest.raises(SystemExit) as stop:
        main([*map(str, arguments)])
    assert isinstance(stop.value.code, str), stop.value.code
    assert stop.value.code.startswith("mae: ")
    assert "\n" not in stop.value.code
    return stop.value.code.removeprefix("mae: ")


def everything(folder: Path) -> dict[Path, float]:
    return {path: path.lstat().st_mtime for path in folder.rglob("*")}


def results(folder: Path) -> list[dict]:
    return json.loads((folder / "results.json").read_text())


def rows(file: Path) -> list[list[str]]:
    with file.open(newline="", encoding="utf-8") as lines:
        return [*csv.reader(lines)]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Pictures of ten classes to learn from and to test on, and a run that was pre-trained on them."""
    place = tmp_path_factory.mktemp("place")
    for part, name, count in (("train", "train_5000", 3), ("test", "test_2000", 2)):
        images, labels = fashion_mnist(name)
        for label, kind in enumerate(NAMES):
            (place / part / kind).mkdir(parents=True)
            for i, picture in enumerate(images[labels == label][:count, 0].numpy()):
                Image.fromarray(picture).save(place / part / kind / f"{i}.png")
    options = ["--model", "mae_vit_demo_patch7", "--steps", "2", "--batch-size", "8", "--eval-every", "99"]
    main(["pretrain", "--data", str(place / "train"), "--out", str(place / "run"), *options, *HERE])
    return place


def options_of(place: Path, command: str, **others) -> list[str]:
    given = {"checkpoint": place / "run", "data": place / "train", "test": place / "test", **others}
    named = [x for name, value in given.items() for x in (f"--{name}", str(value))]
    return [command, *named, *COMMANDS[command], *HERE]


@pytest.fixture(scope="module")
def tuned(place) -> tuple[Path, str]:
    """A run of finetune, and what it printed."""
    return place / "tuned", said(*options_of(place, "finetune", out=place / "tuned"))


@pytest.fixture
def run(place, tmp_path) -> Path:
    """A pre-trained run of this test's own."""
    return shutil.copytree(place / "run", tmp_path / "run")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Labelled pictures that are not as they should be."""
    folder = tmp_path_factory.mktemp("folders")
    for name, counts in {
        "good": {"a": 2, "b": 2}, "single": {"a": 1, "b": 1}, "other": {"b": 1, "c": 1}, "one": {"a": 2},
        "empty": {"a": 2, "b": 0}, "some": {"a": 2, "b": 2}, "class": {"a": 2, "b": 0},
    }.items():  # fmt: skip
        for kind, count in counts.items():
            good_folder(folder / name / kind, count)
    for broken in ("broken/a", "broken/b", "some/b", "class/b"):
        unreadable_files(folder / broken)
    (folder / "file").write_text("a file")
    return folder


REFUSED = {
    "one class": ("one", "one", "{d}/one holds one class alone, a, and two are needed"),
    "classes that differ": (
        "good", "other",
        "{d}/good and {d}/other do not hold the same classes: only {d}/good holds a; only {d}/other holds c",
    ),
    "an empty class": ("empty", "good", "no image in these sub-folders of {d}/empty: b; looked for .jpg,"),
    "an empty class to test": ("good", "empty", "no image in these sub-folders of {d}/empty: b; looked for .jpg,"),
    "broken files": ("broken", "good", "none of the 8 files can be read; first: cannot read {d}/broken/"),
    "broken files to test": ("good", "broken", "none of the 8 files can be read; first: cannot read {d}/broken/"),
    "a file": ("file", "good", "{d}/file must hold one sub-folder of images per class, and is no folder"),
    "no folder": ("good", "none", "{d}/none must hold one sub-folder of images per class, and is no folder"),
    "no dataset": ("hf:", "good", "hf: names no dataset"),
}  # fmt: skip


def readable(folder) -> torch.Tensor:
    batches = whole_batches(ImageFiles(find_images(folder)), READING, 9, warn=False)
    return torch.cat([batch.images for batch in batches])
