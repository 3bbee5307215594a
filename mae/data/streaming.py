"""Datasets of Parquet files that are read row group by row group, from a disk or a network, and never as a whole."""

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from mae.data.errors import DataError, Unreachable, Unreadable, printable
from mae.data.order import Blocks
from mae.data.readers import Stored
from mae.data.rows import Rows
from mae.reasons import reason_of

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_FOOTERS_AT_ONCE = 16


@dataclass(frozen=True)
class Footer:
    """What a Parquet file says of itself."""

    file: str  # a path, or a URL such as hf://datasets/NAME/...
    metadata: "pq.FileMetaData"


@dataclass(frozen=True, eq=False)
class Stream(Rows):
    """Rows whose blocks are the row groups of Parquet files, one of which is at hand for whoever reads single rows."""

    footers: list[Footer]
    column: str
    where: str
    _at_hand: dict[int, "pa.ChunkedArray"] = field(default_factory=dict, init=False, repr=False)
    _names: dict[int, str] = field(default_factory=dict, init=False, repr=False)  # of single rows that were read

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_at_hand": {}}  # another process reads for itself

    @cached_property
    def _groups(self) -> list[tuple[Footer, int]]:
        return [(footer, i) for footer in self.footers for i in range(footer.metadata.num_row_groups)]

    @cached_property
    def _ends(self) -> np.ndarray:
        """The row after each group."""
        return np.cumsum([footer.metadata.row_group(i).num_rows for footer, i in self._groups], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @cached_property
    def blocks(self) -> Blocks:
        memory = [sum(chunk.total_uncompressed_size for chunk in self._chunks(*group)) for group in self._groups]
        return Blocks(np.diff(self._ends, prepend=0), np.array(memory, np.int64))

    def value(self, index: int) -> Any:
        (block,) = self._blocks_of([index])
        column = self._at_hand.get(block)
        if column is None:
            column = self._block(block)
            self._at_hand.clear()
            self._at_hand[block] = column
        return self._value_in(column, block, index)

    def name(self, index: int) -> str:
        """The row, with its path where it has been read: a name is not worth a network."""
        return self._names.get(index, self._row(index))

    def stored(self, index: int, value: Any) -> Stored:
        stored = super().stored(index, value)
        self._names[index] = stored.name
        return stored

    def contents(self, steps: Iterable[list[int]]) -> Iterator[list[Stored | None]]:
        """The files of the rows of each step; None for a row without one. Blocks of the step before stay open.

        Raises:
            Unreachable: a block cannot be read.
        """
        opened: dict[int, pa.ChunkedArray] = {}
        for indices in steps:
            blocks = self._blocks_of(indices)
            opened = {i: opened[i] if i in opened else self._block(i) for i in dict.fromkeys(blocks)}
            yield [self._stored_in(opened[block], block, index) for index, block in zip(indices, blocks, strict=True)]

    def fingerprint(self) -> str:
        """Of what the files say of their row groups, without reading one."""
        digest = hashlib.sha256()
        for footer, i in self._groups:
            digest.update(f"{footer.metadata.row_group(i).num_rows}\0".encode())
            for chunk in self._chunks(footer, i):
                known = chunk.statistics
                ends = (known.min_raw, known.max_raw) if known is not None and known.has_min_max else ()
                digest.update(f"{chunk.total_compressed_size} {chunk.total_uncompressed_size} {ends}\0".encode())
        return digest.hexdigest()[:16]

    def _chunks(self, footer: Footer, group: int) -> "list[pq.ColumnChunkMetaData]":
        """What lies of the column in a row group."""
        found = footer.metadata.row_group(group)
        chunks = map(found.column, range(found.num_columns))
        return [x for x in chunks if f"{x.path_in_schema}.".startswith(f"{self.column}.")]

    def _blocks_of(self, indices: list[int]) -> list[int]:
        return np.searchsorted(self._ends, indices, side="right").tolist()

    def _value_in(self, column: "pa.ChunkedArray", block: int, index: int) -> Any:
        begin = int(self._ends[block]) - len(column)
        try:
            return column[index - begin].as_py()
        except Exception as error:  # a path that is no text
            raise Unreadable(f"cannot read {printable(self._row(index))}: {printable(reason_of(error))}") from error

    def _stored_in(self, column: "pa.ChunkedArray", block: int, index: int) -> Stored | None:
        try:
            return super().stored(index, self._value_in(column, block, index))
        except Unreadable:
            return None

    def _block(self, number: int) -> "pa.ChunkedArray":
        footer, group = self._groups[number]
        try:
            with _opened(footer.file) as file:
                # A worker that is forked from a process with threads of Arrow's would wait for them.
                parquet = _parquet(file, footer.metadata)
                return parquet.read_row_group(group, [self.column], use_threads=False).column(self.column)
        except Exception as error:  # of Arrow, of the network
            end = int(self._ends[number])
            begin = end - footer.metadata.row_group(group).num_rows
            raise Unreachable(
                f"cannot read rows {begin} to {end - 1} of {printable(self.where)}, from {printable(footer.file)}: "
                f"{printable(reason_of(error))}"
            ) from error


def refuse_others(footers: list[Footer], column: str) -> None:
    """Raise :class:`DataError` where a file does not hold the column, once and with bytes."""
    import pyarrow.types as types

    for footer in footers:
        schema = footer.metadata.schema.to_arrow_schema()
        if schema.names.count(column) != 1:
            raise DataError(f"{printable(footer.file)} has {schema.names.count(column)} columns {printable(column)}")
        kind = schema.field(column).type
        held = kind.field("bytes").type if types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
        if not types.is_binary(held) and not types.is_large_binary(held):
            raise DataError(f"column {printable(column)} of {printable(footer.file)} holds no files, but {kind}")


def read_footers(files: list[str]) -> list[Footer]:
    """In the order of the files.

    Raises:
        DataError: one of them is no Parquet file that can be read.
    """
    with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
        return list(pool.map(_footer, files))


def _footer(file: str) -> Footer:
    try:
        with _opened(file) as opened:
            return Footer(file, _parquet(opened).metadata)
    except Exception as error:
        raise DataError(f"cannot open {printable(file)}: {printable(reason_of(error))}") from error


def _opened(file: str) -> Any:
    from fsspec.core import url_to_fs

    files, path = url_to_fs(file)
    return files.open(path, "rb", cache_type="none")  # by default 5 MB beyond whatever is read are fetched too


def _parquet(file: Any, metadata: "pq.FileMetaData | None" = None) -> "pq.ParquetFile":
    import pyarrow.parquet as pq

    return pq.ParquetFile(file, metadata=metadata)
