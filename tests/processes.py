"""Processes that start at once: forked from one that has imported PyTorch and the commands and done nothing else."""

import atexit
import contextlib
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["mae.__main__", "torch._dynamo"])


class Command(CONTEXT.Process):
    """``python -m mae`` in a session of its own, which writes into ``<place>.out`` and ``<place>.err``.

    ``before`` is called in it first; ``environment`` is added to that of the tests.
    """

    def __init__(self, place: Path, *arguments: str, before: Callable = bool, **environment: str):
        super().__init__()
        self.files = [place.with_name(place.name + end) for end in (".out", ".err")]
        self.call = before, ["mae", *arguments], os.environ | environment
        self.start()
        atexit.register(self.kill_group)  # or pytest would wait for what a failed test has left behind

    def kill_group(self) -> None:
        if self.is_alive():
            os.killpg(self.pid, signal.SIGKILL)

    def run(self) -> None:
        before, arguments, environment = self.call
        os.setsid()
        before()
        for number, file in enumerate(self.files, start=1):
            os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
        os.environ.update(environment)
        sys.argv = arguments
        del sys.modules["mae.__main__"]  # it is to be the main module
        runpy.run_module("mae", run_name="__main__", alter_sys=True)

    def poll(self) -> int | None:
        """The exit code, when it has ended: as :class:`subprocess.Popen` tells it."""
        return self.exitcode

    def ended(self, seconds: float = 300) -> tuple[str, str]:
        """What it has written, when it and all that it has started have ended."""
        end = time.monotonic() + seconds
        self.join(seconds)
        with contextlib.suppress(ProcessLookupError):
            while True:
                os.killpg(self.pid, 0)
                assert time.monotonic() < end, "it has not ended"
                time.sleep(0.01)
        return tuple(file.read_text() for file in self.files)


def torchrun(count: int, place: Path, *arguments: str) -> list[Command]:
    """So many processes of one run, in the environment that torchrun gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count)}
    ranks = map(str, range(count))
    return [Command(Path(f"{place}-{i}"), *arguments, **where, RANK=i, LOCAL_RANK=i) for i in ranks]
