"""Data sets whose samples are mapped from the rows of a table, on the hub or in local files."""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from data.columnar import check_arrow, check_parquet
from data.errors import DataError
from data.limits import DOCUMENT_BYTES, check_regular
from data.raw import RawDataset, RawSample
from data.text_tables import UNPACKING_FAULTS, check_csv_table, check_json_table

READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
"""File suffix -> builder of the ``datasets`` package. A further ``.gz`` is allowed."""
CHECKS = {"json": check_json_table, "csv": check_csv_table, "parquet": check_parquet}
MEDIA = ("Image", "Audio", "Video", "Pdf")
"""Columns of these kinds are left out: looking at one would open a file or an address that a row names."""


class RowError(ValueError):
    """A row that cannot be read; the data set adds which one."""


class RowDataset(RawDataset):
    """Maps rows to samples, when they are asked for.

    ``path`` is a file, a directory (of data files, or written by ``datasets.save_to_disk``), or None for the hub
    repository ``HUB`` (``FOLDER`` in it, if set). In a directory the files whose name or folder holds ``SPLIT`` count.
    """

    HUB: ClassVar[str | None] = None
    FOLDER: ClassVar[str | None] = None
    SPLIT: ClassVar[str | None] = None
    COLUMNS: ClassVar[tuple[str, ...]] = ()
    """Columns that every row must have."""

    def __init__(self, path: str | None = None) -> None:
        self.path = path
        self.rows = read_hub(self) if path is None else read_path(self, path)
        self.kept: np.ndarray | None = None
        if type(self).is_usable is not RowDataset.is_usable:
            usable = [self._guard(index, self.is_usable) for index in range(len(self.rows))]
            self.kept, self.skipped = np.flatnonzero(usable), usable.count(False)
            if usable and not any(usable):
                source = self.path or self.HUB
                raise DataError(f"dataset {self.NAME!r}: none of the {len(usable)} rows of {source} is usable")

    @classmethod
    def is_local(cls, path: str | None) -> bool:
        return path is not None or cls.HUB is None

    def to_sample(self, row: Mapping[str, Any]) -> RawSample:
        """The sample that a row holds."""
        raise NotImplementedError

    def is_usable(self, row: Mapping[str, Any]) -> bool:
        """Whether a row holds a sample at all; overridden where a source is known to have some that do not."""
        return True

    def row(self, place: int) -> dict[str, Any]:
        """Row ``place`` of the source without empty cells. Raises DataError if a needed column has none."""
        row = {key: value for key, value in self.rows[place].items() if value is not None}
        for column in self.COLUMNS:
            if column not in row:
                columns = ", ".join(self.rows[place])
                raise DataError(f"{self._at(place)}: column {column!r} is missing; the row has: {columns}")
        return row

    def __getitem__(self, index: int) -> RawSample:
        return self._guard(self._place(index), self.to_sample)

    def _guard(self, place: int, read: Callable[[Mapping[str, Any]], Any]) -> Any:
        """``read`` of a row. Raises DataError, naming the row, where its cells are not of the types it needs."""
        try:
            return read(self.row(place))
        except DataError:
            raise
        except RowError as error:
            raise DataError(f"{self._at(place)}: {error}") from error
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise DataError(f"{self._at(place)}: a column is not of the type it should be ({reason:.200})") from error

    def __len__(self) -> int:
        return len(self.rows) if self.kept is None else len(self.kept)

    def describe(self, index: int) -> str:
        return self._at(self._place(index))

    def _at(self, place: int) -> str:
        return RawDataset.describe(self, place)

    def _place(self, index: int) -> int:
        return index if self.kept is None else int(self.kept[index])


def read_hub(dataset: RowDataset) -> Any:
    """The rows of ``dataset.HUB``, through the ``datasets`` package's download and cache."""
    if dataset.HUB is None:
        raise DataError(f"dataset {dataset.NAME!r} needs a path: {dataset.NAME}:1.0:path")
    try:
        folder = {"data_dir": dataset.FOLDER} if dataset.FOLDER else {}
        return _without_media(_load(dataset.HUB, split=dataset.SPLIT, **folder))
    except Exception as error:
        raise DataError(
            f"dataset {dataset.NAME!r}: the hub repository {dataset.HUB!r} cannot be read ({first_line(error)}); "
            f"a local copy can be given as {dataset.NAME}:1.0:path"
        ) from error


