"""Files that belong together: written one by one, or kept in memory and written later, by a thread."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

_BLOCK = 1 << 24  # bytes read at once
_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")  # in the message of safetensors' Rust side


class Files:
    """Files of one directory, each added once.

    A fault of the disk is kept until ``check``, and what follows it is not written: a process whose disk is full
    still takes part in what all processes do together.

    Args:
        directory: must exist; sub-directories of it are made.
        deferred: keep copies in memory until ``write``.

    Attributes: fault: the first one, or None.
    """

    def __init__(self, directory: Path, deferred: bool = False) -> None:
        self.directory, self.fault = directory, None
        self._pending: dict[str, Callable[[Path], Any]] = {}
        self._names: list[str] = []
        self._deferred = deferred

    @property
    def names(self) -> list[str]:
        """Of the files that were written, relative to the directory."""
        return list(self._names)

    def add_bytes(self, name: str, content: bytes) -> None:
        """A file with this content; name: relative to the directory."""
        self._put(name, lambda path: path.write_bytes(content))

    def add_text(self, name: str, text: str) -> None:
        """The same in UTF-8."""
        self.add_bytes(name, text.encode())

    def add_arrays(self, name: str, arrays: Mapping[str, Any]) -> None:
        """An .npz file."""
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        self.add_bytes(name, buffer.getvalue())

    def add_tensors(self, name: str, tensors: Mapping[str, Any], metadata: dict[str, str] | None = None) -> None:
        """A safetensors file of Paddle's tensors, contiguous and on the CPU, or of arrays that nobody will change."""
        if all(isinstance(value, np.ndarray) for value in tensors.values()):
            import safetensors.numpy as library
        else:
            import safetensors.paddle as library

            if self._deferred:  # some of them are the model's own
                tensors = {key: value.clone() for key, value in tensors.items()}
        self._put(name, lambda path: _save_tensors(library, tensors, path, metadata))

    def write(self) -> None:
        """Write what was deferred, and let go of it."""
        while self._pending:
            name = next(iter(self._pending))
            self._write(name, self._pending.pop(name))

    def check(self) -> None:
        """Raises: OSError, the first that was met."""
        if self.fault is not None:
            raise self.fault

    def _put(self, name: str, write: Callable[[Path], Any]) -> None:
        if self._deferred:
            self._pending[name] = write
        else:
            self._write(name, write)

    def _write(self, name: str, write: Callable[[Path], Any]) -> None:
        path = self.directory / name
        if self.fault is None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write(path)
                self._names.append(name)
            except OSError as fault:
                self.fault = fault


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Gives another path to write to: the file appears complete and on the disk, or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes, private: bool = False) -> None:
    """A whole file of this content; ``private``: only its owner may read it."""
    with whole(path) as partial:
        if private:
            partial.touch()
            partial.chmod(0o600)
        partial.write_bytes(content)


def write_text(path: Path, text: str, private: bool = False) -> None:
    """The same in UTF-8."""
    write_bytes(path, text.encode(), private)


def sha256_of(*paths: Path) -> str:
    """SHA-256 of the files' contents one after the other, in hexadecimal."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """What was written to a file, or which files a directory has, is on the disk when this returns."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _save_tensors(library: Any, tensors: Mapping[str, Any], path: Path, metadata: dict[str, str] | None) -> None:
    from safetensors import SafetensorError

    try:
        library.save_file(dict(tensors), str(path), metadata)
        path.chmod(0o644)  # safetensors creates 0600
    except SafetensorError as fault:
        number = _SYSTEM_ERROR.search(str(fault))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from fault
