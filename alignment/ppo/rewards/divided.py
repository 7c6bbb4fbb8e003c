"""Scores of a batch that every process has, each data-parallel share judging a part of it."""

from __future__ import annotations

import numpy as np

from alignment.parallel.collectives import gather_objects
from alignment.parallel.topology import topology
from alignment.ppo.rewards.base import RewardBatch, WeightedRewards
from alignment.training.batches import deal


def score_divided(
    rewards: WeightedRewards, batch: RewardBatch, keep_nonfinite: bool = False
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """As ``WeightedRewards.score`` of the whole ``batch``, on every process; with fewer responses than shares too.

    Args: batch: the same on every process, token ids included.
    """
    place = topology()
    own = deal(range(len(batch)), lambda row: len(batch.response_ids[row]), place.data_rank, place.data_size)
    if own:
        part = rewards.score(batch.take(own), keep_nonfinite)
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
