"""The page about a run says what the run's files say, needs no other file, and takes folders as runs leave them."""

import json
import math
import os
import re
import time

import numpy as np
import pytest
from pages import EVIL, Page, entry, png, written

from mae import CheckpointError
from mae.__main__ import main
from mae.report.page import write_report

RECIPE = {
    "options": {"model": "mae_vit_tiny_patch16", "steps": 400, "clip_grad": None, "image_size": [224, 224]},
    "versions": {"torch": "2.13.0", "device": "a device"},
    "data": {"images": 5000, "fingerprint": "0123abcd"},
    "labels": ["not the published method: decoder cross"],
}
FILES = "recipe.json, metrics.jsonl, results.json"
RESULTS = [
    {"command": "linprobe", "classes": 10, "top1": {"untrained encoder": 0.702, "pre-trained encoder": 0.813}},
    {"command": "other", "top1": {"pre-trained encoder": 0.5}, "top5": {"pre-trained encoder": 0.9}},
]


@pytest.fixture
def run(tmp_path):
    """A folder for a run: ``run(recipe, entries)`` writes what is given and returns it."""

    def write(recipe=None, entries=None, results=None, name="mine"):
        folder = tmp_path / name
        folder.mkdir()
        for file, content in (("recipe.json", recipe), ("results.json", results)):
            if content is not None:
                (folder / file).write_text(json.dumps(content))
        if entries is not None:
            (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in entries))
        return folder

    return write


def test_the_page_says_what_the_files_say(run, capsys):
    entries = [entry(step, **({"val_loss": 0.75} if step % 100 == 0 else {})) for step in range(1, 401)]
    folder = run(RECIPE, entries, RESULTS)
    (folder / "config.json").write_text('{"embed_dim": 192}')
    for step in (200, 400):
        (folder / "checkpoints" / f"step-{step:06}").mkdir(parents=True)
    main(["report", "--run", str(folder)])
    assert capsys.readouterr().out == f"Wrote {folder / 'report.html'}\n"
    page = Page(folder)
    assert page.texts["h1"] == ["mine"]
    assert page.texts["title"][0] == "mine: mae_vit_tiny_patch16"
    assert page.texts["li"] == RECIPE["labels"]
    assert page.state == (
        "Finished step 400 of 400; last loss 0.0025; 4.0 hours of training; 3,001 images per second (median)."
    )
    for row in (
        ["model", "mae_vit_tiny_patch16"], ["steps", "400"], ["clip_grad", "none"], ["image_size", "[224, 224]"],
        ["torch", "2.13.0"], ["device", "a device"], ["embed_dim", "192"], ["images of the data", "5000"],
        ["fingerprint of the data", "0123abcd"], ["skipped updates", "3"], ["most memory", "801 MB"],
        ["time waiting for data", "25 %"], ["epochs", "5.128"], ["checkpoints", "2, step 200 to step 400"],
        ["evaluation", "features", "top1", "top5", "conditions"],
        ["linprobe", "untrained encoder", "70.2 %", "", "classes: 10"], ["pre-trained encoder", "81.3 %", ""],
        ["other", "pre-trained encoder", "50.0 %", "90.0 %", ""],
    ):  # fmt: skip
        assert row in page.rows
    assert [*page.figures] == ["Loss", "Learning rate", "Speed", "Waiting for data", "Norm of the gradient"]
    loss, steps = page.values("Loss"), np.arange(1, 401)
    np.testing.assert_allclose(loss[:, 0], steps, atol=0.2)
    np.testing.assert_allclose(loss[:, 1], 1 / steps, atol=0.001)
    np.testing.assert_allclose(page.values("Loss", 1), [[100 * i, 0.75] for i in range(1, 5)], atol=0.2)
    assert len([*page.figures["Loss"].iter("circle")]) == 4
    assert page.caption("Loss") == (
        "training: last 0.0025, lowest 0.0025, highest 1held-out images: last 0.75, lowest 0.75, highest 0.75"
    )
    np.testing.assert_allclose(page.values("Learning rate")[:, 1], 1.5e-4, rtol=0.01)
    np.testing.assert_allclose(page.values("Waiting for data")[:, 1], 25, rtol=0.01)
    np.testing.assert_allclose(page.values("Speed")[:, 1], 3000 + ((steps + 1) % 3) ** 3, atol=2)


