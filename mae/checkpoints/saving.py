"""Files that are there whole or not at all, whatever stops the process that writes them."""

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mae.checkpoints.layouts import CheckpointError
from mae.reasons import reason_of

# What a killed save leaves: a folder of ours, which names its process, and the files of safetensors and of older saves.
_STAGE = re.compile(r"\.saving-(?P<host>.+)-(?P<process>\d+)-[0-9a-f]{8}")
_TEMPORARY = re.compile(r"\.tmp\w{6}|(model\.safetensors|(preprocessor_)?config\.json)\.tmp")
_MINUTE, _DAY = 60.0, 86400.0


def write_folder(folder: Path, state: dict[str, Tensor], descriptions: dict[str, dict[str, Any]]) -> None:
    """``model.safetensors`` and JSON files by their names, put in place when all of them are whole.

    Raises:
        CheckpointError: as of :func:`write_files`.
    """
    writers = _json_writers(descriptions)
    if folder.is_dir():
        for path in folder.iterdir():
            if _TEMPORARY.fullmatch(path.name) and path.is_file() and _idle(path) > _MINUTE:
                with contextlib.suppress(OSError):
                    path.unlink()
    write_files(folder, writers | {"model.safetensors": lambda path: write_safetensors(path, state)})


def write_json(folder: Path, descriptions: dict[str, Any]) -> None:
    """JSON files by their names.

    Raises:
        CheckpointError: as of :func:`write_files`.
    """
    write_files(folder, _json_writers(descriptions))


def _json_writers(descriptions: dict[str, Any]) -> dict[str, Callable[[Path], object]]:
    def writer(values: Any) -> Callable[[Path], object]:
        return lambda path: path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    return {name: writer(values) for name, values in descriptions.items()}


def write_safetensors(path: Path, state: dict[str, Tensor]) -> None:
    """With the format in its metadata, where transformers looks for it."""
    save_file(state, path, metadata={"format": "pt"})


def write_pickle(path: Path, content: Any) -> None:
    with path.open("wb") as file:  # given a path, torch.save does not say why it could not write
        torch.save(content, file)


def write_files(folder: Path, writers: Mapping[str, Callable[[Path], object]]) -> None:
    """Let each writer write beside its place, and put the files there when all of them are whole.

    Raises:
        CheckpointError: something could not be written; what was there before is as it was.
    """
    stage = folder / f".saving-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        stage.mkdir()
        for name, write in writers.items():
            path = stage / name
            path.touch()
            mode = path.stat().st_mode
            write(path)
            path.chmod(mode)  # safetensors makes its files private, whatever the umask says
        for name in writers:
            os.replace(stage / name, folder / name)
    except (OSError, RuntimeError, SafetensorError) as error:
        before = [name for name in writers if (folder / name).is_file()]
        kept = f"; {', '.join(before)} from before {'is' if len(before) == 1 else 'are'} whole" if before else ""
        raise CheckpointError(
            f"{', '.join(writers)} could not be written into {folder}: {reason_of(error)}{kept}"
        ) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    for path in folder.iterdir():
        if (name := _STAGE.fullmatch(path.name)) and not _is_written(path, name["host"], int(name["process"])):
            shutil.rmtree(path, ignore_errors=True)


def _is_written(stage: Path, host: str, process: int) -> bool:
    """Whether a process still writes there; of another machine, whose processes are not seen, the last day decides."""
    if host != socket.gethostname() or os.name != "posix":
        return _idle(stage) < _DAY
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _idle(path: Path) -> float:
    """Seconds since something changed there."""
    try:
        return time.time() - max(x.stat().st_mtime for x in (path, *(path.iterdir() if path.is_dir() else ())))
    except OSError:  # gone in the meantime
        return 0.0
