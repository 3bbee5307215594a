"""What a bug report prints: every op, the back-end that it really takes, and no exception whatever is broken."""

import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import DEVICE
from torch._subclasses.fake_tensor import FakeTensorMode

import mae_kernels
from mae_kernels import backend, info, use_backend

OPS = {
    name.removeprefix("mae_kernels::")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("mae_kernels::") and not name.endswith("_backward")
}


def table(text: str) -> dict[str, list[str]]:
    """Function -> its cells, of the table of back-ends."""
    _, *rows = text[text.index("back-end: ") :].partition("\n\n")[0].splitlines()
    return {name: cells for name, *cells in map(str.split, rows)}


def fields(text: str) -> dict[str, str]:
    """Everything above that table, name -> value."""
    lines = text.partition("back-end: ")[0].splitlines()
    return {name: value.strip() for name, _, value in (line.partition("  ") for line in lines if line)}


def command(code: str = "from mae_kernels import info; info.main([])", **environment: str):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_every_op_appears():
    functions = set(table(info.report()))
    assert OPS & set(mae_kernels.__all__) <= functions
    assert {op for op in OPS if not functions & {op, *info.FUNCTIONS.get(op, ())}} == set()
    assert functions <= set(mae_kernels.__all__)
    assert set(info.ops().values()) == OPS


