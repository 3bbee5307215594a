"""Run folders: one run in each, and one process at a time that writes there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

_OF_A_RUN = ("model.safetensors", "metrics.jsonl", "config.json")
_LOCK = ".lock"


class RunError(Exception):
    """A folder that a run may not write into; the message says why and what would help."""


@contextmanager
def open_run(folder: Path, overwrite: bool = False) -> Iterator[None]:
    """Hold the folder of a run, which is made if it is not there. May be nested within a process.

    What is in it stays until the run writes its own: metrics with the first steps, weights with the first checkpoint.

    Raises:
        RunError: the folder holds a run and overwrite is False, another process writes there, this is one of several
            processes, or the folder cannot be made.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise RunError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but a run has one process so far, "
            "and several would each write the same files; start it without torchrun"
        )
    refuse_run(folder, overwrite)
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = FileLock(folder / _LOCK, timeout=0, is_singleton=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise RunError(f"another process writes into {folder}; choose another --out, or wait for it") from None
    except OSError as error:
        raise RunError(f"nothing can be written into {folder}: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()
        if not lock.is_locked:
            with suppress(OSError):
                (folder / _LOCK).unlink()
            with suppress(OSError):  # the first one that holds something
                for path in new:
                    path.rmdir()


def refuse_run(folder: Path, overwrite: bool = False) -> None:
    """Raise :class:`RunError` where a run would be overwritten, or there can be no folder."""
    refuse_file(folder)
    found = [name for name in _OF_A_RUN if (folder / name).exists()]
    if found and not overwrite:
        raise RunError(f"{folder} holds a run already ({', '.join(found)}); choose another --out, or add --overwrite")


def refuse_file(folder: Path) -> None:
    """Raise :class:`RunError` where there can be no folder, because a file is there or above."""
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise RunError(f"{folder} cannot be a folder: {path} is a file")
