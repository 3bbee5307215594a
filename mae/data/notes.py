"""What is said of pictures that were not taken plainly, or not at all."""

import warnings
from collections.abc import Iterable

from mae.data.errors import DataWarning, counted, printable
from mae.data.levels import ENOUGH, FEW_LEVELS, OWN_RANGE
from mae.data.sources import Source

_NOTES = {
    OWN_RANGE: "scaled each by its own range of values, such as {}; --value-range LOW HIGH gives all the same scale",
    FEW_LEVELS: f"left by --value-range with fewer than {ENOUGH} levels of 256, such as {{}}",
}


class Notes:
    """Counts the pictures whose values were not plainly taken, each once."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._noted: dict[str, set[int]] = {note: set() for note in _NOTES}
        self._told = dict.fromkeys(_NOTES, 0)

    def add(self, notes: Iterable[tuple[int, str]]) -> None:
        """Numbers of pictures, and what became of their values."""
        for index, note in notes:
            self._noted[note].add(index)

    def warn(self, so_far: bool = False) -> None:
        """A :class:`DataWarning` for each kind of which there are more than it said last; so_far only for new kinds."""
        for note, indices in self._noted.items():
            if len(indices) > self._told[note] and not (so_far and self._told[note]):
                self._told[note] = len(indices)
                count = counted(len(indices), "picture") + (" so far" if so_far else "")
                what = _NOTES[note].format(printable(self._source.name(min(indices))))
                warnings.warn(f"{count} {what}", DataWarning, stacklevel=3)


def none_readable(problems: list[str], count: int) -> str:
    if count == 1:
        return problems[0]
    tried = f"the {count} files" if len(problems) >= count else f"{len(problems)} files, spread over all {count},"
    return f"none of {tried} can be read; first: {problems[0]}"
