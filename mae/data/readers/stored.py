"""A file by itself, or one that lies within another, such as in a row of a Parquet file."""

import io
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mae.data.errors import DataError


@dataclass(frozen=True)
class Stored:
    """What a reader reads."""

    held: Path | bytes
    name: str  # what a person finds it by

    def openable(self) -> Path | io.BytesIO:
        """For libraries that take either; given a path, they map it into memory or read no more than they need."""
        return self.held if isinstance(self.held, Path) else io.BytesIO(self.held)

    def open(self) -> BinaryIO:
        return open(self.held, "rb") if isinstance(self.held, Path) else io.BytesIO(self.held)

    def check_regular(self) -> None:
        """Opening a FIFO would wait for somebody who writes into it."""
        if isinstance(self.held, Path) and not stat.S_ISREG(self.held.stat().st_mode):
            raise DataError("it is no regular file")
