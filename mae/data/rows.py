"""Rows of a dataset that hold files, which are read as those of a folder are."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mae.data.errors import Unreadable, printable
from mae.data.order import Blocks
from mae.data.pictures import Picture, read_image
from mae.data.readers import Reading, Stored, Wanted
from mae.reasons import reason_of

if TYPE_CHECKING:
    import datasets

_MOST_HASHED = 64  # rows, spread over all of them, that the fingerprint looks at


class Rows:
    """Files as they are stored, one in each row: :class:`Table`, and :class:`mae.data.streaming.Stream`."""

    where: str  # as it was asked for

    @property
    def blocks(self) -> Blocks | None:
        return None

    def __len__(self) -> int:
        raise NotImplementedError

    def value(self, index: int) -> Any:
        """The bytes of a file, a dictionary of its ``bytes`` and ``path``, either of which may be None, or None.

        Raises:
            Unreadable: the row cannot be read.
            Unreachable: the block of it cannot be read.
        """
        raise NotImplementedError

    def fingerprint(self) -> str:
        raise NotImplementedError

    def name(self, index: int) -> str:
        """With the path that the row says, last, so that its suffix is that of the name."""
        try:
            return self.stored(index, self.value(index)).name
        except Unreadable:
            return self._row(index)

    def read(self, index: int, reading: Reading, wanted: Wanted | None = None) -> Picture:
        return read_image(self.stored(index, self.value(index)), reading, wanted)

    def stored(self, index: int, value: Any) -> Stored:
        """The file of a row of that value.

        Raises:
            Unreadable: there is none.
        """
        content, path = held_in(value)
        held = content if content is not None else Path(path) if path else None
        if held is None:
            raise Unreadable(f"cannot read {printable(self._row(index))}: it holds no file")
        return Stored(held, f"{self._row(index)}, {path}" if path else self._row(index))

    def _row(self, index: int) -> str:
        return f"row {index} of {self.where}"


@dataclass(frozen=True)
class Table(Rows):
    """Rows of a dataset that lies on this disk."""

    table: "datasets.Dataset"
    column: str
    where: str

    def __len__(self) -> int:
        return len(self.table)

    def value(self, index: int) -> Any:
        try:
            return self.table[int(index)][self.column]
        except Exception as error:  # damaged files of Arrow
            raise Unreadable(f"cannot read {printable(self._row(index))}: {reason_of(error)}") from error

    def fingerprint(self) -> str:
        """Of the number of rows and of what 64 of them hold: the same wherever the dataset lies and was cached."""
        count, digest = len(self), hashlib.sha256()
        digest.update(str(count).encode())
        for i in range(looked_at := min(count, _MOST_HASHED)):
            content, path = held_in(self.value(count * i // looked_at))
            digest.update(b"\0" + (Path(path or "").name.encode() if content is None else content))
        return digest.hexdigest()[:16]


def held_in(value: Any) -> tuple[bytes | None, str | None]:
    """The bytes of a file, or where it lies."""
    return (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
