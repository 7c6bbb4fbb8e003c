"""What tells samples from others."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np


def fingerprint_of(items: Iterable[Any]) -> str:
    """SHA-256, hexadecimal, of items and their order: mappings, lists, arrays, texts and numbers, however nested.

    Anything else counts by its type alone, for what it prints may change from process to process.
    """
    digest = hashlib.sha256()
    for item in items:
        _add(digest, item)
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    """Each value says first what it is and how much of it there is, so that no two lists give the same bytes."""
    if isinstance(value, Mapping):
        value = [part for entry in value.items() for part in entry]
    if isinstance(value, np.ndarray):
        digest.update(f"{value.dtype.str}{value.shape}".encode() + value.tobytes())
    elif isinstance(value, list | tuple):
        digest.update(f"list {len(value)} ".encode())
        for part in value:
            _add(digest, part)
    else:
        shown = repr(value) if isinstance(value, str | int | float | np.generic | None) else ""
        digest.update(f"{type(value).__name__} {len(shown)} {shown}".encode(errors="surrogatepass"))
