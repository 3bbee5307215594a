"""Packages of others that the tests import from folders of their own, where ``make test`` puts them.

Two versions of transformers or Triton cannot share an environment, transformers 4 fails beside a recent kernels, and
timm and lightly want a torchvision that has no CPU build everywhere. They import it for transforms that no test uses,
so stand-ins of its names suffice.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from contextlib import contextmanager
from pathlib import Path

import pytest

FOLDER = Path(sys.prefix) / "peers"


def find(name: str) -> Path:
    """The folder of a peer; skips the test where there is none."""
    if not (FOLDER / name).is_dir():
        pytest.skip(f"{name} is not installed; make test does it")
    return FOLDER / name


def import_peer(name: str):
    """The module ``name`` of timm or lightly; skips the test where it is neither installed nor in the folder."""
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        sys.path.append(str(find("timm")))
    with _torchvision_stand_in():
        return importlib.import_module(name)


@contextmanager
def _torchvision_stand_in():
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:  # transformers looks for torchvision too, and must not find this
        sys.meta_path.remove(finder)
        for module in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
            del sys.modules[module]


class _AnyName(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class _Module(types.ModuleType):
    def __getattr__(self, name):
        if name == "__version__":
            return "0.0.0"
        if name.startswith("__"):
            raise AttributeError(name)
        return _AnyName(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module):
        pass