def test_a_run_that_has_not_ended(run):
    folder = run(RECIPE, [entry(100), entry(200)])
    os.utime(folder / "metrics.jsonl", (1_800_000_000, 1_800_000_000))
    began = "Stopped or still running at step 200 of 400 (last entry 2027-01-15 at 08:00 UTC); last loss 0.005; "
    assert written(folder).state.startswith(began)
    (folder / "recipe.json").write_text(json.dumps({"options": {"steps": None, "epochs": 10}}))
    assert written(folder).state.startswith("Stopped or still running at epoch 2.564 of 10 (")
    (folder / "metrics.jsonl").write_text(json.dumps(entry(780, epoch=9.9999999999)))
    assert written(folder).state.startswith("Finished epoch 10 of 10;")
    (folder / "recipe.json").unlink()
    page = written(folder)
    assert page.state.startswith("At step 780; how many were asked for is not known;")
    assert "There is no recipe.json. The options, the versions and how many" in "".join(page.texts["p"])


@pytest.mark.parametrize("entries", [None, []])
def test_a_run_before_its_first_step(run, entries):
    page = written(run(RECIPE, entries))
    assert page.state == (
        "No step has been recorded yet." if entries == [] else "There is no metrics.jsonl, so no step is known."
    )
    assert not page.figures
    said = "|".join(page.texts["p"])
    assert (
        "no curves before the first step" if entries == [] else "There is no metrics.jsonl, so there are no"
    ) in said
    for sentence in ("There are no reconstructions", "There is no results.json. No ev", "There is no config.json."):
        assert sentence in said
    assert ["checkpoints", "none"] in page.rows


def test_a_folder_of_no_run_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        words = f"{folder} is no folder of a run: it holds neither {FILES} nor predictions-*.csv"
        with pytest.raises(ValueError) as refusal:
            write_report(folder)
        assert str(refusal.value) == words
        with pytest.raises(SystemExit) as stop:
            main(["report", "--run", str(folder)])
        assert stop.value.code == f"mae: {words}"
    assert not [*tmp_path.iterdir()]


def test_lines_that_cannot_be_read_are_counted_and_the_torn_one_is_named(run):
    folder = run(RECIPE)
    good = [json.dumps(entry(step)) for step in (1, 2, 3)]
    bad = ["no JSON", "[1]", "{}", '{"step": "4"}', '{"step": NaN}', "\0\0", "[" * 100_000]
    file = folder / "metrics.jsonl"
    file.write_bytes("\n".join([*good, *bad, "\udcff", "", '{"step": 400, "lo']).encode(errors="surrogateescape"))
    page = written(folder)
    np.testing.assert_allclose(page.values("Loss")[:, 0], [1, 2, 3], atol=0.01)
    assert "Left out of metrics.jsonl: 8 lines that cannot be read." in page.texts["p"]
    assert "The last line of metrics.jsonl is cut off, as when a run is killed or still writing." in page.texts["p"]
    file.write_bytes("\n".join(good).encode())  # whole, but for the end of its line
    page = written(folder)
    assert len(page.values("Loss")) == 3
    assert "metrics.jsonl" not in "".join(page.texts["p"])


def test_steps_done_again_replace_what_was_done_before(run):
    before, after = [entry(x, loss=9.0) for x in range(10, 60, 10)], [entry(x, loss=1.0) for x in range(30, 90, 10)]
    page = written(run(RECIPE, before + after))
    expected = [[10, 9], [20, 9], *([x, 1] for x in range(30, 90, 10))]
    np.testing.assert_allclose(page.values("Loss"), expected, atol=0.05)
    assert "The run went back to an earlier step 1 time; what" in "".join(page.texts["p"])


