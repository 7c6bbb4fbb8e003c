"""Which samples make up which optimizer step: a pure function of the seed and the step, whatever the layout."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from alignment.parallel.topology import topology

Item = TypeVar("Item")


@dataclass(frozen=True)
class BatchSchedule:
    """Global batches over a data set of ``count`` samples, shuffled anew in each epoch.

    Calling it with a step gives the int64 indices of that step's samples, so a resumed run needs no replay.
    """

    count: int
    batch_size: int
    seed: int
    drop_last: bool = False

    @property
    def steps_per_epoch(self) -> int:
        """Steps in one pass over the data; the last may be smaller unless ``drop_last``."""
        full, rest = divmod(self.count, self.batch_size)
        return max(1, full + (rest > 0 and not self.drop_last))

    def __call__(self, step: int) -> np.ndarray:
        epoch, batch = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
        return order[batch * self.batch_size : (batch + 1) * self.batch_size]


def deal(items: Sequence[Item], length: Callable[[Item], int], index: int, count: int) -> list[Item]:
    """Part ``index`` of ``count``, shortest first; long and short ones are dealt in turn, so that parts are even."""
    return sorted(items, key=length)[index::count]


def own_micro_batches(
    items: Sequence[Item], length: Callable[[Item], int], micro_batch_size: int
) -> list[list[Item]]:
    """This process's share of a global batch, the same on all that work on the same samples, as micro-batches.

    Samples of like length stand together (little padding): the order inside a batch cannot matter, since every loss
    has a global denominator.
    """
    own = deal(items, length, topology().data_rank, topology().data_size)
    return [own[start : start + micro_batch_size] for start in range(0, len(own), micro_batch_size)]


def idle_rounds(count: int, micro_batch_size: int) -> int:
    """How many micro-batches fewer than another process this one has of a global batch of ``count`` samples."""
    place = topology()
    most = -(-count // place.data_size)
    own = len(range(place.data_rank, count, place.data_size))
    return -(-most // micro_batch_size) - -(-own // micro_batch_size)
