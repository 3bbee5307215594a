"""Labelled pictures, of folders and of datasets, and two of them with the same classes."""

from dataclasses import replace

import datasets
import numpy as np
import pytest
from pictures import good_folder, photographs
from PIL import Image
from test_hugging_face import alone, table_of  # noqa: F401 (a fixture)

from mae.__main__ import main
from mae.data import DataError, DataWarning, find_images, open_labelled, open_train_and_test

KINDS = datasets.ClassLabel(names=["zebra", "ant"])  # not in the order of the names


def refusal(*data) -> str:
    with pytest.raises(DataError) as error:
        (open_labelled if len(data) == 1 else open_train_and_test)(*data)
    return str(error.value)


def held(folder, labels, feature=None, column="label", **columns) -> str:
    """What opens a dataset of as many pictures with these labels."""
    table = table_of(find_images(good_folder(folder / "files", len(labels)))[: len(labels)])
    table = table.add_column(column, labels, feature=feature)
    for name, values in columns.items():
        table = table.add_column(name, values)
    table.to_parquet(folder / "x.parquet")
    return f"hf:{folder / 'x.parquet'}"


def classes(folder, **counts):
    for name, count in counts.items():
        good_folder(folder / name, count)
    return folder


def test_a_folder_with_a_sub_folder_for_each_class(tmp_path):
    classes(tmp_path, b=2, a=1, **{".hidden": 1})
    good_folder(tmp_path / "b" / "deeper", 1)
    found = open_labelled(tmp_path)
    assert (found.classes, found.labels.tolist(), found.labels.dtype) == (("a", "b"), [0, 1, 1, 1], np.int64)
    assert len(found) == 4
    assert [found.source.name(i).split("/")[-2] for i in range(4)] == ["a", "deeper", "b", "b"]


def test_pictures_beside_the_sub_folders_are_counted(tmp_path):
    good_folder(classes(tmp_path, a=1, b=1), 2)
    (tmp_path / "notes.txt").touch()
    with pytest.warns(DataWarning) as warned:
        found = open_labelled(tmp_path)
    assert len(found) == 2
    assert [str(w.message) for w in warned] == [f"{tmp_path}: left out 1 .txt file and 2 images beside the sub-folders"]


@pytest.mark.parametrize(
    ("labels", "feature", "names", "places"),
    [
        ([1, 0, 1], KINDS, ("zebra", "ant"), [1, 0, 1]),
        ([10, 9, 10, 100], None, ("9", "10", "100"), [1, 0, 1, 2]),
        (["dog", "cat", "dog"], None, ("cat", "dog"), [1, 0, 1]),
        ([True, False], None, ("False", "True"), [1, 0]),
    ],
    ids=["ClassLabel", "numbers", "strings", "booleans"],
)
def test_columns_of_labels(tmp_path, labels, feature, names, places):
    found = open_labelled(held(tmp_path, labels, feature))
    assert (found.classes, found.labels.tolist(), found.labels.dtype) == (names, places, np.int64)
    assert len(found) == len(labels)


def test_which_column_holds_the_labels(tmp_path):
    where = held(tmp_path, [0, 1], KINDS, "kind", label=["x", "y"], n=[3, 4])
    assert open_labelled(where).classes == ("zebra", "ant")
    assert open_labelled(f"{where}:label=label").classes == ("x", "y")
    assert open_labelled(f"{where}:train:label=n:column=image").classes == ("3", "4")
    assert refusal(f"{where}:label=none") == f"{where}:label=none has no column none, but image, kind, label, n"
    where = held(tmp_path / "other", [0, 1], KINDS, "fine", coarse=[0, 1])
    table = datasets.load_dataset("parquet", data_files=where[3:], split="train").cast_column("coarse", KINDS)
    table.to_parquet(where[3:])
    assert refusal(where) == (
        f"{where} has no column label, but image, fine, coarse; choose the one of labels with {where}:label=COLUMN"
    )


@pytest.mark.parametrize(
    ("labels", "feature", "sentence"),
    [
        ([0, -1, 1], KINDS, "1 row of {w} has no label"),
        ([0, None, None], None, "2 rows of {w} have no label"),
        (["a", None, "b"], None, "1 row of {w} has no label"),
        ([0.5, 1.5], None, "column label of {w} holds no labels"),
        ([[0], [1]], None, "column label of {w} holds no labels"),
        ([1, 1], KINDS, "no picture of zebra in {w}"),
        (["a", "a"], None, "{w} holds one class alone, a, and two are needed"),
    ],
    ids=["-1", "None", "strings", "floats", "lists", "a class without pictures", "one class"],
)
def test_labels_that_are_refused(tmp_path, labels, feature, sentence):
    where = held(tmp_path, labels, feature)
    assert refusal(where) == sentence.format(w=where)


