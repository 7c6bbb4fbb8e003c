"""SHA256SUMS: which files a checkpoint has and what is in them, in the form that ``sha256sum -c`` reads.

    # 5120  config.json                 bytes of the file that is named next
    <64 hexadecimal digits>  config.json
    ...
    # <64 hexadecimal digits>           SHA-256 of all lines above

A checkpoint of several models is one unit: the SHA256SUMS of the part that stands for it names those of the others.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from alignment.runtime.files import sha256_of, sync

SUMS_FILE = "SHA256SUMS"
STATE_FILE = "trainer_state.json"
_READ = (".safetensors", ".json", ".npz", ".model", ".jinja")  # endings of files that somebody would read
_ENTRY = re.compile(r"# (\d+)  (.+)\n([0-9a-f]{64})  \2\n")


class Entry(NamedTuple):
    """What a file should be: bytes, and SHA-256 in hexadecimal."""

    size: int
    sha256: str


class Damage(Exception):
    """A checkpoint is not as it was written; the message names the file and what is wrong with it."""


def measure(path: Path) -> Entry:
    """The entry of a file, which is on the disk when this returns."""
    sync(path)
    return Entry(path.stat().st_size, sha256_of(path))


def write_sums(directory: Path, entries: Mapping[str, Entry]) -> None:
    """Write SHA256SUMS, the last file of a checkpoint; entries: by name relative to the directory."""
    text = "".join(f"# {entry.size}  {name}\n{entry.sha256}  {name}\n" for name, entry in sorted(entries.items()))
    path = directory / SUMS_FILE
    path.write_text(text + _closing(text), encoding="utf-8")
    sync(path)
    for folder in {directory, *(path.parent for name in entries if (path := directory / name).exists())}:
        sync(folder)  # another part's is not in its place yet


def verify(directory: Path) -> None:
    """Compare a checkpoint with its SHA256SUMS; raises Damage."""
    entries = _read_sums(directory / SUMS_FILE)
    if STATE_FILE not in entries:
        raise Damage(f"{directory / SUMS_FILE} does not name {STATE_FILE}")
    for name, entry in entries.items():
        path = Path(os.path.normpath(directory / name))
        _compare(path, entry)
        if path.name == SUMS_FILE:
            verify(path.parent)
    for path in sorted(directory.rglob("*")):
        if path.suffix in _READ and path.relative_to(directory).as_posix() not in entries:
            raise Damage(f"{path} is not named in {SUMS_FILE}")


def find_damage(directory: Path) -> str | None:
    """What is wrong with a checkpoint; None: it is sound."""
    try:
        verify(directory)
    except Damage as damage:
        return str(damage)
    except OSError as fault:
        return f"{fault.filename or directory} cannot be read: {fault.strerror}"
    return None


def _read_sums(path: Path) -> dict[str, Entry]:
    if not path.is_file():
        raise Damage(f"{path} is missing")
    text = path.read_bytes().decode(errors="replace")
    body = text[: text.rfind("\n", 0, -1) + 1]
    if text != body + _closing(body):
        raise Damage(f"{path} is truncated or altered")
    return {name: Entry(int(size), sha256) for size, name, sha256 in _ENTRY.findall(body)}


def _closing(body: str) -> str:
    return f"# {hashlib.sha256(body.encode()).hexdigest()}\n"


def _compare(path: Path, entry: Entry) -> None:
    if not path.is_file():
        raise Damage(f"{path} is missing")
    size = path.stat().st_size
    if size != entry.size:
        what = "truncated" if size < entry.size else "longer than it was"
        raise Damage(f"{path} is {what}: {size} bytes, it had {entry.size}")
    if sha256_of(path) != entry.sha256:
        raise Damage(f"{path} is altered: its SHA-256 is not the one in {SUMS_FILE}")