def test_short_means_join_the_ones_behind_them(run):
    steps, losses = [20, 40, 44, 60, 80], [4.0, 3.0, 9.0, 2.0, 1.0]
    page = written(run(RECIPE, [entry(step, loss=loss) for step, loss in zip(steps, losses, strict=True)]))
    joined = (9.0 * 4 + 2.0 * 16) / 20
    np.testing.assert_allclose(page.values("Loss"), [[20, 4], [40, 3], [60, joined], [80, 1]], atol=0.05)


def test_no_number_breaks_a_curve(run):
    values = [math.nan, 0.5, math.inf, -math.inf, 1e300, 10**400, None, True, "0.1", [], 0.25]
    entries = [entry(i + 1, loss=x, lr=math.nan, grad_norm=0.0, images_per_second=5e-324) for i, x in enumerate(values)]
    page = written(run(RECIPE, entries))
    np.testing.assert_allclose(page.values("Loss"), [[2, 0.5], [11, 0.25]], atol=0.01)
    assert "5 entries left out: not a number, or far too large" in page.caption("Loss")
    assert page.caption("Learning rate") == "rate: 11 entries left out: not a number, or far too large"
    assert page.figures["Learning rate"].find("svg") is None
    assert (page.values("Norm of the gradient")[:, 1] == 0).all()
    for figure in page.figures.values():
        assert not [t for t in figure.iter("polyline") if re.search("nan|inf|e", t.get("points"))]
    lost = written(run(RECIPE, [entry(1), entry(2, loss=math.nan)], name="lost"))
    assert "; the last loss is not a number;" in lost.state


def test_one_entry_is_a_dot(run):
    page = written(run(RECIPE, [{"step": 7, "loss": 0.5}]))
    np.testing.assert_allclose(page.values("Loss"), [[7, 0.5]], atol=0.01)
    (dot,) = page.figures["Loss"].iter("circle")
    assert f"{dot.get('cx')},{dot.get('cy')}" == next(page.figures["Loss"].iter("polyline")).get("points")
    assert [*page.figures] == ["Loss"]
    assert ["skipped updates", "0"] in page.rows


def test_names_and_values_may_hold_anything(run):
    recipe = {"options": {EVIL: EVIL, "model": EVIL, "lone": "\ud800 \x00", "long": "x" * 100_000},
              "versions": {EVIL: [EVIL]}, "data": {EVIL: EVIL}, "labels": [EVIL, {EVIL: 1}]}  # fmt: skip
    name = EVIL.replace("/", "") + os.fsdecode(b"\xff\n")
    folder = run(recipe, [entry(1)], [{"command": EVIL, EVIL: EVIL, "top1": {EVIL: EVIL}, f"top{EVIL}": 0.5}], name)
    page = written(folder)
    shown = EVIL.replace("/", "") + "\\xff\\n"
    assert page.texts["h1"] == [shown]
    assert page.texts["title"][0] == f"{shown}: {EVIL}"
    quoted = EVIL.replace('"', '\\"')
    assert page.texts["li"] == [EVIL, f'{{"{quoted}": 1}}']
    assert ["lone", "\\ud800 \\x00"] in page.rows
    assert ["long", "x" * 300 + "…"] in page.rows
    assert [EVIL, f'["{quoted}"]'] in page.rows
    assert ["evaluation", "features", "top1", f"top{EVIL}", "conditions"] in page.rows
    assert [EVIL, EVIL, EVIL, "", f"{EVIL}: {EVIL}"] in page.rows
    assert ["", "", "50.0 %"] in page.rows


