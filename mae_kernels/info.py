"""What a bug report needs: versions, devices, and which back-end the ops take: ``python -m mae_kernels.info``.

Nothing here raises: what cannot be found out, such as the state of a broken driver, is reported in its place.
"""

import argparse
import os
import platform
import re
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch.utils import collect_env

from . import backend

# Variables that change what the ops do. Others stay out of the report, since they may hold secrets.
PREFIXES = (
    "MAE_KERNELS_", "TRITON_", "TORCH_", "TORCHDYNAMO_", "TORCHINDUCTOR_", "PYTORCH_", "CUDA_", "HIP_", "ROCR_", "HSA_",
    "NVIDIA_TF32_OVERRIDE", "OMP_", "MKL_", "KMP_",
)  # fmt: skip


def report() -> str:
    """The text that ``python -m mae_kernels.info`` prints."""
    variables = {name: value for name, value in sorted(os.environ.items()) if name.startswith(PREFIXES)}
    return f"{_table(facts() | variables)}\n\nEvery op takes:\n{_said(lambda: _table(backends()))}"


def facts() -> dict[str, str]:
    """Versions and devices."""
    packages = (__package__, "torch", "triton", "numpy", "einops")
    tell = {name: lambda name=name: import_module(name).__version__ for name in packages} | {
        "torch is built for": lambda: f"CUDA {torch.version.cuda}, ROCm {torch.version.hip}",
        "python": platform.python_version,
        "system": lambda: f"{collect_env.get_os(collect_env.run)}, {collect_env.get_python_platform()}",
        "cpu": _cpu,
        "torch on cpu": lambda: f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "gpus": lambda: collect_env.get_gpu_info(collect_env.run),
        "nvidia driver": lambda: collect_env.get_nvidia_driver_version(collect_env.run),
        "torch.cuda": _cuda,
        "accelerator": lambda: torch.accelerator.current_accelerator(check_available=True),
    }
    return {name: _said(tell[name]) for name in tell}


def backends() -> dict[str, str]:
    """Device and dtype -> what every op takes there, and why. One GPU of a name stands for all of that name."""
    gpus = {_said(torch.cuda.get_device_name, i): f"cuda:{i}" for i in range(torch.cuda.device_count())}
    return {
        f"{name}, {dtype}": _said(_taken, device, dtype)
        for name, device in {"cpu": "cpu", **gpus}.items()
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    }


def _taken(device: str, dtype: torch.dtype) -> str:
    x = torch.empty(0, device=device, dtype=dtype)
    if backend.takes_triton("op", x):
        import_module(".kernels", __package__)  # The ops import it too, and fail where it fails.
        return "triton"
    return f"eager, because {'; '.join(backend.why_not_triton(x))}".replace("tensor 0 is", "it is")


def _cpu() -> str:
    text = collect_env.get_cpu_info(collect_env.run)
    names = re.findall(r"^(?:Model name|machdep\.cpu\.brand_string|Name): *(.*)", text, re.MULTILINE)
    return f"{', '.join(names) or text}, {os.cpu_count()} cores"


def _cuda() -> str:
    torch.cuda.init()  # Its exception says what is wrong with the driver.
    return f"{torch.cuda.device_count()} devices"


def _said(tell: Callable[..., object], *args: Any) -> str:
    """What tell returns, or in its place what went wrong, in a line."""
    try:
        return str(tell(*args))
    except Exception as error:
        first, _, _ = str(error).strip().partition("\n")
        return f"{type(error).__name__}: {first}"


def _table(values: dict[str, str]) -> str:
    width = max(map(len, values))
    return "\n".join(f"{name:<{width}}  {'; '.join(value.splitlines())}".rstrip() for name, value in values.items())


def main(argv: list[str] | None = None) -> None:
    argparse.ArgumentParser(prog="python -m mae_kernels.info", description=__doc__.partition("\n")[0]).parse_args(argv)
    print(report())


if __name__ == "__main__":
    main()
