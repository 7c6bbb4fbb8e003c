"""Scores of a batch that every process has, each data-parallel share judging a part of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from alignment.parallel.collectives import gather_objects
from alignment.parallel.topology import topology
from alignment.ppo.nonfinite import describe_bad_rewards
from alignment.ppo.rewards.base import RewardBatch, WeightedRewards
from alignment.runtime.faults import RunError
from alignment.training.batches import deal


def score_finite(
    rewards: WeightedRewards, batch: RewardBatch, samples: Sequence[int | str]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """As ``score_divided``. Raises RunError, on all processes, that names step, phase, ranks and ``samples`` (what to
    call the N answers) of rewards that are not finite."""
    scores, components = score_divided(rewards, batch)
    lengths = np.array([len(ids) for ids in batch.response_ids])
    fault = describe_bad_rewards(scores, components, lengths, samples)
    if fault is not None:
        raise RunError(fault)
    return scores, components


def score_divided(rewards: WeightedRewards, batch: RewardBatch) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """As ``WeightedRewards.score`` of the whole ``batch``, on every process; with fewer responses than shares too.

    Rewards need not be finite.

    Args: batch: the same on every process, token ids included.
    """
    place = topology()
    own = deal(range(len(batch)), lambda row: len(batch.response_ids[row]), place.data_rank, place.data_size)
    if own:
        part = rewards.score(batch.take(own), keep_nonfinite=True)
    else:
        rewards.sit_out()
        part = np.zeros([0], dtype=np.float32), {}
    judged = gather_objects((own, *part))
    scores = np.zeros(len(batch), dtype=np.float32)
    whole = {name: scores.copy() for name in next(components for rows, _, components in judged if rows)}
    for rows, values, components in judged:
        scores[rows] = values
        for name, component in components.items():
            whole[name][rows] = component
    return scores, whole
