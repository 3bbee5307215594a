"""What one program of a launch works on. The rule that chooses it stands beside each launcher."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockTiles:
    """A program takes ``values`` values in a row."""

    values: int
    num_warps: int


@dataclass(frozen=True)
class RowTiles:
    """A program moves ``rows`` rows of D values, ``width`` values of each at a time."""

    rows: int
    width: int
    num_warps: int = 4


@dataclass(frozen=True)
class LossTiles:
    """A program turns ``turns`` times to ``patches`` patches, of which it holds ``values`` values at a time.

    A thread reads and writes ``adjacent`` of them at once.
    """

    patches: int
    values: int
    turns: int
    adjacent: int
    num_warps: int


@dataclass(frozen=True)
class CropTiles:
    """A program makes ``rows`` x ``cols`` pixels of an output, from ``lines`` x ``span`` pixels at a time."""

    rows: int
    cols: int
    lines: int
    span: int
    num_warps: int
