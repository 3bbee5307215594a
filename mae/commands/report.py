"""``python -m mae report``."""

from dataclasses import dataclass
from pathlib import Path

from mae.data import printable
from mae.report.page import write_report


@dataclass(frozen=True)
class ReportConfig:
    """Write a page about a run: curves, reconstructions, evaluations and options in one file."""

    run: Path
    """Run folder, of a run that may still be going, or the --out of an evaluation; report.html is written into it."""


def report(config: ReportConfig) -> None:
    print(f"Wrote {printable(write_report(config.run))}")
