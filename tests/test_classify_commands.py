"""``python -m mae finetune | linprobe | knn | features | predict`` from pictures to the report."""

import contextlib
import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from pages import Page
from pictures import good_folder, unreadable_files
from PIL import Image
from runs import assert_equal, weights

from mae import load_checkpoint, save_checkpoint
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


def test_finetune_leaves_a_whole_run_folder(place, tuned):
    folder, _ = tuned
    assert sorted(f.name for f in folder.iterdir()) == [
        "checkpoints", "config.json", "metrics.jsonl", "mistakes-finetune.png", "model.safetensors",
        "predictions-finetune.csv", "recipe.json", "report.html", "results.json", "tensorboard",
    ]  # fmt: skip
    (entry,) = results(folder)
    shares = {name: entry.pop(name) for name in ("top1", "top5")}
    assert entry == {
        "command": "finetune", "checkpoint": f"{place}/run", "data": f"{place}/train", "test": f"{place}/test",
        "images": 30, "pool": "mean", "test_images": 20, "classes": 10,
    }  # fmt: skip
    assert shares["top1"]["largest class alone"] == 0.1
    recipe = json.loads((folder / "recipe.json").read_text())
    assert recipe["options"]["command"] == "finetune"
    assert recipe["data"].keys() == {"images", "fingerprint", "labels"}
    model = load_checkpoint(folder)
    assert model.head_config.classes == tuple(NAMES)
    head, *found = rows(folder / "predictions-finetune.csv")
    assert head == ["file", "label", "predicted", "confidence", "rank"]
    assert [row[:2] for row in found] == [[f"{place}/test/{name}/{i}.png", name] for name in NAMES for i in range(2)]
    assert [row[4] == "0" for row in found] == [row[1] == row[2] for row in found]
    for k in (1, 5):
        assert shares[f"top{k}"]["fine-tuned"] == np.mean([int(row[4]) < k for row in found])
    assert [row[2] for row in found] == [NAMES[i] for i in model(readable(place / "test")).argmax(1)]


def test_what_finetune_prints(place, tuned):
    folder, output = tuned
    plan, hint, *table, kept, ready, command = output.splitlines()
    assert hint.startswith("The published recipe is for a million pictures, and may learn little from so few; see ")
    assert plan == (
        f"Fine-tuning the encoder of {place}/run (28 x 28 pixels in patches of 7 x 7, cpu) on 30 pictures of 10 "
        f"classes from {place}/train: 4 steps of 4 images, 0.53 epochs, learning rate up to 7.8e-06; 20 pictures to "
        "test"
    )
    top1, top5 = (f"{results(folder)[0][name]['fine-tuned']:.1%}" for name in ("top1", "top5"))
    assert [line.split("  ", 2)[1] + re.sub(" +", " ", line[34:]) for line in table] == [
        "20 test pictures top-1 top-5", "largest class alone 10.0%", f"fine-tuned {top1} {top5}",
    ]  # fmt: skip
    results_file, report = folder / "results.json", folder / "report.html"
    assert kept == f"The results are in {results_file}; {report} shows which class is taken for which"
    assert ready == f"The classifier is in {folder}. Try it:"
    assert command == f"  python -m mae predict --checkpoint {folder} --images FOLDER --out predictions.csv"


def test_the_report_of_finetune(tuned):
    page = Page(tuned[0])
    assert {"Evaluations", "Predictions of finetune"} <= {*page.texts["h2"]}
    assert any(row[:2] == ["", "fine-tuned"] or row[0] == "fine-tuned" for row in page.rows)
    assert "top-5" in page.source
    assert (tuned[0] / "mistakes-finetune.png").read_bytes() in page.pictures


def test_a_finished_run_is_tested_again_and_not_trained(place, tuned, capfd):
    folder, before = tuned[0], everything(tuned[0] / "checkpoints")
    files = {name: (folder / name).read_bytes() for name in ("results.json", "metrics.jsonl", "model.safetensors")}
    again = said(*options_of(place, "finetune", out=folder), "--resume")
    assert again == tuned[1]
    assert "Nothing is left to do after step 4 of 4" in capfd.readouterr().err
    assert {name: (folder / name).read_bytes() for name in files} == files  # an equal result stands there once
    assert everything(folder / "checkpoints") == before


def test_a_dry_run_writes_nothing(place, tuned, tmp_path):
    for command, options in (("finetune", []), ("linprobe", ["--solver", "sgd", "--steps", "4"])):
        out = said(*options_of(place, command, out=tmp_path / "new"), *options, "--dry-run")
        assert ": 4 steps of " in out
        assert len(out.splitlines()) == 1 + (command == "finetune")  # a hint, of mixing for few pictures
    assert not [*tmp_path.iterdir()]


