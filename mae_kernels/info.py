"""What a bug report needs: versions, devices, and which back-end each op takes: ``python -m mae_kernels.info``.

Nothing here raises: what cannot be found out, such as the state of a broken driver, is reported in its place.
"""

import argparse
import os
import platform
import shutil
import subprocess
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch

import mae_kernels
from mae_kernels import backend

# Shown when unset too: their defaults decide as well.
SETTINGS = {"MAE_KERNELS_BACKEND": "auto", "MAE_KERNELS_DEBUG": "0", "TRITON_INTERPRET": "0"}
PREFIXES = (
    "MAE_KERNELS_", "TRITON_", "TORCH_", "TORCHDYNAMO_", "TORCHINDUCTOR_", "PYTORCH_", "CUDA_", "HIP_", "ROCR_", "HSA_",
    "NVIDIA_TF32_OVERRIDE", "OMP_", "MKL_", "KMP_",
)  # fmt: skip

# The functions whose op has another name than they.
FUNCTIONS = {"masking": ("random_masking", "masking_from_mask")}

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def report() -> str:
    """The text that ``python -m mae_kernels.info`` prints."""
    accelerators, lines = _accelerators()
    tables = [versions(), [("cpu", _said(_cpu)), *lines], environment()]
    width = max(len(name) for table in tables for name, _ in table)
    sections = ["\n".join(f"{name:<{width}}  {value}" for name, value in table) for table in tables]
    return "\n\n".join([*sections, _said(lambda: backends({"cpu": "cpu", **accelerators}))])


def versions() -> list[tuple[str, str]]:
    return [
        ("mae_kernels", mae_kernels.__version__),
        ("python", _said(lambda: f"{platform.python_version()}, {platform.platform()}")),
        ("torch", _said(_torch)),
        ("triton", _said(_triton)),
        *((name, _said(lambda name=name: metadata.version(name))) for name in ("numpy", "einops")),
        ("driver", _said(_driver)),
    ]


def environment() -> list[tuple[str, str]]:
    """The variables in use here, whoever set them."""
    found = sorted(name for name in os.environ if name.startswith(PREFIXES) and name not in SETTINGS)
    default = [(name, os.environ.get(name, f"not set, so {value}")) for name, value in SETTINGS.items()]
    return default + [(name, os.environ[name]) for name in found]


def ops() -> dict[str, str]:
    """Function -> the op of the registry that it calls. A backward takes its own op, by the same rule."""
    names = [name for name in torch.ops.mae_kernels if not name.endswith("_backward")]
    return {function: name for name in sorted(names) for function in FUNCTIONS.get(name, (name,))}


def backends(devices: dict[str, str]) -> str:
    """Which back-end each op takes and why, for each kind of device and dtype: ``{name of the kind: one of them}``."""
    columns: dict[tuple, list[str]] = {}  # an answer of all ops, and why -> the devices and dtypes that get it
    for kind, device in devices.items():
        answers: dict[tuple, list[torch.dtype]] = {}
        for dtype in DTYPES:
            answers.setdefault(tuple(_taken(op, device, dtype) for op in ops().values()), []).append(dtype)
        for answer, dtypes in answers.items():
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            name = kind if DTYPES[0] in dtypes else f"{kind} {names}"
            columns.setdefault((answer, _why(device, dtypes[0])), []).append(name)
    kinds = ["; ".join(names) for names in columns.values()]
    rows = [[f"back-end: {backend._selected}", *kinds]]
    rows += ([function, *(answer[i] for answer, _ in columns)] for i, function in enumerate(ops()))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.append("")
    for (answer, why), kind in zip(columns, kinds, strict=True):
        lines.append(f"{kind}: {' or '.join(dict.fromkeys(answer))}" + (f", because {why}" if why else ""))
    if any("triton" in answer for answer, _ in columns):
        lines.append(_kernels())
    return "\n".join(lines)


def _taken(op: str, device: str, dtype: torch.dtype) -> str:
    try:
        x = torch.empty(0, device=device, dtype=dtype)
    except Exception:
        return "error"
    try:
        return "triton" if backend.takes_triton(op, x) else "eager"
    except RuntimeError:
        return "refused"


