"""Who answers which prompts, so that all finish at about the same time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class ExpectedLengths:
    """How long answers to a prompt are likely to be: as long as last time, or as the latest batch's mean.

    It decides only where an answer is drawn. What is drawn is the same up to rounding, and to make it the same to the
    bit in a resumed run, checkpoints have it too.
    """

    def __init__(self) -> None:
        self.mean, self.known = 1.0, {}

    def of(self, prompt_id: int) -> float:
        """Tokens of one answer to a prompt."""
        return self.known.get(prompt_id, self.mean)

    def update(self, prompt_ids: np.ndarray, lengths: np.ndarray) -> None:
        """Learn from answers: int64 [N] each."""
        self.mean = float(lengths.mean())
        for prompt_id in np.unique(prompt_ids):
            self.known[int(prompt_id)] = float(lengths[prompt_ids == prompt_id].mean())

    def state_dict(self) -> dict:
        """For a JSON file."""
        return {"mean": self.mean, "known": {str(prompt_id): length for prompt_id, length in self.known.items()}}

    def load_state_dict(self, state: dict) -> None:
        """Take back what ``state_dict`` gave."""
        self.mean = state["mean"]
        self.known = {int(prompt_id): length for prompt_id, length in state["known"].items()}


def share_out(costs: Sequence[float], index: int, count: int) -> list[int]:
    """Which items part ``index`` of ``count`` takes: the dearest first, each to the part with least so far; in order.

    (Graham 1969: at most 4/3 of the best possible longest part.)
    """
    loads, parts = [0.0] * count, [[] for _ in range(count)]
    for item in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
        part = loads.index(min(loads))
        loads[part] += costs[item]
        parts[part].append(item)
    return sorted(parts[index])
