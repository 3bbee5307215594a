"""The package as Hugging Face's kernels loads it: made by one command, beside the installed one, and by its rules."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import peers
import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mae_kernels"


@pytest.fixture(scope="module")
def layout(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "mae-kernels"
    subprocess.run([sys.executable, ROOT / "hub/make.py", folder], check=True)
    return folder


def imported(file: Path) -> set[str]:
    """Top-level names of what a file imports; relative imports have the name ``""``."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("" if node.level else node.module.partition(".")[0])
    return names


def test_imports_are_relative_or_of_what_every_user_has(layout):
    allowed = {"", "torch", "einops", *sys.stdlib_module_names}
    variants = [layout / "torch-ext/mae_kernels", *layout.glob("build/torch-*")]
    assert len(variants) == 6
    for variant in variants:
        files = {path.relative_to(variant).as_posix(): imported(path) for path in variant.rglob("*.py")}
        assert files.keys() == {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")}
        foreign = {name: found for name, names in files.items() if (found := names - allowed)}
        assert foreign == {name: {"triton"} for name in foreign if name.startswith("kernels/")}


def test_kernels_loads_it_beside_the_installed_package(layout):
    environment = {
        **os.environ,
        "PYTHONPATH": f"{peers.find('kernels')}{os.pathsep}{ROOT}",
        "LOCAL_KERNELS": "OWNER/mae-kernels=.",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, ROOT / "tests/loaded_by_kernels.py"]
    result = subprocess.run(command, cwd=layout, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 passed" in result.stdout
