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
        return self.order(epoch)[batch * self.batch_size : (batch + 1) * self.batch_size]

    def order(self, epoch: int) -> np.ndarray:
        """int64 [count]: the samples of an epoch."""
        return np.random.default_rng([self.seed, epoch]).permutation(self.count)


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightedSchedule(BatchSchedule):
    """Batches of samples from several sources, each source's share being its weight's, whatever its size.

    The shares hold exactly in each epoch of ``count`` samples (to the rounding of one sample), and in each step on
    average. Of a source, no sample comes again before all its others have come: a large one goes on through several
    epochs, a small one comes several times in one.

    source: int [count], where each sample is from; weights: one a source, >= 0, and 0 where it has no sample.
    """

    source: np.ndarray
    weights: Sequence[float]

    def order(self, epoch: int) -> np.ndarray:
        shares = self._shares()
        drawn = [self._draw(number, epoch * share, share) for number, share in enumerate(shares.tolist())]
        return np.random.default_rng([self.seed, epoch]).permutation(np.concatenate(drawn))

    def _shares(self) -> np.ndarray:
        """int64 [sources]: samples an epoch, which add up to ``count``, by the largest remainders."""
        exact = self.count * np.array(self.weights) / np.sum(self.weights)
        shares = np.floor(exact).astype(np.int64)
        largest = np.argsort(shares - exact, kind="stable")[: self.count - shares.sum()]
        shares[largest] += 1
        return shares

    def _draw(self, number: int, start: int, share: int) -> np.ndarray:
        """The samples ``start`` to ``start + share`` of a source's endless row of shuffled passes."""
        own = np.flatnonzero(self.source == number)
        if share == 0:
            return own[:0]
        passes = range(start // len(own), (start + share - 1) // len(own) + 1)
        shuffled = [np.random.default_rng([self.seed, one, number + 1]).permutation(own) for one in passes]
        offset = start - passes[0] * len(own)
        return np.concatenate(shuffled)[offset : offset + share]


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
