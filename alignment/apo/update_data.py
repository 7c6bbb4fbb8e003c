"""Scored answers as each policy update learns from them."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from alignment.ppo.losses import IGNORED_LABEL
from data import ComparisonCollator, ComparisonDataset, RawSample, SupervisedCollator
from data.fingerprint import fingerprint_of
from data.tokenized import padding_id

Answers = dict[tuple[int, ...], float]


class BestAnswerDataset(ComparisonDataset):
    """Items of a data.SupervisedDataset: the answer with the highest score (of several, the first), all of it learnt.

    One scored answer is enough.
    """

    def choose(self, answers: Answers) -> Answers:
        best = max(answers, key=answers.get)
        return {best: answers[best]}

    def is_informative(self, scores: list[float]) -> bool:
        return True

    def finish(self, item: dict[str, Any]) -> dict[str, Any]:
        [ids] = super().finish(item)["input_ids"]
        labels = np.where(np.arange(len(ids)) < item["prompt_length"], IGNORED_LABEL, ids)
        return {"input_ids": ids, "labels": labels}

    def get_collator(self) -> SupervisedCollator:
        return SupervisedCollator(padding_id(self.tokenizer))


class RankedDataset(ComparisonDataset):
    """All answers; where none is better than another, the best one is still learnt."""

    def is_informative(self, scores: list[float]) -> bool:
        return True


class ReferencedDataset(ComparisonDataset):
    """Items also have "reference" float32 [R]: each answer's log-probability under the initial policy.

    NaN until it is measured. The collator adds ``reference`` float32 [N].
    """

    def encode(self, sample: RawSample, where: str) -> dict[str, Any] | None:
        item = super().encode(sample, where)
        return item and item | {"reference": np.full(len(item["input_ids"]), np.nan, np.float32)}

    @property
    def reference(self) -> np.ndarray:
        """float32 [N], of all answers in the order of the items."""
        return np.concatenate([item["reference"] for item in self._items])

    @reference.setter
    def reference(self, log_probs: np.ndarray) -> None:
        ends = np.cumsum([len(item["reference"]) for item in self._items])[:-1]
        parts = np.split(log_probs, ends)
        self._items = [item | {"reference": part} for item, part in zip(self._items, parts, strict=True)]

    @cached_property
    def fingerprint(self) -> str:
        """See TokenizedDataset.fingerprint; what was measured is no part of it."""
        return fingerprint_of({**item, "reference": None} for item in self._items)

    def get_collator(self) -> ReferencedCollator:
        return ReferencedCollator(padding_id(self.tokenizer))


class BestWorstDataset(ReferencedDataset):
    """The answers with the highest and the lowest score (of several, the first)."""

    def choose(self, answers: Answers) -> Answers:
        return {ids: answers[ids] for ids in (pick(answers, key=answers.get) for pick in (max, min))}


class ReferencedCollator(ComparisonCollator):
    """As ComparisonCollator, and ``reference`` float32 [N]."""

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        return super().__call__(items) | {"reference": np.concatenate([item["reference"] for item in items])}


def dataset_kind(args: Any) -> type[ComparisonDataset]:
    """The data set of args.policy_update (alignment.apo.update_arguments.TrainingArguments)."""
    if args.policy_update == "dpo":
        return ReferencedDataset if args.dpo_pairs == "all" else BestWorstDataset
    return {"rjs": BestAnswerDataset, "rrhf": RankedDataset}[args.policy_update]
