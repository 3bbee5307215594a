"""Run folders: one run in each, and one run at a time that writes there."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from mae.run_files import (
    CHECKPOINTS,
    CONFIG,
    EVENTS,
    METRICS,
    RECIPE,
    RECONSTRUCTIONS,
    REPORT,
    RESULTS,
    WEIGHTS,
    mistakes_name,
    predictions_name,
)
from mae.training.parallel import Processes

_OF_A_RUN = (WEIGHTS, METRICS, CONFIG, CHECKPOINTS)
_BESIDE = (RECIPE, RECONSTRUCTIONS, EVENTS, REPORT, RESULTS)  # that alone are none
_LOCK, _STAGE, _ASIDE, _GONE = ".lock", ".replacing", ".replaced", ".gone"

Mode = Literal["new", "overwrite", "resume"]


class RunError(Exception):
    """A folder that a run may not write into; the message says why and what would help."""


@contextmanager
def open_run(folder: Path, mode: Mode = "new", processes: Processes = Processes()) -> Iterator[Callable[[], None]]:
    """Hold the folder of a run, which is made if it is not there.

    A run that is overwritten is set aside, and comes back if the block ends before it has called what it is given,
    which it does as soon as its first step is done.

    Raises:
        RunError: the folder holds a run that is neither overwritten nor resumed, another run writes there, or the
            folder cannot be made.
    """
    lock, new = FileLock(folder / _LOCK, timeout=0, is_singleton=True), []
    with processes.together():
        if processes.leads:
            new = _hold(folder, lock, mode)
    try:
        yield lambda: _let_old_go(folder) if processes.leads else None
    finally:
        if processes.leads:
            _bring_back(folder)
            _let_go(folder, lock, new)


def _hold(folder: Path, lock: FileLock, mode: Mode) -> list[Path]:
    refuse_file(folder)
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise RunError(f"another process writes into {folder}; choose another --out, or wait for it") from None
    except OSError as error:
        raise RunError(f"nothing can be written into {folder}: {error.strerror or error}") from error
    try:
        _bring_back(folder)  # a process was killed in its first step
        refuse_run(folder, mode != "new")
        if mode == "overwrite":
            _set_aside(folder)
    except BaseException:
        _let_go(folder, lock, new)
        raise
    return new


def _set_aside(folder: Path) -> None:
    stage = folder / _STAGE
    stage.mkdir(exist_ok=True)
    for path in _parts(folder):
        path.rename(stage / path.name)
    stage.rename(folder / _ASIDE)  # from here on a whole run is there


def _bring_back(folder: Path) -> None:
    """The run that was set aside, or a part of one, in place of what has not come to a step."""
    shutil.rmtree(folder / _GONE, ignore_errors=True)
    for aside in (folder / _STAGE, folder / _ASIDE):
        if aside.is_dir():
            for path in aside.iterdir():
                place = folder / path.name
                shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
                path.rename(place)
            aside.rmdir()


def _let_old_go(folder: Path) -> None:
    if (folder / _ASIDE).is_dir():
        (folder / _ASIDE).rename(folder / _GONE)  # half of it must not come back
        shutil.rmtree(folder / _GONE, ignore_errors=True)


def _parts(folder: Path) -> list[Path]:
    named = [folder / name for name in (*_OF_A_RUN, *_BESIDE) if (folder / name).exists()]
    return named + [path for name in (predictions_name("*"), mistakes_name("*")) for path in folder.glob(name)]


def _let_go(folder: Path, lock: FileLock, new: list[Path]) -> None:
    lock.release()
    if not lock.is_locked:
        with suppress(OSError):
            (folder / _LOCK).unlink()
        with suppress(OSError):  # the first one that holds something
            for path in new:
                path.rmdir()


def refuse_run(folder: Path, replaces: bool = False) -> None:
    """Raise :class:`RunError` where a run would be replaced unasked, or there can be no folder."""
    refuse_file(folder)
    found = [name for name in _OF_A_RUN if (folder / name).exists()]
    if found and not replaces:
        raise RunError(
            f"{folder} holds a run already ({', '.join(found)}); add --resume to go on with it, or --overwrite, "
            "or choose another --out"
        )


def refuse_file(folder: Path) -> None:
    """Raise :class:`RunError` where there can be no folder, because a file is there or above."""
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise RunError(f"{folder} cannot be a folder: {path} is a file")
