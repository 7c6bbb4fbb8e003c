"""Collectives of the toolkit, by the groups of the topology; alone in a group, each is the identity.

Every loss is already divided by its *global* denominator (see alignment.ppo.losses), so gradients are summed over the
processes that work on different samples, never averaged.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import paddle
import paddle.distributed as dist

from alignment.parallel.autograd import Copy, Sum, concat
from alignment.parallel.gloo import meet
from alignment.parallel.topology import topology

BUCKET_ELEMENTS = 16 * 1024 * 1024  # tensors travel in flat buffers of at most about so many elements


def barrier() -> None:
    """Wait for every process of the job."""
    everyone = topology().group("world")
    if everyone is not None:
        meet(everyone, "a barrier")
        dist.barrier(everyone)


def gather_objects(item: object, group: str = "data") -> list:
    """One picklable object of every process of a group, in rank order (our own processes', never a user's file)."""
    members = topology().group(group)
    if members is None:
        return [item]
    meet(members, "a gathering")
    gathered: list = []
    dist.all_gather_object(gathered, item, group=members)
    return gathered


def from_head(item: object, group: Any = None) -> Any:
    """What the head (Topology.is_head) of a model's processes has, on all of them; default: of the group "model"."""
    group = group or topology().group("model")
    if group is None:
        return item
    meet(group, "a broadcast of results")
    box = [item]
    dist.broadcast_object_list(box, src=head_of(group), group=group)
    return box[0]


def head_of(group: Any) -> int:
    """The rank in the job of the head of a "model" or "tensor" group: the first of the last stage."""
    return group.ranks[-topology().layout.tensor]


def sum_tensors(tensors: Iterable[paddle.Tensor], group: str) -> None:
    """Sum each tensor over a group, in place and in float32."""
    members = topology().group(group)
    if members is None:
        return
    meet(members, "a sum")
    for bucket in buckets(tensors):
        flat = flatten(bucket)
        dist.all_reduce(flat, group=members)
        unflatten(flat, bucket)


def buckets(tensors: Iterable[paddle.Tensor]) -> Iterable[list[paddle.Tensor]]:
    """Consecutive tensors, together at least BUCKET_ELEMENTS (the last bucket may be smaller)."""
    bucket: list[paddle.Tensor] = []
    size = 0
    for tensor in tensors:
        bucket.append(tensor)
        size += tensor.size
        if size >= BUCKET_ELEMENTS:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


def flatten(tensors: list[paddle.Tensor]) -> paddle.Tensor:
    """float32 [n]: the tensors' elements one after the other."""
    return paddle.concat([tensor.detach().astype("float32").flatten() for tensor in tensors])


def unflatten(flat: paddle.Tensor, tensors: list[paddle.Tensor]) -> None:
    """Write the elements of ``flat`` back into the tensors it was made of."""
    parts = paddle.split(flat, [tensor.size for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        paddle.assign(part.reshape(tensor.shape).astype(tensor.dtype), tensor)


def sum_over_tensor_group(x: paddle.Tensor) -> paddle.Tensor:
    """The sum over the processes that share each matrix, with gradient (autograd.Sum)."""
    return Sum.apply(x, topology().group("tensor"))


def copy_to_tensor_group(x: paddle.Tensor) -> paddle.Tensor:
    """x, about to meet different columns on the processes that share each matrix, with gradient (autograd.Copy)."""
    return Copy.apply(x, topology().group("tensor"))


def concat_over_tensor_group(x: paddle.Tensor, axis: int = -1) -> paddle.Tensor:
    """The parts of the processes that share each matrix side by side, without a gradient."""
    return concat(x, topology().group("tensor"), axis)