def read_path(dataset: RowDataset, path: str) -> Any:
    """The rows of a local file or directory."""
    place = Path(path).expanduser()
    if not place.exists():
        raise DataError(f"dataset {dataset.NAME!r}: file {path} does not exist")
    if place.is_dir() and any((place / name).exists() for name in ("state.json", "dataset_dict.json")):
        return _read_saved(dataset, place)
    files = _find_files(dataset, place) if place.is_dir() else [place]
    for file in files:
        if reader_of(file) is None:
            raise DataError(f"dataset {dataset.NAME!r}: file {file} is none of {', '.join(READERS)} (or .gz of one)")
        if file.is_file() and file.stat().st_size == 0:
            raise DataError(f"dataset {dataset.NAME!r} is empty, file {file}")
        _check(dataset, file, CHECKS[reader_of(file)])
    try:
        names = [glob.escape(str(file)) for file in files]
        return _without_media(_load(reader_of(files[0]), data_files=names, split="train"))
    except Exception as error:
        raise DataError(f"dataset {dataset.NAME!r} cannot be read, file {path}: {first_line(error)}") from error


def _check(dataset: RowDataset, file: Path, check: Callable[[Path], Any]) -> None:
    import pyarrow as pa

    try:
        check(file)
    except DataError as error:
        raise DataError(f"dataset {dataset.NAME!r} cannot be read, file {error}") from None
    except (*UNPACKING_FAULTS, pa.ArrowException, UnicodeError) as error:
        raise DataError(f"dataset {dataset.NAME!r} cannot be read, file {file}: {first_line(error)}") from error


def _without_media(rows: Any) -> Any:
    media = [name for name, feature in rows.features.items() if any(kind in repr(feature) for kind in MEDIA)]
    return rows.remove_columns(media) if media else rows


def reader_of(file: Path) -> str | None:
    suffixes = file.suffixes
    return READERS.get((suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else file.suffix).lower())


def first_line(error: BaseException) -> str:
    """The first line of an error's root cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _load(*args: Any, **kwargs: Any) -> Any:
    import datasets
    from datasets.load import load_dataset  # PaddleNLP replaces datasets.load_dataset by one that trusts every script

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return load_dataset(*args, **kwargs, trust_remote_code=False)
    finally:
        if shown:
            datasets.enable_progress_bars()


def _read_saved(dataset: RowDataset, place: Path) -> Any:
    import datasets

    for file in sorted(place.rglob("*")):
        if file.suffix == ".arrow" or file.suffix == ".json":
            _check(dataset, file, check_arrow if file.suffix == ".arrow" else _check_settings)
    try:
        saved = datasets.load_from_disk(str(place))
    except Exception as error:
        raise DataError(f"dataset {dataset.NAME!r} cannot be read, file {place}: {first_line(error)}") from error
    if isinstance(saved, datasets.DatasetDict):
        if dataset.SPLIT not in saved:
            splits = ", ".join(saved)
            raise DataError(f"dataset {dataset.NAME!r}: {place} has no split {dataset.SPLIT!r}, only {splits}")
        return _without_media(saved[dataset.SPLIT])
    return _without_media(saved)


def _check_settings(file: Path) -> None:
    check_regular(file, DOCUMENT_BYTES)


def _find_files(dataset: RowDataset, place: Path) -> list[Path]:
    """Data files of one kind in a directory, those of the split if there is one."""
    if dataset.FOLDER and (place / dataset.FOLDER).is_dir():
        place = place / dataset.FOLDER
    files = sorted(file for file in place.rglob("*") if file.is_file() and reader_of(file))
    if dataset.SPLIT and len(files) > 1:
        files = [file for file in files if dataset.SPLIT in str(file.relative_to(place))]
    kinds = {reader_of(file) for file in files}
    if len(kinds) != 1:
        wanted = f" for split {dataset.SPLIT!r}" if dataset.SPLIT else ""
        found = "files of several kinds" if kinds else f"no {', '.join(READERS)} file"
        raise DataError(f"dataset {dataset.NAME!r}: directory {place} has {found}{wanted}")
    return files