def test_datasets_without_labels_are_refused(tmp_path):
    where = held(tmp_path, [0, 1], KINDS)
    assert refusal(f"{where}:streaming") == (
        f"{where}:streaming: labels are read of a dataset that is not streamed; leave :streaming out"
    )
    assert refusal("hf:") == "hf: names no dataset"
    assert refusal(f"hf:{tmp_path}/none.parquet") == f"there is no file or folder {tmp_path}/none.parquet"
    assert refusal(f"{where}:rows=3") == f"{where}:rows=3: rows= is neither split= nor column= nor config= nor label="
    table = table_of(find_images(tmp_path / "files")[:2]).add_column("label", [0, 1])
    table.filter(lambda row: False).save_to_disk(tmp_path / "none", num_shards=1)  # 4.0 divides by the rows to choose
    assert refusal(f"hf:{tmp_path}/none") == f"hf:{tmp_path}/none holds no rows"


@pytest.mark.parametrize(
    ("folder", "sentence"),
    [
        ("none", "{d}/none must hold one sub-folder of images per class, and is no folder"),
        ("file", "{d}/file must hold one sub-folder of images per class, and is no folder"),
        ("flat", "{d}/flat must hold one sub-folder of images per class, and holds no sub-folder"),
        ("hidden", "{d}/hidden must hold one sub-folder of images per class, and holds no sub-folder"),
        ("one", "{d}/one holds one class alone, a, and two are needed"),
        ("empty", "no image in these sub-folders of {d}/empty: b; looked for .jpg, .png, .webp"),
    ],
)
def test_folders_that_are_refused(tmp_path, folder, sentence):
    (tmp_path / "file").touch()
    good_folder(tmp_path / "flat", 1)
    classes(tmp_path / "hidden", **{".a": 1})
    classes(tmp_path / "one", a=1)
    (classes(tmp_path / "empty", a=1) / "b").mkdir()
    assert refusal(tmp_path / folder).startswith(sentence.format(d=tmp_path))


def test_classes_that_differ_are_named(tmp_path):
    one, other = classes(tmp_path / "1", a=1, b=1, **{"c\n": 1}), classes(tmp_path / "2", b=1, d=1)
    assert refusal(one, other) == (
        f"{one} and {other} do not hold the same classes: only {one} holds a, c\\n; only {other} holds d"
    )
    assert refusal(other, classes(tmp_path / "3", b=1, d=1, e=1)) == (
        f"{other} and {tmp_path}/3 do not hold the same classes: only {tmp_path}/3 holds e"
    )
    many = classes(tmp_path / "4", b=1, d=1, **{f"x{i}": 1 for i in range(10)})
    assert refusal(other, many).endswith("holds x0, x1, x2, x3, x4, x5, x6, x7 and 2 more")


def test_classes_in_another_order_are_those_of_the_first(tmp_path):
    """A folder has them by their names, a dataset as its ClassLabel does."""
    where, folder = held(tmp_path, [0, 1, 1], KINDS), classes(tmp_path / "folder", ant=1, zebra=2)
    for one, other, names, places in (
        (where, folder, ("zebra", "ant"), [1, 0, 0]), (folder, where, ("ant", "zebra"), [1, 0, 0]),
    ):  # fmt: skip
        train, test = open_train_and_test(one, other)
        assert train.classes == test.classes == names
        assert test.labels.tolist() == places
        assert train.labels.tolist() == open_labelled(one).labels.tolist()


def test_packed_folders_keep_their_labels(tmp_path):
    for i, photo in enumerate(photographs(5)):
        (tmp_path / "files" / ("cat", "a, dog")[i % 2]).mkdir(parents=True, exist_ok=True)
        photo.save(tmp_path / "files" / ("cat", "a, dog")[i % 2] / f"{i}.png")
    (tmp_path / "files" / "cat" / "broken.png").touch()
    arguments = ["--data", str(tmp_path / "files"), "--out", str(tmp_path / "packed"), "--workers", "0", "--labels"]
    main(["pack", *arguments])
    train, test = open_train_and_test(f"hf:{tmp_path / 'packed'}", tmp_path / "files")
    assert train.classes == ("a, dog", "cat")
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1])
    assert Image.open(test.source.files[0]).size == (160, 120)


def test_a_run_is_resumed_on_the_same_labels_alone(tmp_path):
    classes(tmp_path, a=2, b=1)
    found = open_labelled(tmp_path)
    others = [replace(found, labels=found.labels[::-1].copy()), replace(found, classes=("b", "a"))]
    assert len({x.fingerprint() for x in (found, *others)}) == 3
    assert open_labelled(tmp_path).fingerprint() == found.fingerprint()


def test_minus_one_is_a_label_where_no_names_of_classes_say_otherwise(tmp_path):
    assert open_labelled(held(tmp_path, [-1, 1, -1])).classes == ("-1", "1")
