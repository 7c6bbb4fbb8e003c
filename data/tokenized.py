"""What every tokenised data set shares: mixing, required fields, prompt text, truncation and its report."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from data.errors import DataError
from data.fingerprint import fingerprint_of
from data.raw import RawDataset, RawSample, split_indices
from data.spec import DatasetSpec, parse_specs
from data.templates import Template, get_template
from data.truncation import POLICIES, TruncationReport, shorten_turns

Ids = list[int]


class TokenizedDataset:
    """A mixture of raw data sets, tokenised.

    Arguments
      datasets: the mixture, in any form that :func:`data.spec.parse_specs` takes.
      tokenizer: callable as ``tokenizer(text, add_special_tokens=bool)["input_ids"]``, with ``eos_token_id``,
        ``pad_token_id`` and, for the template "chat", ``chat_template``.
      max_length: the most tokens an item may have, the end-of-text token included (prompts only: of the prompt).
        None means no limit.
      template: the prompt template's name (:mod:`data.templates`).
      truncation: what happens to an item that is longer, one of :data:`data.truncation.POLICIES`.
      seed: chooses the samples where a proportion does not take whole copies of a data set.

    Everything is tokenised at construction, so that ``len`` is final; ``report`` says what was left out. Items come
    in the order of the mixture and, within a data set, in its own order; the same arguments give the same items.
    Raises DataError for a bad argument, a sample without the needed fields, and a mixture that leaves no sample.
    """

    NEEDS: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        datasets: str | Mapping[Any, Any] | Iterable[Any],
        tokenizer: Any,
        max_length: int | None = None,
        template: str | Template = "chat",
        truncation: str = "prompt",
        seed: int = 42,
    ) -> None:
        if truncation not in POLICIES:
            raise DataError(f"truncation must be one of {', '.join(POLICIES)}, got {truncation!r}")
        if max_length is not None and max_length < 1:
            raise DataError(f"max_length must be at least 1, got {max_length}")
        if tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no end-of-text token (eos_token)")
        self.tokenizer, self.max_length, self.truncation, self.seed = tokenizer, max_length, truncation, seed
        self.template = get_template(template)
        self.report = TruncationReport(type(self).__name__, max_length=max_length)
        self._items: list[dict[str, Any]] = []
        specs = parse_specs(datasets)
        for spec in specs:
            self._add(spec, spec.label(specs))
        self.report.kept = len(self._items)
        if not self._items:
            raise DataError(f"no sample is left; {self.report.summary()}")

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.finish(self._items[index])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, hexadecimal, of all items in their order: tells these data from others."""
        return fingerprint_of(self._items)

    def split_train_test(self, split_ratio: float = 0.2, shuffle: bool = True, seed: int = 42) -> tuple[Any, Any]:
        """Two data sets of the same kind over disjoint items (train, test), as :meth:`RawDataset.split_train_test`."""
        return tuple(self._select(part) for part in split_indices(len(self), split_ratio, shuffle, seed))

    # What a subclass supplies ------------------------------------------------------------------------------------

    def encode(self, sample: RawSample, where: str) -> dict[str, Any] | None:
        """The stored item (int32 arrays) of a sample, or None to leave it out, counted in ``report``."""
        raise NotImplementedError

    def finish(self, item: dict[str, Any]) -> dict[str, Any]:
        """The item a user sees: token arrays become int64."""
        return {key: value.astype(np.int64) if isinstance(value, np.ndarray) else value for key, value in item.items()}

    def choose_candidates(self, raw: RawDataset) -> np.ndarray:
        """Indices of the raw samples that take part, before proportions apply."""
        return np.arange(len(raw))

    # Building blocks for subclasses ------------------------------------------------------------------------------

    def require(self, sample: RawSample, where: str, *fields: str) -> None:
        """Raises DataError, naming data set, sample and field, unless every field is there."""
        for name in fields:
            if sample.get(name) is None:
                kind = type(self).__name__
                raise DataError(f"{where}: field {name!r} is missing; {kind} needs {', '.join(self.NEEDS)}")

    def prompt_turns(self, sample: RawSample, where: str) -> list[str]:
        """``input`` as an odd-length turn list."""
        self.require(sample, where, "input")
        value = sample["input"]
        turns = [value] if isinstance(value, str) else value
        if not is_text_list(turns) or len(turns) % 2 == 0:
            raise DataError(f"{where}: field 'input' must be a text or an odd number of texts, got {shorten(value)}")
        return list(turns)

    def prompt_ids(self, text: str) -> Ids:
        """Token ids of a rendered prompt; an end-of-text token that the tokenizer appends is removed."""
        ids = self.tokenizer(text, add_special_tokens=self.template.add_special_tokens)["input_ids"]
        if self.template.add_special_tokens and len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id:
            ids = ids[:-1]
        return list(ids)

    def answer_ids(self, sample: RawSample, where: str, name: str) -> Ids:
        """Token ids of an answer, end-of-text token included."""
        if not isinstance(sample[name], str):
            raise DataError(f"{where}: field {name!r} must be a text, got {shorten(sample[name])}")
        return self.text_ids(sample[name]) + [self.tokenizer.eos_token_id]

    def text_ids(self, text: str) -> Ids:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def fit_prompt(self, sample: RawSample, where: str, answer_length: int) -> tuple[str, Ids] | None:
        """Prompt text and ids that leave room for ``answer_length`` tokens, by the truncation policy."""
        system = sample.get("system")

        def render(turns: list[str]) -> tuple[str, Ids]:
            text = self.template.prompt(turns, self.tokenizer, system)
            return text, self.prompt_ids(text)

        turns = self.fit(self.prompt_turns(sample, where), lambda turns: len(render(turns)[1]) + answer_length, where)
        return None if turns is None else render(turns)

    def fit(self, turns: list[str], length: Any, where: str) -> list[str] | None:
        """The turns cut to ``length(turns) <= max_length`` by the truncation policy; None leaves the sample out."""
        size = length(turns)
        if self.max_length is None or size <= self.max_length:
            return turns
        if self.truncation == "error":
            raise DataError(f"{where}: {size} tokens are more than max_length {self.max_length}")
        fitting = None
        if self.truncation == "prompt":
            fitting = shorten_turns(turns, lambda shorter: length(shorter) <= self.max_length)
        if fitting is None:
            self.report.dropped += 1
        else:
            self.report.shortened += 1
        return fitting

    # Mixing ------------------------------------------------------------------------------------------------------

    def _add(self, spec: DatasetSpec, label: str) -> None:
        if spec.count == 0 or spec.proportion == 0:
            return
        raw = spec.load()
        if len(raw) == 0:
            raise DataError(f"dataset {spec.name!r} is empty" + (f", file {raw.path}" if raw.path else ""))
        candidates = spec.select(self.choose_candidates(raw))
        if len(candidates) == 0:
            raise DataError(f"dataset {spec.name!r}: part {spec.part[0]} of {spec.part[1]} has no sample")
        self.report.sources.append(label)
        self.report.unusable += raw.skipped
        for place in spec.choose(candidates, self.seed, raw.NAME).tolist():
            self._store(self.encode(raw[place], raw.describe(place)), raw, place)

    def _store(self, item: dict[str, Any] | None, raw: RawDataset, place: int) -> None:
        if item is not None:
            self._items.append(item)

    def _select(self, indices: np.ndarray) -> TokenizedDataset:
        part = copy.copy(self)
        part.__dict__.pop("fingerprint", None)
        part._items = [self._items[index] for index in indices]
        part.report = copy.copy(self.report)
        part.report.kept = len(part._items)
        return part


