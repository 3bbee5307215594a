"""The pages of docs tell the truth: their snippets run, their commands exist, and so do their pictures."""

import re
import runpy

import numpy as np
import pytest
import test_readme
from PIL import Image

FOLDER = test_readme.ROOT / "docs"
INPUTS = (FOLDER / "inputs.md").read_text(encoding="utf-8")
SNIPPETS, COMMANDS = test_readme.snippets(INPUTS), test_readme.commands(INPUTS)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippets_run_and_their_shapes_are_right(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    test_readme.test_snippets_run_and_their_shapes_are_right(snippet)


def of_training() -> list[list[str]]:
    """What follows ``mae`` in the commands of these pages, whatever starts them."""
    pages = ((FOLDER / f"{name}.md").read_text(encoding="utf-8") for name in ("training", "finetuning"))
    return [line[line.index("mae") + 1 :] for page in pages for line in test_readme.commands(page)]


@pytest.mark.parametrize("command", [*(c[3:] for c in COMMANDS), *of_training()], ids=" ".join)
def test_commands_take_their_options(command, capsys):
    test_readme.test_commands_take_their_options(command, capsys)


def test_every_picture_is_shown_and_all_of_them_are_small():
    shown = re.findall(r"!\[[^]]+\]\((pictures/.+?)\)", INPUTS)
    assert sorted(shown) == sorted(f"pictures/{x.name}" for x in (FOLDER / "pictures").iterdir())
    assert sum((FOLDER / x).stat().st_size for x in shown) < 1e6


def test_the_script_makes_the_picture_that_is_shown(tmp_path, monkeypatch):
    """After one step instead of all: two thirds, masked sounds and originals, do not depend on what is learned."""
    script = runpy.run_path(str(FOLDER / "pictures.py"))
    settings, recipe_of = script["sound"].__globals__, script["recipe_of"]
    for name, value in {
        "FOLDER": tmp_path,
        "RUNS": tmp_path,
        "recipe_of": lambda **x: recipe_of(**x | {"steps": 1}),
    }.items():
        monkeypatch.setitem(settings, name, value)
    script["sound"]()
    made, shown = (np.asarray(Image.open(x / "sound.png").convert("L"), int) for x in (tmp_path, FOLDER / "pictures"))
    assert 0.6 < (abs(made - shown) < 16).mean() < 1
