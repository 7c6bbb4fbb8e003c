"""Measures Parquet and Arrow files, which may hold a great deal in few bytes, before they are read.

Nothing is expanded for it: rows come in batches of a thousand, and repeated texts stay one text with many places.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from data.errors import DataError
from data.limits import COLUMNS, check_expansion, check_regular

BATCH_ROWS, FEW_ROWS = 1024, 16
_PLACE_BYTES = 8  # of an entry in a list, or of a text's place


def check_parquet(path: Path) -> None:
    """Raises DataError if a file is no Parquet, has too many columns, or too much in it for its size."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    size = check_regular(path)
    _check_unpacked(path, size)
    with _opened(path) as source, pq.ParquetFile(source) as file:
        _check_columns(path, file.metadata.num_columns)
        check_expansion(path, size, file.metadata.num_rows * file.metadata.num_columns * _PLACE_BYTES)
        groups = file.metadata.num_row_groups
        names = [file.schema.column(place).path for place in range(file.metadata.num_columns)]
    expanded = 0
    for group in range(groups):
        try:
            sizes = _batch_sizes(path, group, names, BATCH_ROWS)
            expanded = _add(path, size, expanded, sizes)
        except pa.ArrowNotImplementedError:  # a list whose texts have several dictionaries
            expanded = _add(path, size, expanded, _batch_sizes(path, group, [], FEW_ROWS))


def _batch_sizes(path: Path, group: int, dictionaries: list[str], rows: int) -> Iterator[int]:
    """Expanded bytes of a row group's batches; repeated texts of the columns in ``dictionaries`` are read once."""
    import pyarrow.parquet as pq

    with _opened(path) as source, pq.ParquetFile(source, read_dictionary=dictionaries) as file:
        for batch in file.iter_batches(batch_size=rows, row_groups=[group]):
            yield sum(map(expanded_bytes, batch.columns))


def _add(path: Path, size: int, expanded: int, more: Iterable[int]) -> int:
    for part in more:
        expanded += part
        check_expansion(path, size, expanded)
    return expanded


def _opened(path: Path) -> BinaryIO:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _check_unpacked(path: Path, size: int) -> None:
    unpacked = 0
    with _opened(path) as source:
        while path.suffix == ".gz" and (block := source.read(1 << 20)):
            unpacked += len(block)
            check_expansion(path, size, unpacked)


def check_arrow(path: Path) -> None:
    """The same for a file of record batches, as ``datasets.save_to_disk`` writes it."""
    import pyarrow as pa

    size = check_regular(path)
    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as batches:
        _check_columns(path, len(batches.schema))
        _add(path, size, 0, (sum(map(expanded_bytes, batch.columns)) for batch in batches))


def expanded_bytes(array: Any) -> int:
    """Bytes of an Arrow array with every repeated text written out."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = array.type
    places = _PLACE_BYTES * len(array)
    if isinstance(array, pa.ExtensionArray):
        return expanded_bytes(array.storage)
    if pa.types.is_dictionary(kind):
        if not _has_length(kind.value_type):
            return places + array.dictionary.nbytes * (len(array) > 0)
        return places + (pc.sum(pc.binary_length(array.dictionary).take(array.indices)).as_py() or 0)
    if _has_length(kind):
        return places + (pc.sum(pc.binary_length(array)).as_py() or 0)
    if pa.types.is_struct(kind):
        return places + sum(map(expanded_bytes, array.flatten()))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return places + expanded_bytes(array.flatten())
    if pa.types.is_map(kind):
        return places + expanded_bytes(array.keys) + expanded_bytes(array.items)
    return max(places, array.nbytes)


def _has_length(kind: Any) -> bool:
    import pyarrow as pa

    return any(
        test(kind)
        for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    )


def _check_columns(path: Path, count: int) -> None:
    if count > COLUMNS:
        raise DataError(f"{path}: it has {count} columns, more than {COLUMNS}")