def test_command():
    result = subprocess.run([sys.executable, "-m", "mae_kernels.info"], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    told = fields(result.stdout)
    assert told["mae_kernels"] == mae_kernels.__version__
    assert told["python"].startswith(f"{sys.version.split()[0]}, ")
    assert told["torch"].startswith(f"{torch.__version__}, ")
    assert told["cpu"].endswith(("thread", "threads"))
    assert not any(line != line.rstrip() for line in result.stdout.splitlines())


@pytest.mark.skipif(DEVICE != "cpu", reason="where an op takes Triton, so does the report")
def test_it_imports_nothing_that_the_ops_would_not():
    code = """
import sys
from mae_kernels import info
info.main([])
print(*{"triton", "mae", "PIL", "sklearn", "matplotlib", "transformers"} & sys.modules.keys(), file=sys.stderr)
"""
    assert command(code).stderr.strip() == ""


@pytest.mark.skipif(DEVICE != "cpu", reason="the columns are those of a machine without a GPU")
def test_without_a_gpu():
    text = info.report()
    assert {tuple(cells) for cells in table(text).values()} == {("eager",)}
    assert text.endswith("\n\ncpu: eager, because it is on cpu, not on a CUDA or ROCm device")
    with use_backend("eager"):
        assert "cpu: eager, because the selected back-end is 'eager'; it is on cpu, not on" in info.report()


@pytest.mark.skipif(DEVICE != "cpu", reason="the interpreter is for machines without a GPU")
def test_interpreted_kernels_and_refusals(monkeypatch):
    with use_backend("triton"):
        text = info.report()
        assert "\nback-end: triton     cpu     cpu float64\n" in text
        assert table(text)["masked_mse"] == ["triton", "refused"]
        assert "\ncpu: triton\n" in text
        assert "cpu float64: refused, because it is torch.float64, but the kernels compute in float32" in text
        monkeypatch.setattr(backend, "INTERPRETED", False)
        assert set(table(info.report())["masked_mse"]) == {"refused"}


def test_environment():
    shown = {"MAE_KERNELS_BACKEND": "eager", "MAE_KERNELS_DEBUG": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = command(**shown, SECRET_TOKEN="hush")
    told = fields(result.stdout)
    assert shown == {name: told[name] for name in shown}
    assert "\nback-end: eager " in result.stdout
    assert "hush" not in result.stdout


def gpus(monkeypatch, *found: tuple[str, tuple[int, int], int]):
    def properties(i):
        name, (major, minor), memory = found[i]
        return SimpleNamespace(name=name, major=major, minor=minor, total_memory=memory * 2**30, gcnArchName="")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(backend, "_capability", lambda device: found[device.index][1])
    monkeypatch.setattr(torch.version, "hip", None)


def test_gpus_of_two_kinds(monkeypatch):
    h100, t4 = ("NVIDIA H100 80GB HBM3", (9, 0), 79), ("Tesla T4", (7, 5), 15)
    gpus(monkeypatch, h100, t4, h100)
    with FakeTensorMode():
        text = info.report()
    assert fields(text)["cuda:0,2"] == "NVIDIA H100 80GB HBM3, compute capability 9.0, 79 GiB"
    assert fields(text)["cuda:1"] == "Tesla T4, compute capability 7.5, 15 GiB"
    head, first = text[text.index("back-end: ") :].splitlines()[:2]  # the columns are aligned
    assert head == "back-end: auto       cpu    cuda:0,2  cuda:0,2 float64  cuda:1"
    assert first == "gather_tokens        eager  triton    eager             eager"
    assert {tuple(cells) for cells in table(text).values()} == {("eager", "triton", "eager", "eager")}
    assert text.endswith(
        "\n\ncpu: eager, because it is on cpu, not on a CUDA or ROCm device"
        "\ncuda:0,2: triton"
        "\ncuda:0,2 float64: eager, because it is torch.float64, but the kernels compute in float32"
        "\ncuda:1: eager, because it is on cuda:1, of compute capability (7, 5), below (8, 0)"
        "\nmasks of more than 4096 patches: triton, but torch.sort does the sorting"
    )


def test_kernels_that_cannot_be_imported(monkeypatch):
    gpus(monkeypatch, ("NVIDIA H100", (9, 0), 79))
    monkeypatch.setitem(sys.modules, "mae_kernels.kernels.masking", None)
    with FakeTensorMode():
        assert "\ntriton fails, because the kernels cannot be imported: ModuleNotFoundError: " in info.report()


def test_without_triton(monkeypatch):
    gpus(monkeypatch, ("NVIDIA H100", (9, 0), 79))
    monkeypatch.setattr(backend, "_triton_is_installed", lambda: False)
    with FakeTensorMode():
        text = info.report()
    assert fields(text)["triton"] == "not installed"
    assert text.endswith("\ncuda:0: eager, because the package triton is not installed")


def raises(*_, **__):
    raise RuntimeError("CUDA error: unknown error\nCompile with TORCH_USE_CUDA_DSA")


def test_a_broken_driver_is_reported(monkeypatch, tmp_path):
    def warns():
        warnings.warn("CUDA initialization: driver too old (found version 11040)\nPlease update", stacklevel=1)
        return False

    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(torch.cuda, "is_available", warns)
    text = info.report()
    assert fields(text)["driver"] == "nvidia-smi failed: NVIDIA-SMI has failed"
    assert fields(text)["cuda"] == "no device; CUDA initialization: driver too old (found version 11040)"
    assert table(text)["patch_embed"] == ["eager"]

    smi.write_text("#!/bin/sh\necho 580.65.06\necho 580.65.06\n")
    monkeypatch.setattr(torch.cuda, "is_available", raises)
    text = info.report()
    assert fields(text)["driver"] == "NVIDIA 580.65.06"
    assert fields(text)["cuda"] == "RuntimeError: CUDA error: unknown error"

    gpus(monkeypatch, ("NVIDIA H100", (9, 0), 79))
    monkeypatch.setattr(torch.cuda, "get_device_properties", raises)
    monkeypatch.setattr(torch, "empty", raises)
    text = info.report()
    assert fields(text)["cuda:0"] == "RuntimeError: CUDA error: unknown error"
    assert table(text)["patch_embed"] == ["error"]
    assert text.endswith("\ncpu; cuda:0: error, because RuntimeError: CUDA error: unknown error")


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (info.platform, "platform"),
        (info.metadata, "version"),
        (info.shutil, "which"),
        (torch, "get_num_threads"),
        (torch.accelerator, "current_accelerator"),
        (info, "ops"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_it_never_raises(owner, name, monkeypatch):
    monkeypatch.setattr(owner, name, raises)
    assert info.report().startswith("mae_kernels ")
