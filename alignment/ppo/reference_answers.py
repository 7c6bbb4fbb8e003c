"""Scores relative to those of the data set's own answers (score_centering)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from alignment.ppo.rewards import RewardBatch, WeightedRewards
from alignment.ppo.rewards.divided import score_finite
from alignment.runtime.faults import UsageError


def better_answer(sample: Mapping[str, Any]) -> str | None:
    """The answer that a RawSample gives to its prompt, the preferred one of two; None if it has none."""
    return sample.get("answer") if sample.get("better", True) else sample.get("other_answer")


class ReferenceScores:
    """What the reward sources give for the data set's own answers, each asked for once.

    Every process calls it with the same prompts and gets the same scores.
    """

    def __init__(self, rewards: WeightedRewards, tokenizer: Any) -> None:
        self.rewards, self.tokenizer = rewards, tokenizer
        self.known: dict[int, float] = {}  # by prompt id

    def check(self, prompts: Iterable[dict]) -> None:
        """Raises UsageError for a prompt whose sample has no answer."""
        for item in prompts:
            if better_answer(item["sample"]) is None:
                raise UsageError(
                    f'"score_centering": "reference" needs an "answer" with every prompt, but prompt '
                    f"{item['prompt_id']} has none: {item['prompt']!r:.80}"
                )

    def __call__(self, items: Sequence[dict]) -> np.ndarray:
        """float32 [N]: scores of the answers to N items of a PromptOnlyDataset, as finished answers.

        Raises: RunError for one that is not finite.
        """
        by_id = {int(item["prompt_id"]): item for item in items}
        new = [item for prompt_id, item in by_id.items() if prompt_id not in self.known]
        if new:
            answers = [better_answer(item["sample"]) for item in new]
            names = [f"{item['prompt_id']} (the data's answer)" for item in new]
            scores, _ = score_finite(self.rewards, self._batch(new, answers), names)
            self.known.update(zip((int(item["prompt_id"]) for item in new), scores.tolist(), strict=True))
        return np.asarray([self.known[int(item["prompt_id"])] for item in items], dtype=np.float32)

    def _batch(self, items: list[dict], answers: list[str]) -> RewardBatch:
        end = [self.tokenizer.eos_token_id]
        ids = [self.tokenizer(answer, add_special_tokens=False)["input_ids"] + end for answer in answers]
        return RewardBatch(
            prompts=[item["prompt"] for item in items],
            responses=answers,
            finished=np.ones(len(items), dtype=bool),
            samples=[item["sample"] for item in items],
            prompt_ids=[item["input_ids"] for item in items],
            response_ids=[np.asarray(row, dtype=np.int64) for row in ids],
        )
