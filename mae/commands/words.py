"""What several commands say in the same words."""

import sys

from mae.data import usable_workers
from mae.training.parallel import Processes


def started_workers(asked: int, processes: Processes) -> int:
    """How many worker processes there will be, which is said where they are fewer than were asked for."""
    started = usable_workers(asked)
    if started < asked and processes.leads:
        print(f"Warning: {asked} workers were asked for; {started} are started, one a core", file=sys.stderr)
    return started


def rounded(x: float) -> str:
    """A count as one reads it."""
    return f"{x:,.0f}" if x >= 10 else f"{x:.2g}"


def duration(seconds: float) -> str:
    """In the largest unit of which there are two."""
    for unit, length in (("hours", 3600), ("minutes", 60), ("s", 1)):
        if seconds >= 2 * length:
            return f"{rounded(seconds / length)} {unit}"
    return f"{seconds:.2g} s" if seconds >= 0.1 else f"{1e3 * seconds:.0f} ms"
