"""Raw samples and the registry of named data sets."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator
from typing import Any, ClassVar, TypedDict

import numpy as np

from data.errors import DataError


class RawSample(TypedDict, total=False):
    """One untokenised sample. Every field is optional; each tokenised data set says which ones it needs.

    A turn list alternates user, assistant, user, ... and starts with the user.
    """

    input: str | list[str]
    """The prompt: the user's text, or an odd-length turn list that ends with the user."""
    answer: str
    """The assistant's answer to ``input``."""
    other_answer: str
    """A second answer to the same ``input``."""
    answers: list[str]
    """Any number of answers to ``input``, to be compared by ``scores``."""
    scores: list[float]
    """A score for each of ``answers``, higher is better; equal ones say nothing about each other."""
    type: str
    """Why ``answers`` are compared: "apo" if a golden answer stands over a policy's; else by people's preference."""
    query_id: str
    """The name of the prompt in files that belong together."""
    dialogue: list[str]
    """A whole conversation for supervised training: an even-length turn list that ends with the assistant."""
    system: str
    """A system message that precedes the conversation."""
    reward: float
    """The score that ``answer`` was logged with."""
    other_reward: float
    """The score that ``other_answer`` was logged with."""
    better: bool
    """Whether ``answer`` is preferred to ``other_answer``."""
    safer: bool
    """Whether ``answer`` is safer than ``other_answer``."""
    is_safe: bool
    """Whether ``answer`` is safe."""
    is_other_safe: bool
    """Whether ``other_answer`` is safe."""


class RawDataset:
    """A sequence of :class:`RawSample`. A subclass that sets ``NAME`` can be loaded by that name.

    A subclass implements ``__getitem__`` and ``__len__``; it takes ``path`` in its constructor if it can
    read from a path that the user gives (``name:proportion:path``).
    """

    NAME: ClassVar[str | None] = None
    ALIASES: ClassVar[tuple[str, ...]] = ()
    path: str | None = None
    """Where the samples come from, for error messages."""
    skipped: int = 0
    """Rows of the source that hold no usable sample."""

    _registry: ClassVar[dict[str, type[RawDataset]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        name = cls.__dict__.get("NAME")
        if name is None:
            return
        aliases = cls.__dict__.get("ALIASES", ())
        for key in (name, *([aliases] if isinstance(aliases, str) else aliases)):
            _check_name(cls, key)
            RawDataset._registry[key] = cls

    def __getitem__(self, index: int) -> RawSample:
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def __iter__(self) -> Iterator[RawSample]:
        return (self[index] for index in range(len(self)))

    @staticmethod
    def names() -> list[str]:
        """The registered names, without aliases, sorted."""
        return sorted({cls.NAME for cls in RawDataset._registry.values()})

    @staticmethod
    def find(name: str) -> type[RawDataset]:
        """The class registered under ``name`` (or an alias). Raises DataError for an unknown name."""
        cls = RawDataset._registry.get(name)
        if cls is None:
            near = difflib.get_close_matches(name, RawDataset._registry, n=1, cutoff=0.5)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise DataError(f"unknown dataset {name!r}{hint}; known: {', '.join(RawDataset.names())}")
        return cls

    @classmethod
    def is_local(cls, path: str | None) -> bool:
        """Whether reading from ``path`` (None: from where the data set is by itself) asks no hub."""
        return True

    @staticmethod
    def load(name: str, path: str | None = None) -> RawDataset:
        """The data set registered under ``name`` (or an alias), read from ``path`` when one is given.

        Raises DataError for an unknown name, for a path where none is taken and for a source that cannot be read.
        """
        cls = RawDataset.find(name)
        if path is None:
            return cls()
        if "path" not in inspect.signature(cls).parameters:
            raise DataError(f"dataset {name!r} takes no path, but {path!r} was given")
        return cls(path=path)

    make = load

    def describe(self, index: int) -> str:
        """Where sample ``index`` comes from, as error messages name it."""
        file = f", file {self.path}" if self.path else ""
        return f"dataset {self.NAME or type(self).__name__!r}, sample {index}{file}"

    def split_train_test(
        self, split_ratio: float = 0.2, shuffle: bool = True, seed: int = 42
    ) -> tuple[RawDataset, RawDataset]:
        """Two disjoint parts (train, test); the test part holds ``split_ratio`` of the samples, at least one."""
        train, test = split_indices(len(self), split_ratio, shuffle, seed)
        return RawSubset(self, train), RawSubset(self, test)


class RawSubset(RawDataset):
    """Samples of another raw data set, chosen by index."""

    def __init__(self, base: RawDataset, indices: np.ndarray) -> None:
        self.base, self.indices, self.path = base, indices, base.path

    def __getitem__(self, index: int) -> RawSample:
        return self.base[int(self.indices[index])]

    def __len__(self) -> int:
        return len(self.indices)

    def describe(self, index: int) -> str:
        return self.base.describe(int(self.indices[index]))


def split_indices(size: int, split_ratio: float, shuffle: bool, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices int64 of a (train, test) split of ``range(size)``; both parts are non-empty.

    Raises DataError unless 0 < split_ratio < 1 and there are at least two samples.
    """
    if not 0 < split_ratio < 1:
        raise DataError(f"split_ratio must lie between 0 and 1, got {split_ratio}")
    if size < 2:
        raise DataError(f"cannot split {size} sample(s) into a train and a test part")
    test_size = min(max(round(size * split_ratio), 1), size - 1)
    order = np.random.default_rng(seed).permutation(size) if shuffle else np.arange(size)
    return order[: size - test_size], order[size - test_size :]


def _check_name(cls: type[RawDataset], name: object) -> None:
    if not isinstance(name, str) or not name or set(name) & set(":,"):
        raise DataError(f"{cls.__name__}: a dataset name is a non-empty string without ':' and ',', got {name!r}")
    holder = RawDataset._registry.get(name)
    if holder is not None and (holder.__module__, holder.__qualname__) != (cls.__module__, cls.__qualname__):
        raise DataError(f"{cls.__name__}: dataset name {name!r} is already taken by {holder.__qualname__}")
