"""``python -m mae finetune | linprobe | knn`` from pictures to the report."""

# ruff: noqa: F401, F811 (fixtures are imported, and are arguments)

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from classified import (
    COMMANDS,
    NAMES,
    REFUSED,
    everything,
    folders,
    options_of,
    place,
    readable,
    refusal,
    results,
    rows,
    run,
    said,
    tuned,
)
from pages import Page
from runs import assert_equal, weights

from mae import load_checkpoint
from mae.__main__ import main
from mae.data import ImageFiles


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
