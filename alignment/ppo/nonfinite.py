"""Answers of which something measured is not finite."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from alignment.parallel.topology import topology
from alignment.ppo.experience import Experience
from alignment.training.batches import deal
from alignment.training.nonfinite import Culprit, tell_fault

MEASURED = {  # name in messages -> field of Experience, in the order in which they are measured
    "log-probability of sampling": "log_probs",
    "log-probability of the reference": "ref_log_probs",
    "value of the critic": "values",
}
REWARD_ADVICE = "look at what the reward sources say of these answers"
MODEL_ADVICE = 'look at these prompts and at the model; lower "learning_rate" if it has learnt already'


def describe_bad_answers(
    experience: Experience, components: dict[str, np.ndarray], drawn_by: np.ndarray
) -> str | None:
    """One line about the answers that cannot be learnt from: phase, quantity, ranks, prompt ids. None: all are well.

    Every process has the same experience and says the same.

    Args: components: of the reward, by source; drawn_by: the rank that drew each answer.
    """
    for quantity, name in MEASURED.items():
        bad = ~np.isfinite(np.where(experience.response_mask, getattr(experience, name), 0.0)).all(-1)
        if bad.any():
            ranks = drawn_by if name == "log_probs" else _ranks(experience.attention_mask.sum(-1))
            values = getattr(experience, name)[bad][experience.response_mask[bad]]
            value = values[~np.isfinite(values)][0]
            return tell_fault(quantity, value, _culprits(bad, ranks, experience.prompt_id.tolist()), MODEL_ADVICE)
    return describe_bad_rewards(experience.scores, components, experience.lengths, experience.prompt_id.tolist())


def describe_bad_rewards(
    scores: np.ndarray, components: dict[str, np.ndarray], lengths: np.ndarray, samples: Sequence[int | str]
) -> str | None:
    """The same about N answers whose scores, float32 [N], are not all finite, whatever was measured of them.

    Args: components: as above; lengths: int [N], tokens; samples: N, what to call the answers.
    """
    bad = ~np.isfinite(scores)
    if not bad.any():
        return None
    sources = [name for name, values in components.items() if not np.isfinite(values).all()] or ["weighted sum"]
    quantity, value = f"reward ({', '.join(sources)})", scores[bad][0]
    return tell_fault(quantity, value, _culprits(bad, _ranks(lengths), samples), REWARD_ADVICE)


def _ranks(lengths: np.ndarray) -> np.ndarray:
    """int64 [N]: the rank in the job to which ``deal`` gives each answer."""
    members = topology().group("data")
    numbers: Sequence[int] = [topology().rank] if members is None else members.ranks
    ranks = np.zeros(len(lengths), np.int64)
    for index, rank in enumerate(numbers):
        ranks[deal(range(len(lengths)), lengths.__getitem__, index, len(numbers))] = rank
    return ranks


def _culprits(bad: np.ndarray, ranks: np.ndarray, samples: Sequence[int | str]) -> list[Culprit]:
    return [Culprit(int(ranks[row]), (samples[row],)) for row in np.flatnonzero(bad)]
