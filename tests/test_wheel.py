"""A wheel works where the repository is not, with the packages that its metadata asks for and no others."""

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import mae_kernels

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """Built from a copy of the repository, because setuptools writes beside the sources."""
    sources, made = tmp_path_factory.mktemp("sources") / "copy", tmp_path_factory.mktemp("made")
    shutil.copytree(ROOT, sources, ignore=shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "runs"))
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, made], cwd=sources, capture_output=True, check=True)
    (file,) = made.iterdir()
    return zipfile.ZipFile(file)


class Environment:
    """A Python that has the wheel and what it requires, and a folder to work in.

    What is required is linked from the environment of the tests. The .pth files there are not read, so that an editable
    install of the repository stays unseen.
    """

    def __init__(self, folder: Path, wheel: zipfile.ZipFile, extra: str = ""):
        self.folder, self.python = folder / "elsewhere", folder / "venv" / "bin" / "python"
        self.folder.mkdir()
        venv.create(folder / "venv", symlinks=True)
        (self.packages,) = (folder / "venv").glob("lib/python*/site-packages")
        wheel.extractall(self.packages)
        (installed,) = distributions(path=[str(self.packages)])
        for package in required(installed, extra):
            for name in {file.parts[0] for file in package.files} - {"..", "__pycache__"}:
                if not (self.packages / name).exists():  # folders such as nvidia belong to several packages
                    (self.packages / name).symlink_to(package.locate_file(name))

    def run(self, *arguments: str) -> subprocess.CompletedProcess:
        shown = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return subprocess.run(
            [self.python, *arguments], cwd=self.folder, env=shown, capture_output=True, text=True, check=False
        )


def required(by: Distribution, extra: str = "") -> Iterator[Distribution]:
    for requirement in map(Requirement, by.requires or []):
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            yield (found := distribution(requirement.name))
            for wanted in {"", *requirement.extras}:
                yield from required(found, wanted)


@pytest.fixture(scope="module")
def plain(wheel, tmp_path_factory) -> Environment:
    return Environment(tmp_path_factory.mktemp("plain"), wheel)


def test_it_holds_both_packages_whole_and_nothing_else(wheel):
    info = f"mae_kernels-{mae_kernels.__version__}.dist-info"
    packed = {name for name in wheel.namelist() if not name.startswith(f"{info}/")}
    files = [file for package in ("mae", "mae_kernels") for file in (ROOT / package).rglob("*.*")]
    assert packed == {str(file.relative_to(ROOT)) for file in files if file.suffix != ".pyc"} | {
        "mae/fashion_mnist/LICENSE"
    }
    licences = {f"{info}/licenses/{name}" for name in ("LICENSE", "mae/fashion_mnist/LICENSE")}
    assert licences <= set(wheel.namelist())


def test_its_description_shows_and_links_nothing_that_only_the_repository_has(wheel):
    text = wheel.read(f"mae_kernels-{mae_kernels.__version__}.dist-info/METADATA").decode()
    assert "# mae_kernels\n" in text
    assert "](http" in text
    assert text.count("](") == text.count("](http")


def test_the_ops_need_no_extra_and_import_no_triton(plain):
    code = "import mae_kernels, sys; print(mae_kernels.__file__, 'triton' in sys.modules)"
    result = plain.run("-c", code)
    assert (result.stdout, result.stderr) == (f"{plain.packages / 'mae_kernels' / '__init__.py'} False\n", "")


@pytest.mark.parametrize("arguments", [["-m", "mae", "--help"], ["-m", "mae", "demo"]])
def test_without_its_extra_mae_says_in_one_sentence_what_installs_it(plain, arguments):
    result = plain.run(*arguments)
    assert (result.returncode, result.stdout) == (1, "")
    sentence = r"mae needs ((\w+, )*tqdm(, \w+)*), which pip install 'mae_kernels\[mae]' installs\n"
    assert re.fullmatch(sentence, result.stderr)


@pytest.mark.slow  # 20 seconds, and every part of it is tried without a wheel too
def test_mae_needs_its_extra_alone(wheel, tmp_path):
    with_extra = Environment(tmp_path, wheel, "mae")
    result = with_extra.run("-m", "mae", "demo", "--steps", "50")
    assert result.returncode == 0, result.stderr
    assert (with_extra.folder / "runs" / "demo" / "report.html").is_file()
    result = with_extra.run("-c", "import mae; print(mae.__file__)")
    assert result.stdout == f"{with_extra.packages / 'mae' / '__init__.py'}\n"
