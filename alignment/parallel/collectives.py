"""Collectives of the toolkit, by the groups of the topology; alone in a group, each is the identity.

Every loss is already divided by its *global* denominator (see alignment.ppo.losses), so gradients are summed over the
processes that work on different samples, never averaged.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import paddle
import paddle.distributed as dist
from paddle.autograd import PyLayer

from alignment.parallel.gloo import meet
from alignment.parallel.topology import topology

BUCKET_ELEMENTS = 16 * 1024 * 1024  # tensors travel in flat buffers of at most about so many elements


def barrier() -> None:
    """Wait for every process of the job."""
    everyone = topology().group("world")
    if everyone is not None:
        meet(everyone)
        dist.barrier(everyone)


def gather_objects(item: object, group: str = "data") -> list:
    """One picklable object of every process of a group, in rank order (our own processes', never a user's file)."""
    members = topology().group(group)
    if members is None:
        return [item]
    meet(members)
    gathered: list = []
    dist.all_gather_object(gathered, item, group=members)
    return gathered


def from_head(item: object, group: Any = None) -> Any:
    """What the head (Topology.is_head) of a model's processes has, on all of them; default: of the group "model"."""
    group = group or topology().group("model")
    if group is None:
        return item
    meet(group)
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
    meet(members)
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


class SumOverTensorGroup(PyLayer):
    """The sum over the tensor-parallel group; the gradient as it is, for every member computes the same loss."""

    @staticmethod
    def forward(ctx: Any, x: paddle.Tensor) -> paddle.Tensor:
        x = paddle.assign(x)
        dist.all_reduce(x, group=topology().group("tensor"))
        return x

    @staticmethod
    def backward(ctx: Any, grad: paddle.Tensor) -> paddle.Tensor:
        return paddle.assign(grad)


class CopyToTensorGroup(PyLayer):
    """x as it is; its gradient summed over the tensor-parallel group, whose members use x for different columns."""

    @staticmethod
    def forward(ctx: Any, x: paddle.Tensor) -> paddle.Tensor:
        return paddle.assign(x)

    @staticmethod
    def backward(ctx: Any, grad: paddle.Tensor) -> paddle.Tensor:
        grad = paddle.assign(grad)
        dist.all_reduce(grad, group=topology().group("tensor"))
        return grad


def concat_over_tensor_group(x: paddle.Tensor, axis: int = -1) -> paddle.Tensor:
    """The parts of all members side by side; carries no gradient."""
    parts: list[paddle.Tensor] = []
    dist.all_gather(parts, x.detach().contiguous(), group=topology().group("tensor"))
    return paddle.concat(parts, axis=axis)
