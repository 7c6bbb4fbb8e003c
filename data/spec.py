"""Which data sets to mix, and how much of each: ``name[:proportion[:path]]``, or the same as a mapping."""

from __future__ import annotations

import difflib
import math
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import DataError
from data.raw import RawDataset

PART = re.compile(r"(\d+) of (\d+)")


@dataclass(frozen=True)
class DatasetSpec:
    """One part of a mixture. ``count``, when set, is an absolute number of samples and replaces ``proportion``.

    part: (k, n) takes, of every n samples in a row, the k-th alone.
    """

    dataset: str | RawDataset
    proportion: float = 1.0
    count: int | None = None
    path: str | None = None
    part: tuple[int, int] = (1, 1)

    @property
    def name(self) -> str:
        if isinstance(self.dataset, str):
            return self.dataset
        return self.dataset.NAME or type(self.dataset).__name__

    def label(self, mixture: Iterable[DatasetSpec]) -> str:
        """The name, and where ``mixture`` has others of that name, the file's name too: ``apo:pairs.json``."""
        alike = [spec for spec in mixture if spec.name == self.name]
        return f"{self.name}:{Path(self.path).name}" if self.path and len(alike) > 1 else self.name

    def load(self) -> RawDataset:
        """The raw data set itself."""
        if isinstance(self.dataset, RawDataset):
            return self.dataset
        return RawDataset.load(self.dataset, path=self.path)

    def select(self, candidates: np.ndarray) -> np.ndarray:
        """Those of the samples' indices, int64, that belong to ``part``."""
        number, parts = self.part
        return candidates[candidates % parts == number - 1]

    def choose(self, candidates: np.ndarray, seed: int, name: str | None = None) -> np.ndarray:
        """Which of ``candidates`` (indices, int64) to take, in order: whole copies, then a part drawn by ``seed``.

        Args: name: of the data set, which the draw depends on too, but not on what it is mixed with; default: own.
        """
        copies, rest = divmod(self.size(len(candidates)), len(candidates))
        rng = np.random.default_rng([seed, zlib.crc32((name or self.name).encode())])
        return np.concatenate([*[candidates] * copies, np.sort(rng.permutation(candidates)[:rest])])

    def size(self, available: int) -> int:
        """How many samples to take when ``available`` exist; more than ``available`` means repeats."""
        return self.count if self.count is not None else round(available * self.proportion)


def parse_specs(specs: str | Mapping[Any, Any] | Iterable[Any]) -> list[DatasetSpec]:
    """Parses a mixture given as a comma-separated string, a mapping, or an iterable of strings and pairs.

    A pair's (or mapping entry's) value is a proportion or ``{"proportion": ..., "path": ...}``; its key is a name
    or a :class:`RawDataset`. A proportion is a number, "0.5", a fraction "a/b", an absolute count "n/-1", or "k of n",
    one of n parts without common samples; more than 1 repeats samples, 0 leaves the data set out.
    Raises DataError for anything else, for a part named twice and for a mixture without parts.
    """
    if isinstance(specs, str):
        entries = [part.strip() for part in specs.split(",") if part.strip()]
    elif isinstance(specs, Mapping):
        entries = list(specs.items())
    elif isinstance(specs, Iterable):
        entries = list(specs)
    else:
        raise DataError(f"datasets must be a string, a mapping or a list, got {specs!r}")
    parsed = [_parse_text(entry) if isinstance(entry, str) else _parse_pair(entry) for entry in entries]
    if not parsed:
        raise DataError("no dataset is named")
    for position, spec in enumerate(parsed):
        if any((spec.dataset, spec.path) == (other.dataset, other.path) for other in parsed[:position]):
            raise DataError(f"dataset {spec.name!r} is named twice; give it one proportion")
    return parsed


def _parse_text(text: str) -> DatasetSpec:
    name, _, rest = text.partition(":")
    proportion, _, path = rest.partition(":")
    if not name:
        raise DataError(f"dataset {text!r}: the name before ':' is empty")
    return _build(name, proportion or 1.0, path or None)


def _parse_pair(entry: Any) -> DatasetSpec:
    if isinstance(entry, DatasetSpec):
        return entry
    if isinstance(entry, RawDataset):
        return DatasetSpec(entry)
    if not isinstance(entry, tuple | list) or len(entry) != 2 or not isinstance(entry[0], str | RawDataset):
        raise DataError(f"expected a dataset name and its proportion, got {entry!r}")
    dataset, value = entry
    if not isinstance(value, Mapping):
        return _build(dataset, value, None)
    unknown = set(value) - {"proportion", "path"}
    if unknown:
        key = min(map(str, unknown))
        near = difflib.get_close_matches(key, ("proportion", "path"), n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise DataError(f"dataset {dataset!r}: unknown key {key!r}{hint}; allowed: 'proportion', 'path'")
    return _build(dataset, value.get("proportion", 1.0), value.get("path"))


def _build(dataset: str | RawDataset, proportion: Any, path: Any) -> DatasetSpec:
    spec = DatasetSpec(dataset, path=None if path is None else str(path))
    if isinstance(proportion, str) and (found := PART.fullmatch(proportion.strip())):
        number, parts = map(int, found.groups())
        if not 1 <= number <= parts:
            raise DataError(f"dataset {spec.name!r}: part {proportion!r} must be one from '1 of {parts}' on")
        return DatasetSpec(dataset, path=spec.path, part=(number, parts))
    value, count = _parse_proportion(spec.name, proportion)
    return DatasetSpec(dataset, value, count, spec.path)


def _parse_proportion(name: str, value: Any) -> tuple[float, int | None]:
    number: Real | None = None
    if isinstance(value, str):
        numerator, slash, denominator = (part.strip() for part in value.partition("/"))
        try:
            if slash and denominator == "-1":
                count = int(numerator)
                if count >= 0:
                    return 1.0, count
            else:
                number = Fraction(int(numerator), int(denominator)) if slash else float(value)
        except (ValueError, ZeroDivisionError):
            pass
    elif isinstance(value, Real) and not isinstance(value, bool):
        number = value
    if number is None or not math.isfinite(number) or number < 0:
        raise DataError(
            f"dataset {name!r}: proportion {value!r} is not a number >= 0, a fraction 'a/b', a count 'n/-1' or a part "
            "'k of n'"
        )
    return float(number), None
