"""README and docs tell the truth: snippets run, commands, links and files exist, and nothing is said twice.

The commands' values are not tried, only that commands and options exist.
"""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from faults import FAULTS
from PIL import Image

import mae_kernels
from mae import Classifier, HeadConfig, mae_vit_tiny_patch16, save_checkpoint
from mae.__main__ import main

ROOT = Path(__file__).parent.parent
PLACES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("docs/*.md")),
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples" / "README.md",
]
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PLACES}
SNIPPETS = [
    pytest.param(snippet, id=f"{page}-{i}")
    for page, text in PAGES.items()
    for i, snippet in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
]
COMMANDS = [
    line.split("#")[0].split()
    for text in PAGES.values()
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    for line in block.splitlines()
]
OF_MAE = [words[words.index("mae") + 1 :] for words in COMMANDS if "-m mae " in f"{' '.join(words)} "]
OF_MODULES = sorted({words[2] for words in COMMANDS if words[:2] == ["python", "-m"]} - {"mae", "pytest"})


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippets_run_and_their_shapes_are_right(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "runs/classifier" in snippet:
        model = mae_vit_tiny_patch16()
        save_checkpoint(Classifier(model.config, HeadConfig(("cat", "dog"))), "runs/classifier")
    scope: dict = {}
    for statement in snippet.splitlines():
        exec(statement, scope)
        shape = re.search(r"#.*?\[([\d, +]+)\]", statement)
        if shape:
            value = scope[statement.split("=")[0].strip()]
            assert list(value.shape) == [eval(size) for size in shape[1].split(",")], statement
    if "loss" in scope:
        assert scope["loss"].isfinite()
        modules = [x for x in scope.values() if isinstance(x, torch.nn.Module)]
        has_gradients = any(p.grad is not None for module in modules for p in module.parameters())
        assert has_gradients == scope["loss"].requires_grad  # a training step has used and dropped them


@pytest.mark.parametrize("command", sorted({words[0] for words in OF_MAE}))
def test_commands_take_their_options(command, capsys):
    options = {word for words in OF_MAE if words[0] == command for word in words if word.startswith("--")} - {"--help"}
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert [option for option in options if not re.search(rf"{option}[ ,]", text)] == []


@pytest.mark.parametrize("module", OF_MODULES)
def test_commands_of_modules_explain_themselves(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(module, run_name="__main__")
    assert stop.value.code == 0
    assert f"usage: python -m {module}" in capsys.readouterr().out


def test_the_pages_name_every_target_of_make():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split()
    named = {
        target for text in PAGES.values() for target in re.findall(r"\bmake ([a-z-]+)`?(?:[ ;.,:)]|$)", text, re.M)
    }
    assert all(re.search(rf"^([\w-]+ )*{target}( [\w-]+)*:", makefile, re.MULTILINE) for target in targets)
    assert {words[1] for words in COMMANDS if words[:1] == ["make"]} <= set(targets)
    assert set(targets) - {"clean"} <= named


def test_links_lead_to_files_and_headings():
    def slug(heading: str) -> str:
        return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")

    for page, text in PAGES.items():
        for link in re.findall(r"\]\(([^)]+)\)", re.sub(r"`[^`]*`", "", text)):
            path, _, part = link.partition("#")
            target = (ROOT / page).parent.joinpath(path) if path else ROOT / page
            assert link.startswith("https://") or target.exists(), f"{page}: {link}"
            if part and not link.startswith("https://"):
                headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
                assert part in map(slug, headings), f"{page}: {link}"


def test_files_that_are_named_exist():
    files = {
        path.name
        for folder in ("mae", "mae_kernels", "benchmarks", "tests", "examples", "docs")
        for path in (ROOT / folder).rglob("*.py")
    }
    named = {name for text in PAGES.values() for name in re.findall(r"\b(\w+\.py)\b", text)}
    assert named - files <= {"setup.py", "OP.py", "test_OP.py"}


def test_no_page_repeats_another():
    """Sentences and lines of code of some length stand on one page alone."""
    seen: dict[str, str] = {}
    for page, text in PAGES.items():
        by_hand = re.sub(r"<!-- numbers of (\w+): begin -->.*?<!-- numbers of \1: end -->", "", text, flags=re.DOTALL)
        prose = " ".join(re.sub(r"```.*?```", "\n", by_hand, flags=re.DOTALL).split())
        for sentence in re.split(r"(?<=[.:;]) |\|", prose):
            sentence = sentence.strip()
            if len(sentence) > 50:
                assert seen.setdefault(sentence, page) == page, f"{page} repeats {seen[sentence]}: {sentence}"


def test_readme_is_short_and_counts_right():
    assert len(PAGES["README.md"].splitlines()) <= 170
    assert f"plants {len(FAULTS)} faults" in PAGES["docs/exactness.md"]


def test_the_public_surface_is_documented():
    pages = PAGES["docs/ops.md"] + PAGES["docs/drop-in.md"]
    for name in mae_kernels.__all__:
        assert re.search(rf"`(mae_kernels\.)?{name}\b", pages), name
        assert (getattr(mae_kernels, name).__doc__ or "").strip(), name


def test_importing_needs_no_extra():
    """The ops import with PyTorch, einops and NumPy alone: no Triton, no model packages."""
    code = "import sys, mae_kernels; print(*{'triton', 'PIL', 'sklearn', 'tyro', 'matplotlib'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


def test_every_picture_is_shown_and_all_of_them_are_small():
    shown = {
        (ROOT / page).parent.joinpath(link).resolve()
        for page, text in PAGES.items()
        for link in re.findall(r"!\[[^]]+\]\((.+?)\)", text)
    }
    pictures = {
        path
        for path in (ROOT / "docs").rglob("*.*")
        if path.suffix in (".png", ".svg") and path.parent.name != "results"
    }
    assert pictures <= shown
    assert sum(path.stat().st_size for path in pictures) < 1.5e6


def test_the_script_makes_the_picture_that_is_shown(tmp_path, monkeypatch):
    """After one step instead of all: two thirds, masked sounds and originals, do not depend on what is learned."""
    script = runpy.run_path(str(ROOT / "docs" / "pictures.py"))
    settings, recipe_of = script["sound"].__globals__, script["recipe_of"]
    for name, value in {
        "FOLDER": tmp_path,
        "RUNS": tmp_path,
        "recipe_of": lambda **x: recipe_of(**x | {"steps": 1}),
    }.items():
        monkeypatch.setitem(settings, name, value)
    script["sound"]()
    shown = ROOT / "docs" / "pictures" / "sound.png"
    made, shown = (np.asarray(Image.open(path).convert("L"), int) for path in (tmp_path / "sound.png", shown))
    assert 0.6 < (abs(made - shown) < 16).mean() < 1


def test_the_script_draws_the_data_flow_that_is_shown():
    """But for its three pictures, whose bytes depend on who wrote the PNG."""
    made = runpy.run_path(str(ROOT / "docs" / "data_flow.py"))["data_flow"]()
    shown = (ROOT / "docs" / "data_flow.svg").read_text(encoding="utf-8")
    assert re.sub('base64,[^"]*', "", made) == re.sub('base64,[^"]*', "", shown)