def _why(device: str, dtype: torch.dtype) -> str:
    def reasons() -> str:
        found = backend.why_not_triton(torch.empty(0, device=device, dtype=dtype))
        return "; ".join(reason.replace("tensor 0 is", "it is") for reason in found)

    return _said(reasons)


def _kernels() -> str:
    try:
        from mae_kernels.kernels.masking import MAX_PATCHES  # with Triton, which the ops would import too
    except Exception as error:
        return f"triton fails, because the kernels cannot be imported: {type(error).__name__}: {_first_line(error)}"
    return f"masks of more than {MAX_PATCHES} patches: triton, but torch.sort does the sorting"


def _said(tell: Callable[[], str]) -> str:
    """What tell returns, or in its place what went wrong, in a line."""
    try:
        return tell()
    except Exception as error:
        return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: Exception | Warning) -> str:
    return str(error).strip().partition("\n")[0]


def _torch() -> str:
    if torch.version.hip:
        built = f"ROCm {torch.version.hip}"
    elif torch.version.cuda:
        built = f"CUDA {torch.version.cuda}"
    else:
        built = "built without CUDA and ROCm"
    return f"{torch.__version__}, {built}"


def _triton() -> str:
    if not backend._triton_is_installed():
        return "not installed"
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:  # ROCm's, Windows' and nightly builds come under other names
        names = metadata.packages_distributions().get("triton", [])
        return ", ".join(f"{name} {metadata.version(name)}" for name in names) or "of unknown version"


def _driver() -> str:
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        result = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
        text = (result.stdout.strip() or result.stderr.strip()).partition("\n")[0]
        return f"NVIDIA {text}" if result.returncode == 0 else f"nvidia-smi failed: {text}"
    for name in ("nvidia", "amdgpu"):
        folder = Path("/sys/module") / name
        if folder.is_dir():
            version = folder / "version"
            return f"{name} {version.read_text().strip() if version.is_file() else 'of the kernel'}"
    return "none found"


def _cpu() -> str:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    threads = torch.get_num_threads()
    return (
        f"{model}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, "
        f"torch on {threads} thread{'s' * (threads != 1)}"
    )


def _accelerators() -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Kinds of device besides the CPU, ``{name of the kind: one of them}``, and a line about each."""
    with warnings.catch_warnings(record=True) as caught:  # how torch tells that a driver is broken
        warnings.simplefilter("always")
        try:
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        except Exception as error:
            return {}, [("cuda", f"{type(error).__name__}: {_first_line(error)}")]
    alike: dict[str, list[int]] = {}
    for i in range(count):
        alike.setdefault(_said(lambda i=i: _gpu(i)), []).append(i)
    kinds, lines = {}, []
    for text, indices in alike.items():
        kind = f"cuda:{','.join(map(str, indices))}"
        kinds[kind] = f"cuda:{indices[0]}"
        lines.append((kind, text))
    if not count:
        lines.append(("cuda", "; ".join(["no device", *(_first_line(w.message) for w in caught)])))
    other = _other_accelerator()
    if other is not None:
        lines.append((other, "an accelerator without kernels"))
        kinds[other] = other
    return kinds, lines


def _other_accelerator() -> str | None:
    """Such as Apple's mps; the CPU is none, and ROCm's devices are called cuda too."""
    try:
        device = torch.accelerator.current_accelerator(check_available=True)
    except Exception:
        return None
    return None if device is None or device.type == "cuda" else device.type


def _gpu(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    capability = f"compute capability {properties.major}.{properties.minor}"
    chip = properties.gcnArchName if torch.version.hip else capability
    return f"{properties.name}, {chip}, {properties.total_memory / 2**30:.0f} GiB"


def main(argv: list[str] | None = None) -> None:
    argparse.ArgumentParser(prog="python -m mae_kernels.info", description=__doc__.partition("\n")[0]).parse_args(argv)
    print(report())


if __name__ == "__main__":
    main()
