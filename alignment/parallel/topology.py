"""Who this process is in the job's layout, and the groups it talks to.

Ranks are numbered as PaddleNLP numbers them: data (slowest), pipeline, sharding, tensor. Without ``join``, or with one
process, everything here says "alone".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import Any

import paddle
import paddle.distributed as dist
from paddle.distributed import fleet

from alignment.parallel import gloo
from alignment.parallel.layout import Layout
from alignment.runtime.bootstrap import is_debug


@dataclass(frozen=True)
class Topology:
    """This process's coordinates and groups (paddle.distributed.Group; None where the process would be alone in it).

    world: all processes; data: those with the same part of the model and different samples (data x sharding), in the
    samples' order; tensor: those that share each matrix; pipe: the stages of one model; model: pipe x tensor, all that
    work on the same samples; sharding: those that split an optimizer; replica: those that hold the same part of it;
    next, previous: this stage and its neighbour (gloo counts messages by group, so that only a group of two can send
    and receive); ends: the first and the last stage, which share a tied embedding.
    """

    layout: Layout = Layout()
    data_rank: int = 0
    stage: int = 0
    sharding_rank: int = 0
    tensor_rank: int = 0
    groups: dict[str, Any] = field(default_factory=dict)

    @property
    def data_size(self) -> int:
        """How many processes share the samples of a batch."""
        return self.layout.data * self.layout.sharding

    @property
    def rank(self) -> int:
        """This process's number in the job."""
        everyone = self.group("world")
        return 0 if everyone is None else everyone.rank

    @property
    def is_first_stage(self) -> bool:
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.layout.pipeline - 1

    @property
    def is_head(self) -> bool:
        """Of the processes that work on the same samples, the one whose word counts: it has the model's results."""
        return self.is_last_stage and self.tensor_rank == 0

    def group(self, name: str) -> Any:
        """One of the groups above, or None."""
        return self.groups.get(name)


_current = Topology()


def topology() -> Topology:
    """This process's place."""
    return _current


def join(layout: Layout, seed: int = 0) -> Topology:
    """Meet the job's other processes and form the groups of ``layout``; a second call with the same layout is free.

    Args: seed: of PaddleNLP's tensor-parallel random state (no layer here draws from it).
    Raises: RuntimeError if the process has joined in another layout.
    """
    global _current
    if _current.layout == layout:
        return _current
    if _current.groups:
        raise RuntimeError(f"this process has joined as {_current.layout}, it cannot become {layout}")
    if paddle.get_device() == "cpu":
        gloo.prepare()
    strategy = fleet.DistributedStrategy()
    strategy.hybrid_configs = {
        "dp_degree": layout.data,
        "mp_degree": layout.tensor,
        "pp_degree": layout.pipeline,
        "sharding_degree": layout.sharding,
        "order": ["dp", "pp", "sharding", "sep", "mp"],
    }
    strategy.tensor_parallel_configs = {"tensor_init_seed": seed}
    fleet.init(is_collective=True, strategy=strategy, log_level="INFO" if is_debug() else "ERROR")
    _current = _locate(layout, dist.get_rank(), fleet.get_hybrid_communicate_group())
    return _current


def _locate(layout: Layout, rank: int, fleet_groups: Any) -> Topology:
    coordinates = list(
        product(range(layout.data), range(layout.pipeline), range(layout.sharding), range(layout.tensor))
    )
    data, stage, shard, tensor = coordinates[rank]
    groups = {
        "tensor": fleet_groups.get_model_parallel_group(),
        "pipe": fleet_groups.get_pipe_parallel_group(),
        "sharding": fleet_groups.get_sharding_parallel_group(),
        "replica": fleet_groups.get_data_parallel_group(),
        "world": _group_along(coordinates, rank, lambda d, p, s, t: ()),
        "data": _group_along(coordinates, rank, lambda d, p, s, t: (p, t)),
        "model": _group_along(coordinates, rank, lambda d, p, s, t: (d, s)),
        **_stage_groups(layout, coordinates, rank),
    }
    shared = {name: group for name, group in groups.items() if group is not None and group.nranks > 1}
    return Topology(layout, data * layout.sharding + shard, stage, shard, tensor, shared)


def _group_along(coordinates: list[tuple[int, ...]], rank: int, key: Any) -> Any:
    """The group of all ranks whose coordinates give the same ``key`` as ours; every rank takes part in forming all."""
    mine = None
    for value in dict.fromkeys(key(*c) for c in coordinates):
        ranks = [r for r, c in enumerate(coordinates) if key(*c) == value]
        group = dist.new_group(ranks) if len(ranks) > 1 else None
        if rank in ranks:
            mine = group
    return mine


def _stage_groups(layout: Layout, coordinates: list[tuple[int, ...]], rank: int) -> dict[str, Any]:
    """The groups of two stages of one pipeline: neighbours, and both ends."""
    mine: dict[str, Any] = {}
    last = layout.pipeline - 1
    for data, shard, tensor in dict.fromkeys((d, s, t) for d, _, s, t in coordinates):
        ranks = [coordinates.index((data, stage, shard, tensor)) for stage in range(layout.pipeline)]
        for stage in range(last):
            group = dist.new_group(ranks[stage : stage + 2])
            if rank == ranks[stage]:
                mine["next"] = group
            if rank == ranks[stage + 1]:
                mine["previous"] = group
        if last > 0:
            group = dist.new_group([ranks[0], ranks[last]])
            if rank in (ranks[0], ranks[last]):
                mine["ends"] = group
    return mine
