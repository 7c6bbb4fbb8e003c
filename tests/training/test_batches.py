"""Batches: every sample once an epoch, the same for the same seed; each process's share of them."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.parallel.layout import Layout
from alignment.parallel.topology import Topology
from alignment.training import batches
from alignment.training.batches import BatchSchedule, WeightedSchedule, deal, idle_rounds, own_micro_batches

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


def places(data: int, sharding: int) -> list[Topology]:
    """The processes of a job that work on different samples, in the samples' order."""
    layout = Layout(data=data, sharding=sharding, sharding_stage=1 if sharding > 1 else 0)
    return [Topology(layout, rank, sharding_rank=rank % sharding) for rank in range(data * sharding)]


@contextmanager
def at(place: Topology):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "topology", lambda: place)
        yield


lengths_of_items = st.lists(st.integers(1, 20), max_size=30)


@quick
@given(lengths_of_items, st.integers(1, 6))
def test_items_are_dealt_once_and_evenly(lengths, count):
    items = list(enumerate(lengths))
    parts = [deal(items, lambda item: item[1], index, count) for index in range(count)]
    assert sorted(item for part in parts for item in part) == items
    for part in parts:
        assert [length for _, length in part] == sorted(length for _, length in part)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    work = [sum(length for _, length in part) for part in parts]
    assert max(work) - min(work) <= max(lengths, default=0)


@quick
@given(lengths_of_items, st.integers(1, 5), st.integers(1, 4), st.integers(1, 3))
def test_processes_share_a_batch(lengths, micro_batch_size, data, sharding):
    """The sharding processes too work on different samples; and nobody has more rounds than the busiest."""
    items = list(enumerate(lengths))
    shares, rounds, idle = [], [], []
    for place in places(data, sharding):
        with at(place):
            parts = own_micro_batches(items, lambda item: item[1], micro_batch_size)
            idle.append(idle_rounds(len(items), micro_batch_size))
        assert all(len(part) == micro_batch_size for part in parts[:-1])
        assert all(1 <= len(part) <= micro_batch_size for part in parts)
        rounds.append(len(parts))
        shares.append([item for part in parts for item in part])
    assert sorted(item for share in shares for item in share) == items
    for rank, share in enumerate(shares):
        assert share == deal(items, lambda item: item[1], rank, data * sharding)
    assert min(idle) == 0 and {one + other for one, other in zip(rounds, idle, strict=True)} == {max(rounds)}


@quick
@given(lengths_of_items, st.integers(1, 5), st.integers(1, 4))
def test_all_processes_of_a_model_work_on_the_same_samples(lengths, micro_batch_size, data):
    layout = Layout(data=data, pipeline=2, tensor=2)
    for rank in range(data):
        found = []
        for stage, tensor in ((0, 0), (0, 1), (1, 0), (1, 1)):
            with at(Topology(layout, rank, stage=stage, tensor_rank=tensor)):
                parts = own_micro_batches(lengths, int, micro_batch_size)
                found.append((parts, idle_rounds(len(lengths), micro_batch_size)))
        assert all(one == found[0] for one in found)


def test_one_process_gets_everything():
    assert own_micro_batches(["ccc", "a", "bb", "dddd", "e"], len, 2) == [["a", "e"], ["bb", "ccc"], ["dddd"]]
    assert idle_rounds(5, 2) == 0


@quick
@given(counts, seeds, st.lists(st.integers(0, 5), min_size=2, max_size=4), st.integers(0, 2**31))
def test_weighted_sources_have_their_shares_and_use_every_sample_in_turn(count, seed, weights, other):
    source = np.random.default_rng(other).integers(0, len(weights), count)
    weights = [weight * bool((source == place).any()) for place, weight in enumerate(weights)]
    if not any(weights):
        return
    schedule = WeightedSchedule(count=count, batch_size=3, seed=seed, source=source, weights=weights)
    drawn = [np.concatenate(epoch_of(schedule, epoch)) for epoch in range(3)]
    for place, weight in enumerate(weights):
        shares = [int((source[part] == place).sum()) for part in drawn]
        assert len(set(shares)) == 1 and abs(shares[0] - count * weight / sum(weights)) < 1
        times = np.bincount(np.concatenate(drawn), minlength=count)[source == place]
        assert times.size == 0 or times.max() - times.min() <= 1
