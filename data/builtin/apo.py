"""Scored answer lists as APO (arXiv:2311.08045) and DSP write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.errors import DataError
from data.raw import RawSample
from data.rows import RowDataset
from data.transcripts import parse_transcript

SEPARATOR = "<sep>"


def split_text(text: str) -> tuple[list[str], str] | None:
    """(prompt turns, answer) of "query<sep>answer" or of a Human/Assistant transcript; None if it is neither."""
    query, separator, answer = text.partition(SEPARATOR)
    if not separator:
        turns = parse_transcript(text)
        return (turns[:-1], turns[-1]) if turns and len(turns) % 2 == 0 else None
    return query_turns(query), answer.strip()


def query_turns(query: str) -> list[str]:
    """The turns of a prompt: a text, or a transcript that may already hold the "Assistant:" of the answer."""
    turns = parse_transcript(query)
    if turns is None:
        return [query.strip()]
    return turns if len(turns) % 2 else turns[:-1]


class APODataset(RowDataset):
    """Rows: text (list of "query<sep>answer" texts or transcripts), scores or score (list of numbers).

    All answers with their scores; as a pair, the highest- against the lowest-scored one. Rows whose scores are all
    equal are skipped, and those whose texts cannot be split or have different queries (a few of HH's transcripts).
    """

    NAME = "apo"
    ALIASES = ("dsp",)
    COLUMNS = ("text",)

    def row(self, place: int) -> dict[str, Any]:
        row = super().row(place)
        scores = row.get("scores", row.get("score"))
        if not isinstance(scores, list) or len(scores) != len(row["text"]):
            raise DataError(f"{self._at(place)}: 'text' and 'scores' must be lists of the same length")
        more = {key: str(row[key]) for key in ("type", "query_id") if key in row}
        return {"parts": [split_text(text) for text in row["text"]], "scores": scores, "more": more}

    def is_usable(self, row: Mapping[str, Any]) -> bool:
        parts, scores = row["parts"], row["scores"]
        return None not in parts and len({tuple(turns) for turns, _ in parts}) == 1 and max(scores) > min(scores)

    def to_sample(self, row: Mapping[str, Any]) -> RawSample:
        scores, turns, answers = row["scores"], row["parts"][0][0], [answer for _, answer in row["parts"]]
        best, worst = (answers[scores.index(pick(scores))] for pick in (max, min))
        pair = RawSample(input=turns, answer=best, other_answer=worst, better=True)
        return pair | RawSample(answers=answers, scores=scores, **row["more"])
