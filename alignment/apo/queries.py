"""The prompts of APO's files and of registered data sets, under the names by which files refer to them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from alignment.apo.files import Placed, index_by_query, read_answers
from alignment.apo.schemas import Comparison
from alignment.ppo.reference_answers import better_answer
from alignment.runtime.console import say
from alignment.runtime.faults import UsageError
from data import DataError, PromptOnlyDataset, RawDataset, RawSample, parse_specs
from data.builtin.apo import SEPARATOR, query_turns
from data.tokenized import is_text_list, shorten


class Query(NamedTuple):
    """A prompt by its name in the files.

    text: as the files have it; turns: what it says, user first and last; answer: the data set's own good answer, or
    None; where: for messages.
    """

    query_id: str
    text: str
    turns: list[str]
    answer: str | None
    where: str


def load_queries(datasets: Any, seed: int) -> list[Query]:
    """The prompts of a mixture of registered data sets, named "<data set>/<place>".

    Of equal prompts of a data set the first stays, and nothing is repeated by a proportion over 1; the samples that a
    smaller one takes are those of a PromptOnlyDataset with this seed.

    Raises: UsageError if two data sets give the same names; DataError for a mixture that cannot be read, and for a
        prompt that a text cannot hold.
    """
    found: dict[str, Query] = {}
    for spec in parse_specs(datasets):
        raw = spec.load()
        candidates = spec.select(_first_of_equals(raw))
        for place in dict.fromkeys(spec.choose(candidates, seed, raw.NAME).tolist() if len(candidates) else ()):
            query_id = f"{raw.NAME or spec.name}/{place}"
            if query_id in found:
                raise UsageError(f'datasets: "{spec.name}" is named twice, and both have a sample {query_id!r}')
            where = raw.describe(place)
            text = as_text(raw[place], where)
            found[query_id] = Query(query_id, text, query_turns(text), better_answer(raw[place]), where)
    return list(found.values())


def read_queries(path: str | Path) -> list[Query]:
    """The prompts of a file of samples, or of golden answers that stand with their prompts.

    Raises: UsageError for a file without prompts or with two that share a query_id.
    """
    entries = read_answers(path)
    for item, where in entries:
        if isinstance(item, Comparison):
            raise UsageError(f"{where}: is a comparison; its prompts can be read as the data set apo:1.0:{path}")
        if item.query is None:
            raise UsageError(f'{where}: field "query": missing; a prompt is needed')
    found, repeated = index_by_query(entries)
    if repeated:
        say(f"{path}: {repeated} repeated items left out")
    return [as_query(entry, entry.item.query) for entry in found.values()]


def as_query(entry: Placed, text: str) -> Query:
    """The query of an item, which ``text`` is."""
    return Query(entry.item.query_id, text, query_turns(text), None, entry.where)


def as_text(sample: RawSample, where: str) -> str:
    """A sample's prompt as APO's files write it: a text, or a transcript that waits for the assistant.

    Raises: DataError for a prompt that ``query_turns`` would not read back from it.
    """
    turns = [turn.strip() for turn in _turns(sample, where)]
    text = turns[0]
    if len(turns) > 1:
        roles = ("Human", "Assistant")
        text = "".join(f"\n\n{roles[place % 2]}: {turn}" for place, turn in enumerate(turns)) + "\n\nAssistant:"
    if sample.get("system") is not None:
        raise DataError(f"{where}: field 'system': APO's files have no place for a system message")
    if not text or SEPARATOR in text or query_turns(text) != turns:
        raise DataError(f"{where}: field 'input': APO's files cannot hold the prompt {sample['input']!r:.60}")
    return text


def draw_number(query_id: str) -> int:
    """What a query's random choices depend on, whatever it stands beside; below 2^56, and different in practice."""
    return int.from_bytes(hashlib.sha256(query_id.encode()).digest()[:7], "big")


class Queries(RawDataset):
    """Queries as raw samples."""

    def __init__(self, queries: Sequence[Query]) -> None:
        self.queries = queries

    def __getitem__(self, index: int) -> RawSample:
        query = self.queries[index]
        return RawSample(input=query.turns, query_id=query.query_id)

    def __len__(self) -> int:
        return len(self.queries)

    def describe(self, index: int) -> str:
        return self.queries[index].where


class QueryDataset(PromptOnlyDataset):
    """Items of queries, one each unless it is too long; ``prompt_id`` is the query's place. See PromptOnlyDataset.

    Equal prompts stay, for each has a name of its own.
    """

    def __init__(self, queries: Sequence[Query], tokenizer: Any, **options: Any) -> None:
        super().__init__([(Queries(queries), 1.0)], tokenizer, **options)

    def choose_candidates(self, raw: RawDataset) -> np.ndarray:
        return np.arange(len(raw))


def _first_of_equals(raw: RawDataset) -> np.ndarray:
    """int64: the places of samples whose prompt none before them has."""
    first: dict[tuple[str | None, ...], int] = {}
    for place, sample in enumerate(raw):
        first.setdefault((sample.get("system"), *_turns(sample, raw.describe(place))), place)
    return np.array(list(first.values()), dtype=np.int64)


def _turns(sample: RawSample, where: str) -> list[str]:
    value = sample.get("input")
    turns = [value] if isinstance(value, str) else value
    if not is_text_list(turns):
        raise DataError(f"{where}: field 'input' must be a text or a list of texts, got {shorten(value)}")
    return list(turns)
