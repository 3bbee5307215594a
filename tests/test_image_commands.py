"""``python -m mae features | predict``: what is written of images, and over what nothing is written."""

# ruff: noqa: F401, F811 (fixtures are imported, and are arguments)

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from classified import (
    HERE,
    NAMES,
    folders,
    place,
    readable,
    refusal,
    rows,
    run,
    said,
    tuned,
)
from pictures import good_folder, unreadable_files

from mae import load_checkpoint, save_checkpoint


@pytest.fixture(scope="module")
def some(tmp_path_factory) -> Path:
    """Pictures, half of them broken, one with a name that is hard to write down."""
    folder = tmp_path_factory.mktemp("some")
    good_folder(folder, 4)
    unreadable_files(folder)
    (folder / "photo_00.jpg").rename(folder / 'a, "b"\nc.jpg')
    return folder


def features_by_hand(place, folder, kind) -> np.ndarray:
    tokens = load_checkpoint(place / "run").forward_features(readable(folder)).detach()
    return {"mean": tokens[:, 1:].mean(1), "token": tokens[:, 0], "patches": tokens[:, 1:]}[kind].numpy()


@pytest.mark.parametrize("kind", ["mean", "token", "patches"])
def test_features(place, some, tmp_path, kind):
    shared = ["features", "--checkpoint", place / "run", "--images", some, "--kind", kind, "--batch-size", "3", *HERE]
    for name in ("x.npy", "x.parquet"):
        output = said(*shared, "--out", tmp_path / "new" / name)
        also = f", and the names of their files to {tmp_path}/new/x.txt" if name == "x.npy" else ""
        assert output == f"Wrote the features of 4 images to {tmp_path}/new/{name}{also}\n"
    expected = features_by_hand(place, some, kind)
    array = np.load(tmp_path / "new" / "x.npy", mmap_mode="r")
    assert (array.shape, array.dtype) == (expected.shape, np.float32)
    assert array == pytest.approx(expected, abs=1e-5)
    names = (tmp_path / "new" / "x.txt").read_text().splitlines()
    assert [name.removeprefix(f"{some}/") for name in names] == [
        'a, "b"\\nc.jpg', "photo_01.png", "photo_02.webp", "photo_03.jpg",
    ]  # fmt: skip
    table = pq.read_table(tmp_path / "new" / "x.parquet")
    assert table["file"].to_pylist() == names
    assert np.array(table["features"].to_pylist(), np.float32) == pytest.approx(array)
    assert sorted(f.name for f in (tmp_path / "new").iterdir()) == ["x.npy", "x.parquet", "x.txt"]


def test_predict(tuned, some, tmp_path):
    out = tmp_path / "new" / "x.csv"
    output = said("predict", "--checkpoint", tuned[0], "--images", some, "--out", out, "--batch-size", "3", *HERE)
    head, *found = rows(out)
    assert head == ["file", "predicted", "confidence", *NAMES]
    good = ('a, "b"\nc.jpg', "photo_01.png", "photo_02.webp", "photo_03.jpg")
    assert [row[0] for row in found] == [f"{some}/{name}" for name in good]
    model = load_checkpoint(tuned[0])
    shares = np.array([[float(x) for x in row[3:]] for row in found])
    assert shares == pytest.approx(model(readable(some)).softmax(1).detach().numpy(), abs=1e-4)
    assert shares.sum(1) == pytest.approx(1, abs=1e-3)
    for row, share in zip(found, shares, strict=True):
        assert float(row[2]) == share.max() == share[NAMES.index(row[1])]
    counts = re.findall(r"(\d+) ", output.rsplit(": ", 1)[1])
    assert output.startswith(f"Wrote the labels of 4 images to {out}: ")
    assert sum(map(int, counts)) == 4


def test_predict_names_the_most_frequent_classes(tuned, place, tmp_path, monkeypatch):
    monkeypatch.setattr("mae.commands.predict._MOST_NAMED", 2)
    model = load_checkpoint(tuned[0])
    torch.nn.init.normal_(model.head.weight)
    model.head.bias.data = -model(readable(place / "train")).mean(0).detach()
    save_checkpoint(model, tmp_path / "model")
    shared = ["predict", "--checkpoint", tmp_path / "model", "--images", place / "train", *HERE]
    output = said(*shared, "--out", tmp_path / "x.csv")
    counts = Counter(row[1] for row in rows(tmp_path / "x.csv")[1:])
    named = [f"{count} {name}".replace("\n", "\\n") for name, count in counts.most_common(2)]
    assert output == (
        f"Wrote the labels of 30 images to {tmp_path}/x.csv: {', '.join(named)} and {len(counts) - 2} more\n"
    )


def test_predict_refuses_what_is_no_classifier_and_says_what_to_do(place, tmp_path):
    words = refusal("predict", "--checkpoint", place / "run", "--images", place / "test", "--out", tmp_path / "x.csv")
    assert words == (
        f"{place}/run is no classifier: it was pre-trained and has learned no labels; train one with python -m mae "
        f"finetune --checkpoint {place}/run --data FOLDER --test FOLDER, or with linprobe --solver sgd"
    )
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("command", ["features", "predict"])
def test_images_that_are_refused(place, tuned, folders, tmp_path, command):
    shared = [command, "--checkpoint", place / "run" if command == "features" else tuned[0], *HERE]
    suffix = ".npy" if command == "features" else ".csv"
    for images, sentence in {
        folders / "broken": "none of the 8 files can be read; first: cannot read ",
        folders / "broken" / "a" / "text.jpg": f"cannot read {folders}/broken/a/text.jpg: ",
        folders / "none": f"there is no file or folder {folders}/none",
        "hf:": "hf: names no dataset",
    }.items():
        out = tmp_path / "new" / f"x{suffix}"
        assert refusal(*shared, "--images", images, "--out", out).startswith(sentence), images
    assert refusal(*shared, "--images", folders, "--out", tmp_path / "x", "--batch-size", "0").startswith("batch_size")
    (tmp_path / f"x{suffix}").mkdir()
    assert refusal(*shared, "--images", folders, "--out", tmp_path / f"x{suffix}") == (
        f"{tmp_path}/x{suffix} is a folder, not a file to write"
    )
    assert [x.name for x in tmp_path.rglob("*")] == [f"x{suffix}"]


def test_features_are_of_two_formats(place, tmp_path):
    words = refusal("features", "--checkpoint", "none", "--images", place, "--out", tmp_path / "x.csv")
    assert words == f"{tmp_path}/x.csv must end in .npy or .parquet"
    words = refusal("predict", "--checkpoint", "none", "--images", place, "--out", tmp_path / "x.parquet")
    assert words == f"{tmp_path}/x.parquet must end in .csv"


@pytest.mark.parametrize(("command", "suffix"), [("features", "npy"), ("attention", "png"), ("reconstruct", "png")])
def test_no_image_is_replaced_by_what_is_made_of_it(place, tmp_path, command, suffix):
    picture = tmp_path / f"x.{suffix}"
    picture.write_bytes(b"a picture")
    for images in (picture, tmp_path):
        words = refusal(command, "--checkpoint", place / "run", "--images", images, "--out", picture)
        assert words == f"{picture} is there, among the images, and would be replaced; choose another --out"
    assert picture.read_bytes() == b"a picture"
