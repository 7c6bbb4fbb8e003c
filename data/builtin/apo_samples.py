"""Sampled answers as APO's rejection sampling (arXiv:2311.08045) keeps them, with scores and the best of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from data.builtin.apo import query_turns
from data.errors import DataError
from data.raw import RawSample
from data.rows import RowDataset

ANSWER = re.compile(r"sample_(0|[1-9][0-9]*)")


class APOSamplesDataset(RowDataset):
    """Rows: query (or instruction), sample_0, sample_1, ..., and, once they are scored and selected, scores
    ({"sample_0": number, ...}), target (the best answer); query_id.

    ``answers`` are those that have a score, or all of them where none has one, in the order of their numbers; scores
    of other columns, as the authors' files have them, are left out. ``answer`` is the target.
    """

    NAME = "apo-samples"

    def row(self, place: int) -> dict[str, Any]:
        """See RowDataset.row. Raises DataError for a row without a query, and for scores of no answer."""
        row = super().row(place)
        if "query" not in row and "instruction" not in row:
            raise DataError(f"{self._at(place)}: column 'query' is missing; the row has: {', '.join(row)}")
        answers = {key: row[key] for key in row if ANSWER.fullmatch(key)}
        scores = row.get("scores", {})
        if not isinstance(scores, Mapping):
            raise DataError(f"{self._at(place)}: column 'scores' must map answers to numbers, got {scores!r:.60}")
        scores = {key: score for key, score in scores.items() if score is not None}  # a table fills every row
        if scores.keys() - row.keys():
            key = min(scores.keys() - row.keys())
            raise DataError(f"{self._at(place)}: column 'scores' names {key!r}, an answer that the row does not have")
        return row | {"answers": answers, "scores": {key: scores[key] for key in scores if key in answers}}

    def to_sample(self, row: Mapping[str, Any]) -> RawSample:
        """See RowDataset.to_sample."""
        query, scores = row["query"] if "query" in row else row["instruction"], row["scores"]
        keys = sorted(scores or row["answers"], key=lambda key: int(ANSWER.fullmatch(key)[1]))
        sample = RawSample(input=query_turns(query), answers=[row["answers"][key] for key in keys])
        if scores:
            sample["scores"] = [float(scores[key]) for key in keys]
        if "target" in row:
            sample["answer"] = row["target"]
        if "query_id" in row:
            sample["query_id"] = str(row["query_id"])
        return sample
