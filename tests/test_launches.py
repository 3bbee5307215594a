"""The launches that break first, compiled for every chip and by the oldest Triton; ``make compile`` takes them all."""

import json
import subprocess
import sys
from pathlib import Path

import launches
import peers
import pytest
import torch
from cases import BF16, F16, F32, U8
from conftest import DEVICE

import mae_kernels
from benchmarks.measure import OpRecorder
from mae_kernels import registration, use_backend

triton = pytest.importorskip("triton")
from benchmarks.inspect import CHIPS  # noqa: E402

# launches as a command, with a compiler that ends as LLVM does when it meets what it cannot lower, and no limits.
PLANTED = """
import os, sys
from dataclasses import replace
import launches
from benchmarks.inspect import CHIPS, Launch

compiled = Launch.compiled

def compile_or_abort(launch):
    if launch.kernel == "gather_tokens":
        os.write(2, b"LLVM ERROR: planted\\n")
        os.abort()
    return compiled(launch)

Launch.compiled = compile_or_abort
CHIPS["sm_90"] = replace(CHIPS["sm_90"], shared_kib=0)
launches.LIMIT_YZ = 0
sys.exit(launches.main())
"""


def learned(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


def ids(n: int, k: int) -> torch.Tensor:
    return torch.arange(k).repeat(n, 1)


def embed(patch: int, dtype: torch.dtype, *, images: bool = False, **tables: torch.Tensor) -> torch.Tensor:
    """``images``: they have a gradient too."""
    pixels, weight = learned(4, 3, 8 * patch, 8 * patch, dtype=dtype), learned(192, 3, patch, patch, dtype=dtype)
    return mae_kernels.patch_embed(pixels.requires_grad_(images), weight, learned(192), ids_keep=ids(4, 16), **tables)


def loss(patch: int, dtype: torch.dtype, c: int = 3, **options) -> torch.Tensor:
    images, pred = torch.zeros(4, c, 8 * patch, 8 * patch, dtype=U8), learned(4, 48, c * patch**2, dtype=dtype)
    return mae_kernels.masked_mse(pred, images, patch_size=patch, ids_mask=ids(4, 48), **options)


def gather(d: int) -> torch.Tensor:
    return mae_kernels.gather_tokens(learned(4, 49, d, dtype=F16), ids(4, 12))


def crop(height: int, width: int) -> None:
    images, boxes = torch.zeros(4, 3, 50, 37, dtype=U8), torch.tensor([[0, 0, 50, 37]] * 4)
    mae_kernels.random_resized_crop(images, boxes, torch.zeros(4, dtype=torch.bool), (height, width))


# Narrow and odd patches in half precision, products in float32, the largest tiles, and every other kernel.
CALLS = [
    lambda: embed(1, F16),
    lambda: embed(3, BF16, images=True, pos_embed=learned(64, 192)),
    lambda: embed(5, F32, images=True),
    lambda: loss(3, F16),
    lambda: loss(32, BF16, c=13, layout="channels_first"),
    lambda: gather(100),
    lambda: mae_kernels.scatter_mask_tokens(learned(4, 13, 1024), learned(1024), ids(4, 49), learned(49, 1024)),
    lambda: mae_kernels.random_masking(4, 1024),
    lambda: mae_kernels.random_masking(4, 5000),
    lambda: crop(9, 20),
]


def recorded(folder: Path, *functions) -> Path:
    """The calls of ops that these functions and their gradients make."""
    with OpRecorder() as recorder:
        for function in functions:
            out = function()
            if isinstance(out, torch.Tensor):
                out.sum().backward()
    path = folder / "calls.jsonl"
    path.write_text("".join(launches.encoded(op.overloadpacket.__name__, args) for op, args in recorder.calls))
    return path


def compile_all(calls: Path, *options: str, code: str = "") -> subprocess.CompletedProcess:
    command = [*(["-c", code] if code else [launches.__file__]), "--here", "--jobs", "1"]
    command += ["--calls", str(calls), "--outcomes", str(calls.with_name("outcomes.jsonl")), *options]
    environment = launches.environment(triton.__version__)
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)


OTHERS = [chip for chip in CHIPS if chip not in ("sm_80", "sm_90")]  # sm_86 has the instructions of sm_80, less memory


@pytest.mark.parametrize("chosen", [["sm_90"], pytest.param(OTHERS, marks=pytest.mark.slow)], ids=["one", "others"])
def test_what_breaks_first_compiles(chosen, tmp_path):
    result = compile_all(recorded(tmp_path, *CALLS), *(word for chip in chosen for word in ("--chip", chip)))
    assert result.returncode == 0, result.stdout + result.stderr
    assert [line.split()[1] for line in result.stdout.splitlines()] == chosen


@pytest.mark.slow
def test_narrow_patches_compile_under_the_oldest_triton(tmp_path):
    peers.find("triton-3.6")
    calls = recorded(tmp_path, *(lambda width=width: embed(width, BF16) for width in (1, 2, 4)))
    command = [sys.executable, launches.__file__, "--triton", launches.OLDEST, "--chip", "sm_90", "--chip", "sm_100"]
    command += ["--jobs", "1", "--calls", str(calls), "--outcomes", str(tmp_path / "outcomes.jsonl")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [line.split()[:4] for line in result.stdout.splitlines()[1:]] == [
        [launches.OLDEST, chip, "4", "0"] for chip in ("sm_90", "sm_100")
    ]


@pytest.mark.slow
def test_failures_are_told_and_nothing_is_compiled_twice(tmp_path):
    calls = recorded(tmp_path, lambda: gather(64))
    first = compile_all(calls, "--chip", "sm_90", code=PLANTED)
    assert first.returncode == 1, first.stderr
    assert first.stdout.splitlines()[1:] == [
        "    1 x gather_tokens: LLVM ERROR: planted",
        "    1 x gather_tokens_backward: too much shared memory",
        "    1 x a grid of 1 blocks along y",
        "    1 x a grid of 1 blocks along z",
    ]
    outcomes = (tmp_path / "outcomes.jsonl").read_text()
    assert [json.loads(line)["kernel"] for line in outcomes.splitlines()] == ["gather_tokens", "gather_tokens_backward"]

    second = compile_all(calls, "--chip", "sm_90")
    assert second.returncode == 1
    assert second.stdout.splitlines()[1:] == ["    1 x gather_tokens: LLVM ERROR: planted"]
    assert (tmp_path / "outcomes.jsonl").read_text() == outcomes


def test_each_call_is_recorded_once_as_it_was_made(tmp_path, monkeypatch):
    monkeypatch.setattr(registration, "_run_kernels", registration._run_kernels)  # restored afterwards
    monkeypatch.setenv(launches.RECORD, str(tmp_path / "calls.jsonl"))
    launches.pytest_configure()
    tokens = torch.randn(3, 64, 9, device=DEVICE).transpose(1, 2)[:, 1:]
    with use_backend("triton"):
        for values in (tokens, tokens + 0, tokens):
            mae_kernels.gather_tokens(values, ids(3, 2).to(DEVICE))
    (op, args), (_, (other, _)) = map(launches.decoded, (tmp_path / "calls.jsonl").read_text().splitlines())
    assert op == "gather_tokens"
    for x, y in ((args[0], tokens), (args[1], ids(3, 2)), (other, tokens + 0)):
        assert (x.shape, x.stride(), x.storage_offset()) == (y.shape, y.stride(), y.storage_offset())
        assert (x.dtype, x.device.type) == (y.dtype, "meta")
