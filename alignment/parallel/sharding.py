"""Sharding of optimizer and gradients (ZeRO, Rajbhandari et al. 2020, arXiv:1910.02054) by whole parameters.

Every trained parameter has one owner among the processes that hold the same part of the model. The owner alone keeps
its optimizer state (stage 1) and the sum of its gradients (stage 2), updates it and hands it to the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import paddle
import paddle.distributed as dist

from alignment.parallel.collectives import buckets, flatten, unflatten
from alignment.parallel.gloo import meet
from alignment.parallel.topology import topology


def assign_owners(sizes: Sequence[int], members: int) -> list[int]:
    """The owner of each parameter, so that all members own about as many elements: largest first, to the poorest."""
    load = [0] * members
    owners = [0] * len(sizes)
    for i in np.argsort([-size for size in sizes], kind="stable"):
        owners[i] = load.index(min(load))
        load[owners[i]] += sizes[i]
    return owners


class Shards:
    """Who owns which of ``parameters``; without sharding this process owns all of them."""

    def __init__(self, parameters: Sequence[paddle.Tensor]) -> None:
        place = topology()
        self.stage = place.layout.sharding_stage
        owners = assign_owners([parameter.size for parameter in parameters], place.layout.sharding)
        self.by_owner = [
            [parameter for parameter, owner in zip(parameters, owners, strict=True) if owner == member]
            for member in range(place.layout.sharding)
        ]
        self.own = self.by_owner[place.sharding_rank]
        self.sums: dict[str, paddle.Tensor] = {}  # stages 2 and 3: float32 gradients of ``own`` so far, by name

    def collect_gradients(self) -> None:
        """Stage 2: send the gradients of the latest backward pass to their owners and forget them here."""
        group = topology().group("sharding")
        meet(group)
        for member, parameters in enumerate(self.by_owner):
            for bucket in buckets(parameters):
                flat = flatten([p.grad if p.grad is not None else paddle.zeros_like(p) for p in bucket])
                dist.reduce(flat, dst=group.ranks[member], group=group)
                for parameter in bucket:
                    parameter.clear_gradient(False)
                if member == topology().sharding_rank:
                    self._add(flat, bucket)

    def _add(self, flat: paddle.Tensor, bucket: list[paddle.Tensor]) -> None:
        parts = paddle.split(flat, [parameter.size for parameter in bucket])
        for parameter, part in zip(bucket, parts, strict=True):
            part = part.reshape(parameter.shape)
            before = self.sums.get(parameter.name)
            self.sums[parameter.name] = part if before is None else before + part

    def share_updates(self) -> None:
        """Give every member the parameters that their owners have changed."""
        group = topology().group("sharding")
        if group is None:
            return
        meet(group)
        for member, parameters in enumerate(self.by_owner):
            for bucket in buckets(parameters):
                flat = flatten(bucket)
                dist.broadcast(flat, src=group.ranks[member], group=group)
                if member != topology().sharding_rank:
                    unflatten(flat, bucket)
