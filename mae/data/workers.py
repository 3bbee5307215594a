"""Worker processes: how many, which signals they take, and what it is called when one of them dies."""

import os
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from torch.utils.data import DataLoader

from mae.data.errors import DataError, counted

T = TypeVar("T")
_END: Any = object()


def usable_workers(asked: int) -> int:
    """At most one for each core that this process may use."""
    return min(asked, usable_cores())


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ignore_signals(worker: int) -> None:
    """What a data loader calls in each worker."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    # Signals reach the workers too, and the main process decides when to stop; without it they end by themselves.
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.set_wakeup_fd(-1)  # it would write into the main process's pipe
    # The second one ends a worker: a main process that fails sends it, and waits.
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def _end_with(parent: int) -> None:
    """A worker waits for ever where the main process is killed within a long message to it."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def loaded(loader: DataLoader[Any], remedy: str = "take fewer --workers") -> Iterator[Any]:
    """Everything from a loader, whose workers end with the iteration.

    Raises:
        DataError: one of them was killed; the message ends with the remedy.
    """
    with _child_handler_kept():
        iterator = iter(loader)
    try:
        yield from iterator
    except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:  # by where it was in its writing
        is_loss = not isinstance(error, RuntimeError) or "DataLoader worker" in str(error)
        if not loader.num_workers or not is_loss:
            raise
        raise DataError(
            f"one of {counted(loader.num_workers, 'worker process', 'worker processes')} was killed, as the system "
            f"does where memory runs out; {remedy}"
        ) from error
    finally:  # a traceback may hold the iterator, and the workers with it
        getattr(iterator, "_shutdown_workers", lambda: None)()


def ahead(items: Iterator[T], count: int) -> Iterator[T]:
    """The same items, each made by a thread while as many are waiting to be taken."""
    pool = ThreadPoolExecutor(1)
    try:
        waiting = deque(pool.submit(next, items, _END) for _ in range(count))
        while (item := waiting.popleft().result()) is not _END:
            waiting.append(pool.submit(next, items, _END))
            yield item
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _child_handler_kept() -> Iterator[None]:
    """PyTorch's own would raise in the middle of whatever the main process does; the next batch says it as well."""
    is_ours = hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD) if is_ours else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there are fewer cores, which a benchmark finds out
        yield
    if before is not None:
        signal.signal(signal.SIGCHLD, before)
