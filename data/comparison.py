"""Any number of scored answers to one prompt."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from data.errors import DataError
from data.raw import RawDataset, RawSample
from data.tokenized import TokenizedDataset, is_text_list, pad, pad_mask, padding_id, read_flag, shorten

APO = "apo"


class ComparisonDataset(TokenizedDataset):
    """Items ``{"input_ids": list of R int64 [L_r], "scores": float32 [R], "prompt_length": int, "is_apo": bool,
    "source": int}``: prompt + answer + end-of-text, R times.

    From ``answers`` with ``scores``, or from ``answer``, ``other_answer`` and ``better``, which count as scores 1 and
    0. Of answers with equal tokens the one with the highest score stays. A sample without two different scores
    compares nothing and is left out. ``source`` is the place in ``report.sources``.

    Arguments
      sep_token_id: a token between prompt and answer, which counts as the prompt's last; None: there is none.
    """

    NEEDS = ("input", "answers", "scores")

    def __init__(self, *args: Any, sep_token_id: int | None = None, **kwargs: Any) -> None:
        self.separator = [] if sep_token_id is None else [sep_token_id]
        super().__init__(*args, **kwargs)

    def encode(self, sample: RawSample, where: str) -> dict[str, Any] | None:
        """See TokenizedDataset.encode."""
        answers, scores = self._read(sample, where)
        best: dict[tuple[int, ...], float] = {}
        for text, score in zip(answers, scores, strict=True):
            ids = (*self.text_ids(text), self.tokenizer.eos_token_id)
            best[ids] = max(score, best.get(ids, -math.inf))
        best = self.choose(best)
        if not self.is_informative(list(best.values())):
            self.report.identical += 1
            return None
        fitting = self.fit_prompt(sample, where, len(self.separator) + max(map(len, best)))
        if fitting is None:
            return None
        prompt = fitting[1] + self.separator
        return {
            "input_ids": [np.array([*prompt, *ids], dtype=np.int32) for ids in best],
            "scores": np.array(list(best.values()), dtype=np.float32),
            "prompt_length": len(prompt),
            "is_apo": sample.get("type") == APO,
        }

    def choose(self, answers: dict[tuple[int, ...], float]) -> dict[tuple[int, ...], float]:
        """Which of a sample's answers make up the item, {token ids: score}; no two are alike, and in its order."""
        return answers

    def is_informative(self, scores: list[float]) -> bool:
        """Whether answers with these scores, no two answers alike, are worth an item."""
        return min(scores) < max(scores)

    def _read(self, sample: RawSample, where: str) -> tuple[list[str], list[float]]:
        """The answers and as many finite scores."""
        if sample.get("answers") is None and sample.get("other_answer") is not None:
            self.require(sample, where, "input", "answer", "other_answer", "better")
            better = float(read_flag(sample, "better", where))
            answers, scores = [sample["answer"], sample["other_answer"]], [better, 1 - better]
        else:
            self.require(sample, where, *self.NEEDS)
            answers, scores = sample["answers"], sample["scores"]
        if not is_text_list(answers):
            raise DataError(f"{where}: field 'answers' must be a list of texts, got {shorten(answers)}")
        if not isinstance(scores, list | tuple) or len(scores) != len(answers) or not all(map(_is_number, scores)):
            raise DataError(
                f"{where}: field 'scores' must be {len(answers)} finite numbers, one for each of 'answers', "
                f"got {shorten(scores)}"
            )
        return list(answers), [float(score) for score in scores]

    def finish(self, item: dict[str, Any]) -> dict[str, Any]:
        return item | {"input_ids": [ids.astype(np.int64) for ids in item["input_ids"]]}

    def _store(self, item: dict[str, Any] | None, raw: RawDataset, place: int) -> None:
        if item is not None:
            self._items.append(item | {"source": len(self.report.sources) - 1})

    def get_collator(self) -> ComparisonCollator:
        return ComparisonCollator(padding_id(self.tokenizer))


class ComparisonCollator:
    """Stacks the N answers of B items, however many each has, and pads them on the right to one width L.

    Gives ``input_ids`` int64 [N, L], ``attention_mask`` bool [N, L] (True = real token), ``item`` int64 [N] (0 to
    B - 1), ``scores`` float32 [N], ``prompt_length`` int64 [N], ``is_apo`` bool [B] and ``source`` int64 [B]. The
    answers of an item stand together, in its order.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        rows = [ids for item in items for ids in item["input_ids"]]
        counts = [len(item["input_ids"]) for item in items]
        width = max(map(len, rows))
        return {
            "input_ids": pad(rows, self.pad_token_id, width),
            "attention_mask": pad_mask(rows, width),
            "item": np.repeat(np.arange(len(items)), counts),
            "scores": np.concatenate([item["scores"] for item in items]),
            "prompt_length": np.repeat([item["prompt_length"] for item in items], counts),
            "is_apo": np.array([item["is_apo"] for item in items]),
            "source": np.array([item["source"] for item in items]),
        }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value)
