"""Data-parallel processes of a job, played by threads of which one runs at a time: quick, and any number of them.

Only gathers of Python objects travel between them. Whatever else processes do is tested under Paddle's launcher.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, BrokenBarrierError, Lock
from types import SimpleNamespace
from typing import TypeVar

import paddle.distributed as dist
import pytest

from alignment.parallel import topology
from alignment.parallel.layout import Layout
from alignment.parallel.topology import Topology

Result = TypeVar("Result")


def play(count: int, work: Callable[[], Result]) -> list[Result]:
    """What ``work`` returns as each of ``count`` processes that work on different samples."""
    running, everybody, given = Lock(), Barrier(count), [b""] * count

    def place_of(rank: int) -> Topology:
        group = SimpleNamespace(id=-1, rank=rank, nranks=count, ranks=list(range(count)))
        return Topology(Layout(data=count), rank, groups={"data": group, "world": group})

    places = [place_of(rank) for rank in range(count)]

    def let_others_run(rank: int) -> None:
        running.release()
        try:
            everybody.wait(60)
        finally:
            running.acquire()
            topology._current = places[rank]

    def gather(gathered: list, item: object, group: SimpleNamespace) -> None:
        given[group.rank] = pickle.dumps(item)
        let_others_run(group.rank)
        gathered += map(pickle.loads, given)
        let_others_run(group.rank)

    def run(rank: int) -> Result:
        with running:
            topology._current = places[rank]
            try:
                return work()
            except BaseException:
                everybody.abort()
                raise

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(count) as threads:
        patch.setattr(topology, "_current", topology._current)  # taken back in the end
        patch.setattr(dist, "all_gather_object", gather)
        futures = [threads.submit(run, rank) for rank in range(count)]
        faults = [future.exception() for future in futures]
    for fault in sorted(filter(None, faults), key=lambda fault: isinstance(fault, BrokenBarrierError)):
        raise fault
    return [future.result() for future in futures]
