"""The README tells the truth: its snippets run, its commands exist, and it promises no file that is not there."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from faults import FAULTS

from mae.__main__ import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def snippets(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page, re.DOTALL)


def commands(page: str) -> list[list[str]]:
    blocks = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    return [line.split("#")[0].split() for block in blocks for line in block.splitlines()]


SNIPPETS, COMMANDS = snippets(README), commands(README)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippets_run_and_their_shapes_are_right(snippet):
    scope: dict = {}
    for statement in snippet.splitlines():
        exec(statement, scope)
        shape = re.search(r"#.*?\[([\d, +]+)\]", statement)
        if shape:
            value = scope[statement.split("=")[0].strip()]
            assert list(value.shape) == [eval(size) for size in shape[1].split(",")], statement
    assert scope["loss"].isfinite()
    modules = [x for x in scope.values() if isinstance(x, torch.nn.Module)]
    has_gradients = any(p.grad is not None for module in modules for p in module.parameters())
    assert has_gradients == scope["loss"].requires_grad  # a training step has used and dropped them


@pytest.mark.parametrize("command", [c[3:] for c in COMMANDS if c[:3] == ["python", "-m", "mae"]], ids=" ".join)
def test_commands_take_their_options(command, capsys):
    options = [word for word in command if word.startswith("--")]
    with pytest.raises(SystemExit):
        main([command[0], "--help"])
    text = capsys.readouterr().out
    assert options
    assert all(re.search(rf"{option}[ ,]", text) for option in options)


@pytest.mark.parametrize(
    "module", [c[2] for c in COMMANDS if c[:2] == ["python", "-m"] and c[2] not in ("mae", "pytest")]
)
def test_commands_of_modules_explain_themselves(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(module, run_name="__main__")
    assert stop.value.code == 0
    assert f"usage: python -m {module}" in capsys.readouterr().out


def test_make_targets_exist():
    targets = {command[1] for command in COMMANDS if command[:1] == ["make"]}
    assert targets == {"bench", "compile", "demo", "faults", "gpu", "test", "test-all"}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^([\w-]+ )*{target}( [\w-]+)*:", makefile, re.MULTILINE) for target in targets)
    assert f"plants {len(FAULTS)} faults" in README


def test_linked_and_listed_files_exist():
    links = [link for link in re.findall(r"\]\((.*?)\)", README) if not link.startswith("http")]
    listed = re.findall(r"\b(?:[\w/]+/)?(\w+\.py)\b", README)
    folders = ("mae*", "mae/*", "mae_kernels/kernels", "benchmarks")
    here = {f.name for folder in folders for f in ROOT.glob(f"{folder}/*.py")}
    assert links
    assert all((ROOT / link).is_file() for link in links)
    assert listed
    assert set(listed) <= here


def test_the_public_surface_is_documented():
    import mae_kernels

    for name in mae_kernels.__all__:
        assert f"`{name}" in README or name in ("Masking", "patchify", "unpatchify", "reference"), name
        assert (getattr(mae_kernels, name).__doc__ or "").strip(), name
