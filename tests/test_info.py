"""What a bug report prints: versions, the back-end that the ops really take, and no exception whatever is broken."""

import importlib.metadata
import os
import subprocess
import sys

import pytest
import torch
from conftest import DEVICE
from torch._subclasses.fake_tensor import FakeTensorMode

import mae_kernels
from mae_kernels import backend, info, use_backend

ON_CPU = "eager, because it is on cpu, not on a CUDA or ROCm device"
FLOAT64 = "it is torch.float64, but the kernels compute in float32"


def fields(text: str) -> dict[str, str]:
    """Name -> value, of versions, devices and variables, and of the back-ends."""
    return {name: value.strip() for name, _, value in (line.partition("  ") for line in text.splitlines())}


def backends(text: str) -> dict[str, str]:
    return fields(text.partition("Every op takes:\n")[2])


def on(device: str, taken: str, float64: str) -> dict[str, str]:
    """What is said of a device where the other dtypes are all alike."""
    alike = dict.fromkeys((f"{device}, torch.{name}" for name in ("float32", "float16", "bfloat16")), taken)
    return alike | {f"{device}, torch.float64": float64}


def test_command():
    shown = {"MAE_KERNELS_BACKEND": "eager", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "mae_kernels.info"]
    environment = {**os.environ, **shown, "SECRET_TOKEN": "hush"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    told = fields(result.stdout)
    assert told["mae_kernels"] == mae_kernels.__version__
    assert told["python"] == sys.version.split()[0]
    assert told["torch"] == torch.__version__
    assert told["einops"] == importlib.metadata.version("einops")
    assert told["cpu"].endswith(f", {os.cpu_count()} cores")
    assert told["torch on cpu"].endswith(", 1 threads")
    assert shown == {name: told[name] for name in shown}
    assert told["cpu, torch.float32"].startswith("eager, because the selected back-end is 'eager'; it is on cpu")
    assert "hush" not in result.stdout


@pytest.mark.skipif(DEVICE != "cpu", reason="the devices are those of a machine without a GPU")
def test_without_a_gpu(monkeypatch):
    assert backends(info.report()) == on("cpu", ON_CPU, f"{ON_CPU}; {FLOAT64}")
    with use_backend("triton"):
        refused = "RuntimeError: op: use_backend('triton') was asked for, but tensor 0 is "
        told = backends(info.report())
        assert told == on("cpu", "triton", refused + FLOAT64.removeprefix("it is "))
        monkeypatch.setattr(backend, "INTERPRETED", False)
        assert all(answer.startswith(refused) for answer in info.backends().values())


def gpus(monkeypatch, *found: tuple[str, tuple[int, int]]):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: found[i][0])
    monkeypatch.setattr(backend, "_capability", lambda device: found[device.index][1])


def test_gpus_of_two_names(monkeypatch):
    h100, t4 = ("NVIDIA H100 80GB HBM3", (9, 0)), ("Tesla T4", (7, 5))
    gpus(monkeypatch, h100, t4, h100)
    with FakeTensorMode():
        told = backends(info.report())
    old = "eager, because it is on cuda:1, of compute capability (7, 5), below (8, 0)"
    assert told == {
        **on("cpu", ON_CPU, f"{ON_CPU}; {FLOAT64}"),
        **on("NVIDIA H100 80GB HBM3", "triton", f"eager, because {FLOAT64}"),
        **on("Tesla T4", old, f"{old}; {FLOAT64}"),
    }


def test_without_triton(monkeypatch):
    gpus(monkeypatch, ("NVIDIA H100", (9, 0)))
    monkeypatch.setitem(sys.modules, "mae_kernels.kernels", None)
    monkeypatch.setitem(sys.modules, "triton", None)
    with FakeTensorMode():
        told = fields(info.report())
        assert told["triton"].startswith("ModuleNotFoundError: ")
        assert told["NVIDIA H100, torch.float32"].startswith("ModuleNotFoundError: ")
        monkeypatch.setattr(backend, "_triton_is_installed", lambda: False)
        told = fields(info.report())
    assert told["NVIDIA H100, torch.float32"] == "eager, because the package triton is not installed"


def raises(*_, **__):
    raise RuntimeError("CUDA error: unknown error\nCompile with TORCH_USE_CUDA_DSA")


def test_what_is_broken_is_told_in_its_place(monkeypatch, tmp_path):
    gpus(monkeypatch, ("NVIDIA H100", (9, 0)))
    error = "RuntimeError: CUDA error: unknown error"
    for owner, name in ((torch.cuda, "init"), (torch.cuda, "get_device_name"), (torch, "empty")):
        monkeypatch.setattr(owner, name, raises)
    monkeypatch.setenv("PATH", str(tmp_path))
    told = fields(info.report())
    assert told["torch.cuda"] == error
    assert "not found" in told["cpu"]
    assert (told["gpus"], told["nvidia driver"]) == ("None", "None")
    assert backends(info.report()) == on("cpu", error, error) | on(error, error, error)

    monkeypatch.setattr(torch.cuda, "device_count", raises)
    assert info.report().endswith(f"\n\nEvery op takes:\n{error}")
    monkeypatch.setattr(info, "collect_env", None)
    assert fields(info.report())["system"].startswith("AttributeError: ")
