"""Signals that ask a run to stop: answered at once, obeyed when the step is done, and held while it is saved."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
_END = 0  # no signal's number
_ECHO = 1.0  # seconds within which a second signal is the first one, which torchrun and Slurm pass on as well


class StopRequest:
    """Whether somebody asked the run to stop."""

    def __init__(self, speaks: bool = True) -> None:
        self.name = ""  # of the first signal
        self._speaks, self._at, self._held = speaks, 0.0, False

    def __bool__(self) -> bool:
        return bool(self.name)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside the block a second signal waits."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def receive(self, number: int) -> None:
        if not self.name:
            self.name, self._at = signal.Signals(number).name, time.monotonic()
            self._say(f"{self.name}: finishing this step, then saving; again to stop at once")
        elif time.monotonic() - self._at < _ECHO:
            pass
        elif self._held:
            self._say("saving; this takes a moment")
        else:
            self._say("stopped at once; checkpoints that were finished are whole")
            os._exit(1)

    def _say(self, words: str) -> None:
        if self._speaks:
            print(f"\nmae: {words}", file=sys.stderr, flush=True)


@contextmanager
def stop_requests(speaks: bool = True) -> Iterator[StopRequest]:
    """Inside the block signals only ask. Outside the main thread, where Python hands none out, nobody asks.

    They are read by a thread: Python's own handlers wait for the end of a backward, which may take many seconds.
    """
    request = StopRequest(speaks)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]

    def read() -> None:
        while _END not in (data := os.read(reader, 64)):
            for number in data:
                if number in numbers:
                    request.receive(number)

    before = {number: signal.getsignal(number) for number in numbers}
    thread = threading.Thread(target=read, daemon=True, name="signals")
    thread.start()
    for number in numbers:
        signal.signal(number, lambda *_: None)
    former = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield request
    finally:
        signal.set_wakeup_fd(former)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.write(writer, bytes([_END]))  # processes that were forked hold the pipe open, so it never ends by itself
        thread.join()
        os.close(writer)
        os.close(reader)
