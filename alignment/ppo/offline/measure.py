"""What reward sources, the initial policy and the critic say about logged answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from alignment.ppo.collect import Collector, response_values
from alignment.ppo.experience import Experience
from alignment.ppo.offline.logged import LoggedAnswers
from alignment.ppo.rewards.divided import score_finite

ROWS_AT_ONCE = 4096  # on the device; all processes exchange their results after so many


@dataclass(frozen=True)
class LoggedCollector(Collector):
    """A Collector that also measures answers it did not draw, every process working on its share of them.

    sampler and rewards are None where no held-out prompts are answered and no answers need scores; critic where
    nothing is evaluated by one.
    """

    def score(self, logged: LoggedAnswers) -> None:
        """Write the scores: the data's own, and those of the reward sources where the data have none.

        Raises: RunError for a reward that is not finite.
        """
        logged.experience.scores[:] = np.nan_to_num(logged.given)
        missing = np.flatnonzero(np.isnan(logged.given))
        for start in range(0, len(missing), ROWS_AT_ONCE):
            rows = missing[start : start + ROWS_AT_ONCE]
            prompts = logged.experience.prompt_id[rows].tolist()
            logged.experience.scores[rows], _ = score_finite(self.rewards, logged.reward_batch(rows), prompts)

    def measure_reference(self, experience: Experience, temperature: float) -> None:
        """Write the initial policy's log-probabilities, ref_log_probs."""
        for rows, part in _parts(experience):
            self._fill_log_probs(part.ref_log_probs, self.reference, part, temperature)
            experience.ref_log_probs[rows, : part.response_mask.shape[1]] = part.ref_log_probs

    def measure_values(self, experience: Experience) -> None:
        """Write the critic's values."""
        for rows, part in _parts(experience):
            self._fill(part.values, self.critic, part, response_values)
            experience.values[rows, : part.response_mask.shape[1]] = part.values


def _parts(experience: Experience) -> Iterator[tuple[np.ndarray, Experience]]:
    """Some rows at a time, those of like length together."""
    order = np.argsort(experience.attention_mask.sum(-1), kind="stable")
    for start in range(0, len(order), ROWS_AT_ONCE):
        rows = order[start : start + ROWS_AT_ONCE]
        yield rows, experience.take(rows)
