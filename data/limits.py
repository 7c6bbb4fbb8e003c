"""What a file may hold at most, so that a small one neither fills the memory nor hangs or kills the process.

The limits stand in docs/data.md. Nothing here reads a pipe or a device: a pipe that nobody writes to never ends.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

from data.errors import DataError

MIB = 1 << 20
DOCUMENT_BYTES = 64 * MIB
"""Of a JSON document of arguments or settings."""
ARRAY_BYTES = 512 * MIB
"""Of what is read in one piece: a JSON array, a file of APO's rounds."""
LINE_BYTES = 16 * MIB
"""Of a line of JSON lines or CSV."""
DEPTH = 64
"""Of lists and objects within each other."""
COLUMNS = 1000
"""Different names in the rows of a file, those within objects included."""
EXPANSION, EXPANSION_BYTES = 100, 1 << 30
"""A file may become this many times its size, and at least this many bytes, when it is unpacked."""


def check_regular(path: Path, most: int | None = None) -> int:
    """The size of a file in bytes. Raises DataError for a pipe or device, or more bytes than ``most``; OSError."""
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path}: is no regular file")
    if most is not None and status.st_size > most:
        raise DataError(f"{path}: its {status.st_size} bytes are more than the limit of {most}")
    return status.st_size


def check_expansion(path: Path, size: int, expanded: int) -> None:
    """Raises DataError if a file of ``size`` bytes becomes too many when it is unpacked."""
    limit = max(EXPANSION_BYTES, EXPANSION * size)
    if expanded > limit:
        raise DataError(f"{path}: its {size} bytes become more than {limit}, the limit for a file of that size")


def read_text(path: Path, most: int = DOCUMENT_BYTES) -> str:
    """The text of a UTF-8 file. Raises DataError naming the file; OSError where there is none to read."""
    check_regular(path, most)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path}: not a UTF-8 text file") from None


def parse_json(text: str, **hooks: Any) -> Any:
    """``json.loads`` with limits. Raises json.JSONDecodeError, or ValueError for anything else that is not read."""
    try:
        value = json.loads(text, **hooks)
        check_json(text, value)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    return value


def check_json(text: str, value: Any) -> None:
    """Raises ValueError if what ``text`` was parsed to is nested too deeply or has texts that no UTF-8 can hold."""
    if text.count("[") + text.count("{") > DEPTH and _depth(value) > DEPTH:
        raise ValueError(_TOO_DEEP)
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a text has half of a surrogate pair") from None


def reason_of(error: Exception) -> str:
    """Why a text is no JSON that is read, in one line."""
    if isinstance(error, RecursionError):
        return _TOO_DEEP
    if "integer string conversion" in str(error):  # Python's own limit
        return f"a whole number has more than {sys.get_int_max_str_digits()} digits"
    return error.msg if isinstance(error, json.JSONDecodeError) else " ".join(str(error).split())


def _depth(value: Any) -> int:
    deepest, waiting = 0, [(value, 1)]
    while waiting:
        part, depth = waiting.pop()
        deepest = max(deepest, depth)
        parts = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        waiting += [(inner, depth + 1) for inner in parts if isinstance(inner, dict | list)]
    return deepest


_TOO_DEEP = f"lists and objects are nested more than {DEPTH} deep"