@pytest.mark.parametrize("content", ["", "{", "[]", "7", "[" * 100_000, '{"options": 5, "labels": "no", "data": []}'])
def test_descriptions_that_are_none_are_said_and_left_out(run, content):
    folder = run(entries=[entry(1)])
    for name in ("recipe.json", "config.json", "results.json"):
        (folder / name).write_text(content)
    page = written(folder)
    said = " ".join(page.texts["p"])
    assert page.state.startswith("At step 1; how many were asked for is not known;")
    assert len(page.values("Loss")) == 1
    is_object, is_list = content.startswith('{"'), content == "[]"
    problem = "does not hold what it should." if is_list or content == "7" else "cannot be read."
    for name in ("recipe.json", "config.json"):
        assert (f"{name} {problem}" in said) != is_object
    assert ("The recipe names no options." in said) == is_object
    wrong = "does not hold what it should." if is_object or content == "7" else problem
    assert ("No evaluation is known." if is_list else f"results.json {wrong} No evaluation is known.") in page.texts[
        "p"
    ]


def test_the_first_the_last_and_some_pictures_between_are_in_the_page(run):
    folder = run(RECIPE, [entry(1)])
    pictures = folder / "reconstructions"
    pictures.mkdir()
    steps = [*range(0, 1_000_000, 100_000), 1_000_000]  # by number, not by name
    for i, step in enumerate(steps):
        (pictures / f"step-{step:06}.png").write_bytes(png(i))
    (pictures / "step-2000000.png").write_bytes(png(99)[:-4])  # being written
    (pictures / "step-3000000.png").mkdir()
    (pictures / "other.png").write_bytes(png(98))
    page = written(folder)
    assert page.pictures == [png(i) for i in (10, 0, 2, 4, 6, 8)]
    captions = ["Step 1,000,000", *(f"Step {step:,}" for step in steps[:10:2])]
    assert page.texts["figcaption"][-6:] == captions
    (large,) = (f for f in page.tree.iter("figure") if f.get("class") == "large")
    assert large.find("figcaption").text == captions[0]
    assert "2 pictures left out: not a whole PNG file." in page.texts["p"]
    assert all(attributes["alt"] for tag, attributes in page.tags if tag == "img")
    for i in range(1, len(steps)):
        (pictures / f"step-{steps[i]:06}.png").unlink()
    assert written(folder).pictures == [png(0)]


def test_a_long_run_makes_a_small_page_within_seconds(run):
    folder, count = run(RECIPE), 200_000
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, count + 1):
            file.write(json.dumps(entry(step, loss=1 + step % 2, val_loss=float(step))) + "\n")
    start = time.perf_counter()
    page = written(folder)
    assert time.perf_counter() - start < 20  # about two seconds, on cores that others use too
    assert len(page.source) < 200_000
    loss = page.values("Loss")
    assert 250 <= len(loss) <= 1000
    np.testing.assert_allclose(page.values("Loss", 1)[:, 1], loss[:, 0], rtol=0.01, atol=400)
    assert "training: last 1, lowest 1, highest 2; each point is the mean of 400 entries" in page.caption("Loss")
    np.testing.assert_allclose(page.values("Waiting for data")[:, 1], 25, rtol=0.01)


def test_a_page_that_cannot_be_written_leaves_the_old_one(run, monkeypatch):
    folder = run(RECIPE, [entry(1)])
    before = write_report(folder).read_bytes()
    replace = os.replace

    def full(source, target):
        if str(target).endswith("report.html"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    (folder / "metrics.jsonl").write_text(json.dumps(entry(2)))
    with pytest.raises(CheckpointError) as refusal:
        write_report(folder)
    words = f"report.html could not be written into {folder}: No space left on device; report.html from before is whole"
    assert str(refusal.value) == words
    assert (folder / "report.html").read_bytes() == before
    assert sorted(x.name for x in folder.iterdir()) == ["metrics.jsonl", "recipe.json", "report.html"]
