"""The prompts of APO's files and of registered data sets, under the names by which files refer to them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from alignment.apo.files import Placed, index_by_query, read_answers
from alignment.apo.schemas import Comparison
from alignment.ppo.reference_answers import better_answer
from alignment.runtime.console import say
from alignment.runtime.faults import UsageError
from data import DataError, PromptOnlyDataset, RawDataset, RawSample, parse_specs
from data.builtin.apo import SEPARATOR, query_turns, split_text
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
    """The prompts of a mixture of registered data sets, named by their query_id, else "<data set>/<place>".

    Of equal prompts of a data set the first stays, and nothing is repeated by a proportion over 1; the samples that a
    smaller one takes are those of a PromptOnlyDataset with this seed.

    Raises: UsageError if two prompts have one name; DataError for a mixture that cannot be read, and for a prompt that
        a text cannot hold.
    """
    found: dict[str, Query] = {}
    specs = parse_specs(datasets)
    for spec in specs:
        raw = spec.load()
        label = spec.label(specs).replace(spec.name, raw.NAME or spec.name, 1)  # no alias
        candidates = spec.select(_first_of_equals(raw))
        for place in dict.fromkeys(spec.choose(candidates, seed, raw.NAME).tolist() if len(candidates) else ()):
            where, sample = raw.describe(place), raw[place]
            query_id, text = sample.get("query_id") or f"{label}/{place}", as_text(sample, where)
            _add(found, Query(query_id, text, query_turns(text), better_answer(sample), where))
    return list(found.values())


def read_queries(path: str | Path, query_file: str | None = None) -> list[Query]:
    """The prompts of a file of samples, of comparisons, or of golden answers.

    Args: query_file: has those of golden answers that stand without theirs, by query_id.
    Raises: UsageError for an item without a prompt or a name, and for two different ones that share a query_id.
    """
    known = {query.query_id: query.text for query in read_queries(query_file)} if query_file else {}
    entries = read_answers(path)
    if not isinstance(entries[0].item, Comparison):
        entries, repeated = index_by_query(entries)
        if repeated:
            say(f"{path}: {repeated} repeated items left out")
        entries = entries.values()
    found: dict[str, Query] = {}
    for entry in entries:
        _add(found, as_query(entry, query_text(entry, known)))
    return list(found.values())


def query_text(entry: Placed, known: Mapping[str, str]) -> str:
    """An item's prompt, if need be the ``known`` one of its query_id. Raises: UsageError without either."""
    item, where = entry
    if isinstance(item, Comparison):
        if item.query_id is None:
            raise UsageError(f'{where}: field "query_id": missing; a prompt needs a name')
        return as_text(RawSample(input=split_text(item.text[0])[0]), where)
    if (text := item.query or known.get(item.query_id)) is None:
        raise UsageError(
            f'{where}: field "query": missing; give it, or have "query_file" name a file with the queries'
        )
    return text


def _add(found: dict[str, Query], query: Query) -> None:
    other = found.setdefault(query.query_id, query)
    if other.text != query.text:
        name = f"query_id {query.query_id!r:.60}"
        raise UsageError(f"{query.where}: {name} is that of another prompt too ({other.where})")


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