def test_a_run_is_overwritten_when_it_is_asked_for(place, tuned, tmp_path):
    folder = shutil.copytree(tuned[0], tmp_path / "tuned")
    arguments = options_of(place, "finetune", out=folder)
    before = everything(folder)
    assert refusal(*arguments) == (
        f"{folder} holds a run already (model.safetensors, metrics.jsonl, config.json, checkpoints); add --resume to "
        "go on with it, or --overwrite, or choose another --out"
    )
    assert refusal(*arguments, "--overwrite", "--resume") == (
        "--resume goes on with a run and --overwrite replaces it; give one of them"
    )
    assert everything(folder) == before
    said(*arguments, "--overwrite", "--pool", "token", "--steps", "1")
    assert [(entry["pool"], entry["images"]) for entry in results(folder)] == [("token", 30)]
    head = json.loads((folder / "config.json").read_text())["head"]
    assert (head["pool"], head["fc_norm"]) == ("token", False)


def test_the_run_that_it_begins_with_is_not_overwritten(place, run):
    before = everything(run)
    for checkpoint in (run, run / "model.safetensors", run / ".." / "run"):
        words = refusal(*options_of(place, "finetune", checkpoint=checkpoint, out=run), "--overwrite")
        assert words.startswith(f"--overwrite would remove {checkpoint}, which the run begins with")
    assert everything(run) == before


@pytest.mark.parametrize("scratch", [False, True])
def test_what_a_run_begins_with(place, tmp_path, scratch):
    options = ["--steps", "1", "--base-lr", "1e-12", *(["--scratch"] if scratch else [])]
    out = said(*options_of(place, "finetune", out=tmp_path), *options)
    assert out.startswith("Training from scratch the architecture of" if scratch else "Fine-tuning the encoder of")
    row = "from scratch" if scratch else "fine-tuned"
    assert [*results(tmp_path)[0]["top1"]] == ["largest class alone", row]
    own, encoder = weights(tmp_path), weights(place / "run")
    alike = [torch.allclose(own[name], encoder[name], atol=1e-6) for name in own if name.endswith("qkv.weight")]
    assert alike == len(alike) * [not scratch]


def test_ctrl_c_and_resume_end_as_a_run_that_nobody_stopped(place, tuned, tmp_path, monkeypatch, capfd):
    read, reads = ImageFiles.read, []

    def interrupting(self, *arguments):
        reads.append(1)
        if len(reads) == 8:  # of the second batch
            os.kill(os.getpid(), signal.SIGINT)
        return read(self, *arguments)

    arguments = options_of(place, "finetune", out=tmp_path / "run")
    monkeypatch.setattr(ImageFiles, "read", interrupting)
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--resume"])
    assert stop.value.code == 3
    assert re.search(r"mae: stopped after step [123] of 4\. .*the same command with --resume", capfd.readouterr().err)
    assert not (tmp_path / "run" / "results.json").exists()
    output = said(*arguments, "--resume")
    assert_equal(tuned[0], tmp_path / "run")
    assert results(tmp_path / "run") == results(tuned[0])
    assert output.splitlines()[:4] == tuned[1].splitlines()[:4]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["finetune --parallel fsdp", "linprobe --solver sgd --steps 3 --batch-size 8"])
