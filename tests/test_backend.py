"""Which back-end runs: by call, by block, by environment, and without Triton."""

import os
import subprocess
import sys

import pytest
import torch

from mae_kernels import masking_from_mask, use_backend, why_not_triton


def selected():
    return "eager" if any("'eager'" in reason for reason in why_not_triton()) else "other"


def test_use_backend():
    before = selected()
    with use_backend("eager"):
        assert selected() == "eager"
        with use_backend("auto"):
            assert selected() == "other"
        assert selected() == "eager"
    with pytest.raises(KeyError), use_backend("eager"):
        raise KeyError
    assert selected() == before
    call = use_backend("eager")
    try:
        assert selected() == "eager"
    finally:
        call.__exit__()
    with pytest.raises(ValueError), use_backend("cuda"):
        pass
    assert selected() == before


def test_triton_is_refused_for_a_mask_of_the_user():
    with use_backend("triton"), pytest.raises(RuntimeError, match=r"^masking_from_mask: use_backend"):
        masking_from_mask(torch.tensor([[True, False]]))


def test_why_not_triton():
    reasons = why_not_triton(torch.zeros(2, dtype=torch.float64), torch.zeros(2, device="meta"))
    assert "tensor 0 is on cpu, not on a CUDA or ROCm device" in reasons
    assert "tensor 0 is torch.float64" in reasons
    assert "tensor 1 is on meta, not on a CUDA or ROCm device" in reasons
    with use_backend("eager"):
        assert set(why_not_triton()) == {*why_not_triton(), "the selected back-end is 'eager'"}


def python(code, **environment):
    command = [sys.executable, "-c", f"import torch, sys\n{code}"]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("name", "code", "error"),
    [
        ("eager", "assert any(\"'eager'\" in reason for reason in mae_kernels.why_not_triton())", ""),
        (
            "triton",
            "mae_kernels.random_masking(2, 4)",
            "RuntimeError: random_masking: use_backend('triton') was asked for, but",
        ),
        (
            "cuda",
            "",
            "ValueError: the environment variable MAE_KERNELS_BACKEND must be one of 'auto', 'triton', 'eager', got",
        ),
    ],
    ids=["eager", "triton", "unknown"],
)
def test_backend_of_the_environment(name, code, error):
    result = python(f"import mae_kernels\n{code}", MAE_KERNELS_BACKEND=name)
    assert result.returncode == (1 if error else 0), result.stderr
    assert error in result.stderr


def test_importing_and_running_needs_no_triton():
    code = """
before = "triton" in sys.modules
import mae_kernels
ids = mae_kernels.random_masking(2, 4).ids_keep
assert ("triton" in sys.modules) == before, "mae_kernels imported triton"
sys.modules["triton"] = None
assert mae_kernels.gather_tokens(torch.ones(2, 4, 3), ids).sum() == 6
assert "the package triton is not installed" in mae_kernels.why_not_triton()
"""
    result = python(code)
    assert result.returncode == 0, result.stderr
