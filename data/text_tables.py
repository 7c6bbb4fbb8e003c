"""Reads a table in JSON or CSV once from end to end, before it is converted, for faults and limits.

Arrow's JSON reader, which converts it, ends the process at deeply nested rows and takes a column for every name.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from data.errors import DataError
from data.limits import (
    ARRAY_BYTES,
    COLUMNS,
    LINE_BYTES,
    check_expansion,
    check_regular,
    parse_json,
    reason_of,
)

CELL_BYTES = 8  # of an empty cell of a column of texts


class _Names:
    """The names that rows have, counted as the columns that they will take in every row."""

    def __init__(self) -> None:
        self.found: set[str] = set()
        self.objects = 0

    def add(self, value: Any, prefix: str = "") -> None:
        """``value``: a row, or what stands in it."""
        if isinstance(value, dict):
            self.objects += 1
            for key, inner in value.items():
                name = f"{prefix}.{key}"
                self.found.add(name)
                if isinstance(inner, dict | list):
                    self.add(inner, name)
        elif isinstance(value, list):
            for inner in value:
                if isinstance(inner, dict | list):
                    self.add(inner, prefix)

    def check(self, where: str) -> None:
        """Raises DataError if there are too many."""
        if len(self.found) > COLUMNS:
            raise DataError(f"{where}: the rows have more than {COLUMNS} different names")

    @property
    def cells(self) -> int:
        """Bytes that the columns take even where they are empty."""
        return self.objects * len(self.found) * CELL_BYTES


def check_json_table(path: Path) -> None:
    """Raises DataError, naming file, line and what is wrong, unless a file holds JSON objects within the limits."""
    size = check_regular(path)
    with _opened(path) as file:
        is_array = file.peek(4096).lstrip()[:1] == b"["
        if is_array:
            names = _check_array(path, file, size)
        else:
            names = _check_lines(path, file, size)
    check_expansion(path, size, names.cells)


def check_csv_table(path: Path) -> None:
    """The same for CSV: UTF-8, lines and columns within the limits."""
    size = check_regular(path)
    lines = 0
    with _opened(path) as file:
        for lines, line in enumerate(_lines(path, file, size), start=1):
            _decode(path, lines, line)
    with _opened(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        try:
            columns = len(next(csv.reader(text), ()))
        except csv.Error as error:
            raise DataError(f"{path}: its header is no CSV: {error}") from None
    if columns > COLUMNS:
        raise DataError(f"{path}: it has {columns} columns, more than {COLUMNS}")
    check_expansion(path, size, lines * columns * CELL_BYTES)


def _check_array(path: Path, file: BinaryIO, size: int) -> _Names:
    content = bytearray()
    while len(content) <= ARRAY_BYTES and (block := file.read(1 << 20)):
        content += block
        check_expansion(path, size, len(content))
    if len(content) > ARRAY_BYTES:
        raise DataError(f"{path}: a JSON array of more than {ARRAY_BYTES} bytes; write one object a line")
    names = _Names()
    for number, item in enumerate(_parse(path, None, _decode(path, 1, bytes(content))), start=1):
        if not isinstance(item, dict):
            raise DataError(f"{path}, item {number}: no JSON object, but {item!r:.60}")
        names.add(item)
        names.check(f"{path}, item {number}")
    return names


def _check_lines(path: Path, file: BinaryIO, size: int) -> _Names:
    names = _Names()
    for number, line in enumerate(_lines(path, file, size), start=1):
        if not line.strip():
            continue
        row = _parse(path, number, _decode(path, number, line))
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: no JSON object, but {row!r:.60}")
        names.add(row)
        names.check(f"{path}, line {number}")
    return names


def _opened(path: Path) -> BinaryIO:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _lines(path: Path, file: BinaryIO, size: int) -> Iterator[bytes]:
    total = 0
    while line := file.readline(LINE_BYTES + 1):
        if len(line) > LINE_BYTES:
            raise DataError(f"{path}: a line of more than {LINE_BYTES} bytes")
        total += len(line)
        check_expansion(path, size, total)
        yield line


def _decode(path: Path, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, line {number}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def _parse(path: Path, number: int | None, text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        line = number or (error.lineno if isinstance(error, json.JSONDecodeError) else None)
        place = f"{path}, line {line}" if line else str(path)
        raise DataError(f"{place}: {reason_of(error)}") from None


UNPACKING_FAULTS = (OSError, EOFError, zlib.error)
"""What a damaged .gz raises."""