def test_two_processes_end_as_one(place, tmp_path, case):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mae"]
    command, *more = case.split()
    one, two = ([*options_of(place, command, out=tmp_path / name), *more] for name in ("one", "two"))
    expected = said(*one)
    process = subprocess.run([*torchrun, *two], capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[:4] == expected.splitlines()[:4]  # one of them speaks
    assert results(tmp_path / "one") == results(tmp_path / "two")
    found = [rows(tmp_path / name / f"predictions-{command}.csv") for name in ("one", "two")]
    assert [row[:3] for row in found[0]] == [row[:3] for row in found[1]]


def test_linprobe_in_the_run_folder_of_its_checkpoint(place, run):
    output = said(*options_of(place, "linprobe", checkpoint=run))
    assert output.splitlines()[0] == (
        f"Linear probe on the mean features of {run}: 30 pictures to learn from, 20 to test, 10 classes"
    )
    (entry,) = results(run)
    assert (entry["solver"], entry["pool"], entry["images"], entry["test_images"]) == ("lbfgs", "mean", 30, 20)
    assert [*entry["top5"]] == ["untrained encoder", "pre-trained encoder"]
    assert len(rows(run / "predictions-linprobe.csv")) == 21


@pytest.mark.parametrize("solver", ["sgd", "lars"])
def test_linprobe_by_steps_is_a_run(place, tmp_path, monkeypatch, solver):
    monkeypatch.chdir(tmp_path)
    output = said(*options_of(place, "linprobe"), "--solver", solver, "--steps", "3", "--batch-size", "8")
    assert output.startswith(f"Linear probe on the class-token features of {place}/run (28 x 28 pixels in patches of ")
    folder = tmp_path / "runs" / "linprobe"
    (entry,) = results(folder)
    assert (entry["solver"], entry["pool"]) == (solver, "token")
    own, encoder = weights(folder), weights(place / "run")
    assert all(torch.equal(own[name], encoder[name]) for name in own if name.startswith("blocks."))
    assert own["head.weight"].shape == (10, 96)
    assert "Predictions of linprobe" in Page(folder).texts["h2"]
    assert "pre-trained encoder" in Page(folder).source
    assert "holds a run already" in refusal(*options_of(place, "linprobe"), "--solver", solver)


def test_options_of_a_run_are_not_passed_over_by_a_regression(place, run):
    before = everything(run)
    arguments = options_of(place, "linprobe", checkpoint=run)
    for option in ("--epochs 3", "--steps 3", "--resume", "--overwrite", "--dry-run", "--base-lr 1", "--no-flips"):
        for solver in ("auto", "lbfgs"):
            words = refusal(*arguments, "--solver", solver, *option.split())
            name = option.split()[0].replace("no-", "")
            assert words == f"{name} has no effect with the solver lbfgs; leave it out, or add --solver sgd"
    assert refusal(*arguments, "--solver", "sgd", "--batch-size", "1") == (
        "a probe normalises features over the batch, so batch_size must be 2 at least, got 1"
    )
    assert everything(run) == before


def test_knn(place, run):
    output = said(*options_of(place, "knn", checkpoint=run), "--k", "1", "20", "500", "200")
    assert output.splitlines()[0] == (
        f"Nearest neighbours by the mean features of {run}: 30 pictures to learn from, 20 to test, 10 classes"
    )
    kinds = [f"{kind} encoder, k = {k}" for kind in ("untrained", "pre-trained") for k in (1, 20, 30)]
    assert [line[2:34].strip() for line in output.splitlines()[3:9]] == kinds
    (entry,) = results(run)
    assert [*entry["top1"]] == ["largest class alone", *kinds]
    assert (entry["pool"], entry["temperature"], entry["predictions_k"]) == ("mean", 0.07, 20)
    ranks = [int(row[4]) for row in rows(run / "predictions-knn.csv")[1:]]
    assert entry["top1"]["pre-trained encoder, k = 20"] == np.mean([rank == 0 for rank in ranks])
    for option, words in (
        ("--k 0", "k must be whole numbers above 0, got (0,)"), ("--k", "k must be whole numbers above 0, got ()"),
        ("--temperature 0", "temperature must be a number of at least 0.001, got 0.0"),
        ("--workers -1", "workers must be a whole number from 0 on, got -1"),
    ):  # fmt: skip
        assert refusal(*options_of(place, "knn", checkpoint=run), *option.split()) == words


def test_every_picture_is_its_own_nearest_neighbour(place, run):
    said(*options_of(place, "knn", checkpoint=run, test=place / "train"), "--k", "1")
    assert results(run)[0]["top1"]["pre-trained encoder, k = 1"] == 1


def test_a_packed_dataset_in_place_of_a_folder(place, run, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    said(
        "pack", "--data", place / "test", "--out", tmp_path / "packed", "--labels", "--in-chans", "1", "--workers", "0"
    )
    data = f"hf:{tmp_path / 'packed'}"
    for places in ({"data": data}, {"test": data}):
        said(*options_of(place, "knn", checkpoint=run, **places), "--k", "1")
    assert [(entry["images"], entry["test_images"]) for entry in results(run)] == [(20, 20), (30, 20)]
    names = [row[0] for row in rows(run / "predictions-knn.csv")[1:]]
    assert names[:2] == [f"row {i} of {data}, bag, small/{i}.png" for i in range(2)]


@pytest.mark.parametrize("command", ["linprobe", "knn"])
def test_without_a_folder_nothing_is_kept(place, tuned, tmp_path, monkeypatch, command):
    """Of a classifier too, whose encoder is taken."""
    monkeypatch.chdir(tmp_path)
    for name in ("model.safetensors", "config.json"):
        shutil.copy(tuned[0] / name, tmp_path)
    before = everything(tmp_path)
    output = said(*options_of(place, command, checkpoint="model.safetensors"))
    assert output.splitlines()[-1] == "Nothing is kept; with --out FOLDER there are results, predictions and a report"
    assert everything(tmp_path) == before
    said(*options_of(place, command, checkpoint="model.safetensors", out="new/folder"))
    assert [entry["command"] for entry in results(tmp_path / "new" / "folder")] == [command]


def test_several_evaluations_of_one_run(place, run):
    commands = ("knn", "linprobe", "knn")
    for command in commands:
        said(*options_of(place, command, checkpoint=run))
    said(*options_of(place, "knn", checkpoint=run), "--pool", "token")
    found = [(entry["command"], entry["pool"]) for entry in results(run)]
    assert found == [("linprobe", "mean"), ("knn", "mean"), ("knn", "token")]
    page = Page(run)
    assert [title for title in page.texts["h2"] if title.startswith("Pred")] == [
        "Predictions of knn", "Predictions of linprobe",
    ]  # fmt: skip
    assert [row[0] for row in page.rows if row[0] in ("knn", "linprobe")] == ["linprobe", "knn", "knn"]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("text", ["{}", "[1"])
def test_results_that_are_no_list_are_refused_before_any_work(place, tmp_path, command, text):
    (tmp_path / "results.json").write_text(text)
    before = everything(tmp_path)
    words = refusal(*options_of(place, command, checkpoint=tmp_path / "none", out=tmp_path))
    assert words == f"{tmp_path}/results.json is no list of results; give another --out"
    assert everything(tmp_path) == before


@pytest.mark.parametrize("command", ["linprobe", "knn"])
def test_what_one_process_computes_is_not_started_by_torchrun(place, run, monkeypatch, command):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert refusal(*options_of(place, command, checkpoint=run)) == (
        "this is computed in one process; start it without torchrun"
    )


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


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("case", REFUSED)
def test_it_refuses_in_a_sentence_and_writes_nothing(run, folders, tmp_path, command, case):
    data, test, sentence = REFUSED[case]
    before = everything(tmp_path)
    places = [x if x.startswith("hf:") else folders / x for x in (data, test)]
    arguments = options_of(tmp_path, command, data=places[0], test=places[1])
    for out in ([], ["--out", str(tmp_path / "new" / "folder")]):
        if out or command != "finetune":
            assert refusal(*arguments, *out).startswith(sentence.format(d=folders))
    assert everything(tmp_path) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_folders_that_cannot_be_made_are_refused(place, folders, command):
    for out in ("file", "file/folder"):
        words = refusal(*options_of(place, command, checkpoint="none", out=folders / out))
        assert words == f"{folders / out} cannot be a folder: {folders}/file is a file"


@pytest.mark.parametrize("command", COMMANDS)
def test_one_picture_of_each_class_is_enough(place, folders, tmp_path, command):
    said(*options_of(place, command, data=folders / "single", test=folders / "single", out=tmp_path))
    (entry,) = results(tmp_path)
    assert (entry["images"], entry["test_images"], entry["classes"]) == (2, 2, 2)
    assert "top5" not in entry


@pytest.mark.parametrize("command", COMMANDS)
def test_broken_files_are_left_out_and_counted(place, folders, tmp_path, command, capsys):
    output = said(*options_of(place, command, data=folders / "some", test=folders / "some", out=tmp_path))
    assert "largest class alone                 50.0%" in output  # of those that were read
    warned = re.findall("Warning: (.*?) files? .*cannot be read", capsys.readouterr().err)
    assert warned.count("4 of 8") == (1 if command == "finetune" else 2)  # it reads random ones of those to learn from
    assert results(tmp_path)[0]["test_images"] == 4
    assert len(rows(tmp_path / f"predictions-{command}.csv")) == 5


@pytest.mark.parametrize("command", ["linprobe", "knn"])
def test_a_class_of_broken_files_is_refused(place, run, folders, command):
    words = refusal(*options_of(place, command, checkpoint=run, data=folders / "class", test=folders / "good"))
    assert words == f"no picture of b in {folders}/class can be read"
    assert not (run / "results.json").exists()


@pytest.fixture(scope="module")
def some(tmp_path_factory) -> Path:
    """Pictures, half of them broken, one with a name that is hard to write down."""
    folder = tmp_path_factory.mktemp("some")
    good_folder(folder, 4)
    unreadable_files(folder)
    (folder / "photo_00.jpg").rename(folder / 'a, "b"\nc.jpg')
    return folder


def readable(folder) -> torch.Tensor:
    batches = whole_batches(ImageFiles(find_images(folder)), READING, 9, warn=False)
    return torch.cat([batch.images for batch in batches])


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
    assert head == ["file", "label", "probability", *NAMES]
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
