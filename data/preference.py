"""Pairs of answers: which is better, and which is safer."""

from __future__ import annotations

from typing import Any

import numpy as np

from data.raw import RawSample
from data.tokenized import TokenizedDataset, pad, pad_mask, padding_id, read_flag


class PairDataset(TokenizedDataset):
    """Two answers to one prompt, tokenised as prompt + answer + end-of-text; ``CHOICE`` says which comes first."""

    CHOICE: str
    NAMES: tuple[str, str]

    def encode(self, sample: RawSample, where: str) -> dict[str, Any] | None:
        """Both answers behind one prompt; see TokenizedDataset.encode."""
        self.require(sample, where, *self.NEEDS)
        for name in self.NEEDS[3:]:
            read_flag(sample, name, where)
        answers = [self.answer_ids(sample, where, name) for name in ("answer", "other_answer")]
        if answers[0] == answers[1]:
            self.report.identical += 1
            return None
        prompt = self.fit_prompt(sample, where, max(map(len, answers)))
        if prompt is None:
            return None
        pair = [np.array(prompt[1] + answer, dtype=np.int32) for answer in answers]
        if not sample[self.CHOICE]:
            pair.reverse()
        item: dict[str, Any] = {f"{name}_input_ids": ids for name, ids in zip(self.NAMES, pair, strict=True)}
        item["prompt_length"] = len(prompt[1])
        return item

    def get_collator(self) -> PairCollator:
        return PairCollator(padding_id(self.tokenizer), self.NAMES)


class PairCollator:
    """Pads both answers of every pair on the right to one width L.

    Gives ``{first,second}_input_ids`` int64[B, L], ``{first,second}_attention_mask`` bool[B, L] (True = real token)
    and every other (integer) field of the items as int64[B].
    """

    def __init__(self, pad_token_id: int, names: tuple[str, str]) -> None:
        self.pad_token_id, self.names = pad_token_id, names

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        keys = [f"{name}_input_ids" for name in self.names]
        width = max(len(item[key]) for item in items for key in keys)
        batch = {}
        for name, key in zip(self.names, keys, strict=True):
            rows = [item[key] for item in items]
            batch[key] = pad(rows, self.pad_token_id, width)
            batch[f"{name}_attention_mask"] = pad_mask(rows, width)
        for key in items[0].keys() - set(keys):
            batch[key] = np.array([item[key] for item in items], dtype=np.int64)
        return batch


class PreferenceCollator(PairCollator):
    """:class:`PairCollator` for ``better`` and ``worse``."""

    def __init__(self, pad_token_id: int) -> None:
        super().__init__(pad_token_id, PreferenceDataset.NAMES)


class SafetyPreferenceCollator(PairCollator):
    """:class:`PairCollator` for ``safer`` and ``unsafer``."""

    def __init__(self, pad_token_id: int) -> None:
        super().__init__(pad_token_id, SafetyPreferenceDataset.NAMES)


class PreferenceDataset(PairDataset):
    """Items ``{"better_input_ids": int64[Lb], "worse_input_ids": int64[Lw], "prompt_length": int}``.

    Both begin with the same ``prompt_length`` prompt tokens. Pairs whose answers have equal tokens say nothing and
    are left out.
    """

    NEEDS = ("input", "answer", "other_answer", "better")
    CHOICE = "better"
    NAMES = ("better", "worse")


class SafetyPreferenceDataset(PairDataset):
    """Items ``{"safer_input_ids": int64[Ls], "unsafer_input_ids": int64[Lu], "prompt_length": int,
    "safer_safety_sign": int, "unsafer_safety_sign": int}``.

    A sign is +1 for a safe answer and -1 for an unsafe one (Safe RLHF, arXiv:2310.12773, cost model loss).
    """

    NEEDS = ("input", "answer", "other_answer", "safer", "is_safe", "is_other_safe")
    CHOICE = "safer"
    NAMES = ("safer", "unsafer")

    def encode(self, sample: RawSample, where: str) -> dict[str, Any] | None:
        item = super().encode(sample, where)
        if item is not None:
            signs = [1 if sample[name] else -1 for name in ("is_safe", "is_other_safe")]
            item["safer_safety_sign"], item["unsafer_safety_sign"] = signs if sample["safer"] else signs[::-1]
        return item
