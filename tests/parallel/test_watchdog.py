"""What the watch-dog makes of a table of heartbeats, and of its own sleep. tests/test_watchdog.py has real jobs."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from alignment.parallel.watchdog import Beat, Clock, Seen, judge

EVERYBODY = [0, 1, 2]


def at_work(where="step 3, score", lost=False):
    return Beat(where, "a sum", EVERYBODY, 8, False, lost)


def waits(operation="a gathering", members=EVERYBODY):
    return Beat("step 3, update", operation, members, 9, True, False)


def table(*beats, silent=(0, 0, 0), same=(0, 0, 0)):
    return {rank: Seen(beat, silent[rank], same[rank]) for rank, beat in enumerate(beats)}


def test_a_silent_process_is_named_with_all_that_wait():
    beats = waits(), at_work("step 2, rollout"), waits("a sum", [0, 2])
    assert judge(table(*beats, silent=(0, 60, 0)), 60) is None
    assert judge(table(*beats, silent=(0, 61, 0)), 60) == (
        "watch-dog: rank 1 has not answered for 61 s (last seen at step 2, rollout); "
        "rank 0, at step 3, update, waits in a gathering for ranks 1, 2; "
        "rank 2, at step 3, update, waits in a sum for rank 0"
    )


def test_a_process_that_falls_silent_in_the_middle_of_an_operation():
    """The others are in it too: they have met, so they do not wait to meet."""
    assert judge(table(at_work(), at_work(), waits("a sum", [0, 2]), silent=(0, 61, 0)), 60).endswith(
        "; rank 2, at step 3, update, waits in a sum for rank 0"
    )
    assert judge(table(at_work(), at_work(), silent=(0, 61)), 60).endswith(
        "; rank 0, at step 3, score, has met it for a sum"
    )
    start = Beat("step 0, start", "", [], 0, False, False)
    assert judge(table(start, start, silent=(0, 61)), 60).endswith("; nobody waits for it yet")


def test_waiting_long_for_a_process_that_works_is_no_hang():
    assert judge(table(waits(), at_work(), waits(), same=(9999, 9999, 9999)), 60) is None


def test_all_waiting_for_each_other():
    beats = waits("a barrier"), waits(), waits()
    assert judge(table(*beats, same=(99, 99, 61)), 60, complete=False) is None  # one has ended
    assert judge(table(*beats, same=(99, 99, 59)), 60) is None  # one has just come
    line = judge(table(*beats, same=(99, 99, 61)), 60)
    assert "for 60 s all processes have been waiting for each other: rank 0, at step 3, update, waits in a ba" in line
    assert "rank 1, at step 3, update, waits in a gathering for rank 0;" in line


def test_a_failed_operation_makes_it_impatient():
    assert judge(table(at_work(), at_work(), at_work(), silent=(0, 31, 0)), 300) is None
    line = judge(table(at_work(lost=True), at_work(), at_work(), silent=(0, 31, 0)), 300)
    assert "rank 1 has not answered for 31 s" in line
    assert "rank 0, at step 3, score, has given up a sum with ranks 0, 1, 2" in line
    assert judge(table(at_work(lost=True), at_work(), at_work()), 300) is None  # a peer that died says why


def test_time_asleep_does_not_count():
    clock = Clock(0.01)
    before = clock.tick()
    time.sleep(0.2)  # as if this process had been stopped
    assert clock.tick() - before <= 0.02


# One process of three falls silent before it has joined; the other two run as threads of a job's ranks would.
JOINING = """
import os, time
from multiprocessing.connection import Client, Listener
from alignment.parallel.watchdog import Guest, Host

listener = Listener(("127.0.0.1", 0), backlog=3)
"""
RANK_2_IS_STOPPED = """
caller = Client(listener.address)
if os.fork() == 0:
    Guest(listener.address, "secret", 1, 1.0).run()
    os._exit(3)  # nobody told it anything
Host(listener, "secret", 3, 1.0).run()
"""
RANK_0_IS_STOPPED = """
Guest(listener.address, "secret", 1, 1.0).run()
"""


@pytest.mark.parametrize(("job", "stopped", "lines"), [(RANK_2_IS_STOPPED, 2, 2), (RANK_0_IS_STOPPED, 0, 1)])
def test_a_process_that_is_stopped_before_it_has_joined_is_named(job, stopped, lines):
    result = subprocess.run([sys.executable, "-c", JOINING + job], stderr=subprocess.PIPE, text=True)
    said = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 1 and len(said) == lines, result.stderr
    for line in said:
        assert line.startswith(f"error: watch-dog: rank {stopped} has not answered for ")
