"""What tests share: one seed, readable names, both back-ends, and memory that shows what an op forgot to write."""

import functools
import importlib.util
import os

# As many processes as cores: more threads would wait for each other. NumPy's library asks once, when it is loaded.
if in_a_worker := "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

if in_a_worker:
    torch.set_num_threads(1)


def _replace_the_language_once_a_launch():
    """Triton's interpreter replaces the functions of its language in a launch and again in each call of a helper.

    Those calls replace nothing more, and take a third of the time of the tests that run kernels.
    """
    from triton.runtime import interpreter

    launch, replace, modules = interpreter.GridExecutor.__call__, interpreter._patch_lang, set()

    def launched(self, *args, **kwargs):
        modules.clear()
        return launch(self, *args, **kwargs)

    def replace_once(function):
        if function.__module__ in modules:
            return None
        modules.add(function.__module__)
        return replace(function)

    interpreter.GridExecutor.__call__, interpreter._patch_lang = launched, replace_once


# Float32 means float32 in every test: TF32 is PyTorch's default for convolutions. Assignments to `fp32_precision` would
# leave the older settings behind, and reading those would fail.
torch.backends.cudnn.allow_tf32 = False
torch.set_float32_matmul_precision("highest")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":  # before Triton is imported: its kernels then run in NumPy
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton"):
        _replace_the_language_once_a_launch()
# The first such call fixes, for the whole process, which functions take a default device. Were it made in a test that
# replaces torch.empty, the true one would not be among them in any later test.
with torch.device("cpu"):
    torch.empty(0)


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "eager: says nothing about the kernels, such as float64, which they leave to eager PyTorch"
    )


def pytest_collection_modifyitems(config, items):
    def is_left_to_eager(item):
        params = item.callspec.params if hasattr(item, "callspec") else {}
        says_nothing = torch.float64 in params.values() or item.get_closest_marker("eager")
        return params.get("backend") == "triton" and says_nothing

    config.hook.pytest_deselected(items=[item for item in items if is_left_to_eager(item)])
    items[:] = [item for item in items if not is_left_to_eager(item)]


def pytest_make_parametrize_id(val):
    if isinstance(val, torch.dtype):
        return str(val).removeprefix("torch.")
    if isinstance(val, tuple) and all(isinstance(x, int) for x in val):
        return "x".join(map(str, val)) or "none"
    return None


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=["eager", "triton"])
def backend(request):
    """The test runs in each back-end: on the GPU where there is one, else Triton's interpreter runs the kernels."""
    from mae_kernels import use_backend

    with torch.device(DEVICE), use_backend(request.param):
        yield request.param


@pytest.fixture
def poisoned_empty(monkeypatch):
    """New memory holds NaN, or the largest integer, as fresh memory may: an element never written is then seen."""

    def poisoned(allocate):
        @functools.wraps(allocate)
        def run(*args, **kwargs):
            x = allocate(*args, **kwargs)
            if x.dtype == torch.bool:
                return x.fill_(True)
            return x.fill_(float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max)

        return run

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
