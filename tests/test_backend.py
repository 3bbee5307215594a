"""Which back-end runs: by call, by block, by environment, and without Triton."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import DEVICE
from torch._subclasses.fake_tensor import FakeTensorMode

from mae_kernels import backend, gather_tokens, kernels, reference, use_backend, why_not_triton


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


def test_why_not_triton():
    assert why_not_triton() == []
    on_cpu = torch.zeros(2, dtype=torch.float64)
    assert why_not_triton(on_cpu, torch.zeros(2, device="meta")) == [
        "tensor 0 is on cpu, not on a CUDA or ROCm device",
        "tensor 0 is torch.float64, but the kernels compute in float32",
        "tensor 1 is on meta, not on a CUDA or ROCm device",
    ]
    with use_backend("eager"):
        assert why_not_triton() == ["the selected back-end is 'eager'"]


def test_why_not_triton_on_an_old_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(backend, "_capability", backend._capability.__wrapped__)  # a GPU's own may be in the cache
    with FakeTensorMode():
        old = torch.empty(2, device="cuda:0")
    assert why_not_triton(old) == ["tensor 0 is on cuda:0, of compute capability (7, 5), below (8, 0)"]


def test_float64_goes_to_eager_pytorch_with_a_reason():
    x = torch.rand(2, 4, 3, dtype=torch.float64, device=DEVICE)
    ids = torch.tensor([[0, 1], [2, 3]], device=DEVICE)
    assert torch.equal(gather_tokens(x, ids), reference.gather_tokens(x, ids))
    with (
        use_backend("triton"),
        pytest.raises(RuntimeError, match=r"^gather_tokens: .* torch.float64, but the kernels compute in float32$"),
    ):
        gather_tokens(x, ids)


def test_the_kernels_run_when_asked_for():
    x, ids = torch.rand(2, 4, 3, device=DEVICE), torch.tensor([[0, 1], [2, 3]], device=DEVICE)
    calls = []
    original = kernels.gather_tokens
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "gather_tokens", lambda *args: calls.append(args) or original(*args))
        with use_backend("eager"):
            eager = gather_tokens(x, ids)
        assert not calls
        with use_backend("triton"):
            triton = gather_tokens(x, ids)
    assert len(calls) == 1
    assert torch.equal(eager, triton)


def python(code, **environment):
    command = [sys.executable, "-c", f"import torch, sys\n{code}"]
    return subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "0", **environment}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("name", "code", "error"),
    [
        ("eager", "assert any(\"'eager'\" in reason for reason in mae_kernels.why_not_triton())", ""),
        (
            "triton",
            "mae_kernels.random_masking(2, 4)",
            "RuntimeError: masking: use_backend('triton') was asked for, but tensor 0 is on cpu",
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
assert "mae_kernels.kernels" not in sys.modules
sys.modules["triton"] = None
assert mae_kernels.gather_tokens(torch.ones(2, 4, 3), ids).sum() == 6
assert "the package triton is not installed" in mae_kernels.why_not_triton()
"""
    result = python(code)
    assert result.returncode == 0, result.stderr