def is_text_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(turn, str) for turn in value)


def read_flag(sample: RawSample, name: str, where: str) -> bool:
    """A field that is true or false. Raises DataError if it is anything else."""
    if not isinstance(sample[name], bool | np.bool_):
        raise DataError(f"{where}: field {name!r} must be true or false, got {shorten(sample[name])}")
    return bool(sample[name])


def shorten(value: Any) -> str:
    """A value's repr in at most 60 characters, for error messages."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def pad(rows: list[np.ndarray], value: int, width: int, left: bool = False) -> np.ndarray:
    """Stacks 1-D arrays of at most ``width`` entries to int64 [len(rows), width], filled with ``value``."""
    batch = np.full((len(rows), width), value, dtype=np.int64)
    for target, row in zip(batch, rows, strict=True):
        if len(row):
            target[slice(width - len(row), None) if left else slice(len(row))] = row
    return batch


def pad_mask(rows: list[np.ndarray], width: int, left: bool = False) -> np.ndarray:
    """Boolean [len(rows), width], True where :func:`pad` puts a real token."""
    return pad([np.ones(len(row)) for row in rows], 0, width, left).astype(bool)


def padding_id(tokenizer: Any) -> int:
    """The tokenizer's padding token, or its end-of-text token: masks, not ids, say what is padding."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
