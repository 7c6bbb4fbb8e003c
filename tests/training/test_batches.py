"""Batches: every sample once an epoch, the same for the same seed; each rank's share of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.training import batches
from alignment.training.batches import BatchSchedule, own_micro_batches

quick = settings(max_examples=60, deadline=None, derandomize=True)
counts, sizes, seeds = st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**32 - 1)


def epoch_of(schedule: BatchSchedule, epoch: int) -> list[np.ndarray]:
    steps = schedule.steps_per_epoch
    return [schedule(step) for step in range(epoch * steps, (epoch + 1) * steps)]


@quick
@given(counts, sizes, seeds, st.integers(0, 3))
def test_an_epoch_holds_every_sample_once(count, size, seed, epoch):
    parts = epoch_of(BatchSchedule(count, size, seed), epoch)
    assert sorted(np.concatenate(parts)) == list(range(count))
    assert [len(part) for part in parts] == [size] * (count // size) + [count % size] * (count % size > 0)


@quick
@given(counts, sizes, seeds)
def test_drop_last_leaves_only_full_batches(count, size, seed):
    """Save where all the data is less than one batch: training on nothing would help nobody."""
    parts = epoch_of(BatchSchedule(count, size, seed, drop_last=True), 1)
    used = np.concatenate(parts)
    assert len(set(used)) == len(used)
    assert [len(part) for part in parts] == ([size] * (count // size) if count >= size else [count])


@quick
@given(st.integers(8, 40), sizes, seeds, st.integers(0, 50))
def test_a_step_is_a_pure_function_of_seed_and_step(count, size, seed, step):
    np.random.seed(step)
    first = BatchSchedule(count, size, seed)(step)
    np.testing.assert_array_equal(BatchSchedule(count, size, seed)(step), first)


def test_seeds_and_epochs_shuffle_differently():
    orders = {
        tuple(np.concatenate(epoch_of(BatchSchedule(30, 4, seed), epoch))) for seed in range(3) for epoch in range(3)
    }
    assert len(orders) == 9 and tuple(range(30)) not in orders


@quick
@given(st.lists(st.integers(1, 20), max_size=30), st.integers(1, 5), st.integers(1, 4))
def test_ranks_share_a_batch(lengths, micro_batch_size, ranks):
    items = list(enumerate(lengths))
    shares = []
    for rank in range(ranks):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(batches, "rank", lambda rank=rank: rank)
            patch.setattr(batches, "world_size", lambda: ranks)
            parts = list(own_micro_batches(items, lambda item: item[1], micro_batch_size))
        assert all(len(part) == micro_batch_size for part in parts[:-1])
        assert all(1 <= len(part) <= micro_batch_size for part in parts)
        share = [item for part in parts for item in part]
        assert [length for _, length in share] == sorted(length for _, length in share)
        shares.append(share)
    assert sorted(item for share in shares for item in share) == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    work = [sum(length for _, length in share) for share in shares]
    assert max(work) - min(work) <= max(lengths, default=0)


def test_one_process_gets_everything():
    parts = list(own_micro_batches(["ccc", "a", "bb", "dddd", "e"], len, 2))
    assert parts == [["a", "e"], ["bb", "ccc"], ["dddd"]]
