"""Long answers under control: sample more than is kept, or share a budget of tokens.

Both rules speak about the answers to one prompt and depend on their lengths alone, so what they keep does not depend
on batches, slots or processes. Engines may stop early where the outcome is already certain (``Limits.apply``).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from alignment.ppo.rollout.protocol import Draw, SamplingParameters
from alignment.ppo.rollout.schedule import DECODING, Schedule


def shortest(lengths: np.ndarray, samples: np.ndarray, count: int) -> np.ndarray:
    """bool [n]: the ``count`` shortest answers to a prompt, of equal ones those of smaller sample number."""
    kept = np.zeros(len(lengths), dtype=bool)
    kept[np.lexsort([samples, lengths])[:count]] = True
    return kept


def fair_length(lengths: np.ndarray, budget: int) -> int:
    """The greatest length at which answers, cut there, have at most ``budget`` tokens together; the budget if all fit.

    Args: lengths: [n] of the answers, or more than they will have if unknown.
    """
    left = budget
    for rank, length in enumerate(ordered := np.sort(lengths)):
        share = left // (len(ordered) - rank)
        if length > share:
            return int(share)
        left -= length
    return budget


class Limits:
    """The rules of ``sampling`` for the answers that one process draws.

    Attributes: lengths: int64 [N], of answers that ended by themselves; a huge number for others. dropped: bool [N].
    """

    OPEN = 1 << 40

    def __init__(self, draws: Sequence[Draw], sampling: SamplingParameters) -> None:
        self.keep, self.budget = sampling.keep, sampling.token_budget
        self.lengths = np.full([len(draws)], self.OPEN, np.int64)
        self.dropped = np.zeros([len(draws)], bool)
        self.samples = np.asarray([draw.sample for draw in draws], np.int64)
        _, self.prompt = np.unique([draw.prompt_id for draw in draws], return_inverse=True)
        self.members = [np.flatnonzero(self.prompt == number) for number in np.unique(self.prompt)]

    @property
    def is_active(self) -> bool:
        """Whether there is any rule."""
        return self.keep is not None or self.budget is not None

    def end(self, answers: np.ndarray, lengths: np.ndarray) -> None:
        """Answers have ended by themselves."""
        self.lengths[answers] = lengths

    def check_slots(self, slots: int) -> None:
        """Raises ValueError where answers that share a budget, and may have to wait for each other, lack slots."""
        largest = max(map(len, self.members), default=0)
        if self.budget is not None and largest > slots:
            raise ValueError(f"a token budget needs a slot for each of the {largest} answers to a prompt, not {slots}")

    def apply(self, schedule: Schedule, exclude: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which slots need no further token, int64, and which must wait for others, bool [slots].

        Args: exclude: int64, slots whose answers have ended.
        """
        paused = np.zeros([schedule.slots], bool)
        done: list[int] = []
        decoding = np.setdiff1d(np.flatnonzero(schedule.state == DECODING), exclude)
        for number in np.unique(self.prompt[schedule.answer[decoding]]):
            members = self.members[number]
            slots = decoding[self.prompt[schedule.answer[decoding]] == number]
            if self.keep is not None:
                longest = np.sort(self.lengths[members])[min(self.keep, len(members)) - 1]
                late = slots[schedule.length[slots] >= longest]
                self.dropped[schedule.answer[late]] = True
                done += late.tolist()
            if self.budget is not None:
                cap = fair_length(self.lengths[members], self.budget)
                late = slots[schedule.length[slots] >= cap]
                if len(late) == (self.lengths[members] == self.OPEN).sum():
                    done += late.tolist()
                paused[late] = True
        return np.asarray(done, np.int64), paused

    def settle(self, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Kept answers, bool [N], and the lengths they are cut to, int64 [N].

        Args: lengths: int64 [N], tokens drawn; of dropped answers fewer than they would have had.
        """
        lengths, kept = lengths.copy(), ~self.dropped
        for members in self.members:
            if self.keep is not None:
                known = np.where(self.dropped[members], self.OPEN, lengths[members])
                kept[members] = shortest(known, self.samples[members], self.keep)
            if self.budget is not None:
                lengths[members] = np.minimum(lengths[members], fair_length(lengths[members], self.budget))
        return kept, lengths
