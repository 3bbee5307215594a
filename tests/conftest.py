"""What every test shares: one seed, readable names, and memory that shows what an op forgot to write."""

import functools

import pytest
import torch


def pytest_make_parametrize_id(val):
    if isinstance(val, torch.dtype):
        return str(val).removeprefix("torch.")
    if isinstance(val, tuple) and all(isinstance(x, int) for x in val):
        return "x".join(map(str, val)) or "none"
    return None


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


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
