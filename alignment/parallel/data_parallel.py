"""Data parallelism: who am I, and sums and gathers over all ranks (PaddleNLP's arguments join them).

Every loss in the toolkit is already divided by its *global* denominator (see alignment.ppo.losses), so gradients are
summed over ranks, never averaged. With one process every function here is the identity.
"""
from __future__ import annotations

from collections.abc import Iterable

import paddle
import paddle.distributed as dist

BUCKET_ELEMENTS = 16 * 1024 * 1024  # gradients travel in flat buffers of at most this many elements


def close_processes() -> None:
    """Leave the job together: a rank that exits first would make the others report a lost connection."""
    if world_size() > 1:
        dist.barrier()


def rank() -> int:
    """This process's number, 0 to world_size() - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes share the job."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather_objects(item: object) -> list:
    """Collect one picklable object from every rank, in rank order (our own processes only, never a user's file)."""
    if world_size() == 1:
        return [item]
    gathered: list = []
    dist.all_gather_object(gathered, item)
    return gathered


def sum_gradients(parameters: Iterable[paddle.Tensor]) -> None:
    """Sum ``parameter.grad`` over all ranks in place; a rank without a gradient takes part with zeros."""
    if world_size() == 1:
        return
    bucket: list[paddle.Tensor] = []
    size = 0
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = paddle.zeros_like(parameter)
        bucket.append(parameter.grad)
        size += parameter.grad.size
        if size >= BUCKET_ELEMENTS:
            _sum_bucket(bucket)
            bucket, size = [], 0
    if bucket:
        _sum_bucket(bucket)


def _sum_bucket(gradients: list[paddle.Tensor]) -> None:
    flat = paddle.concat([gradient.astype("float32").flatten() for gradient in gradients])
    dist.all_reduce(flat)
    parts = paddle.split(flat, [gradient.size for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        paddle.assign(part.reshape(gradient.shape).astype(gradient.dtype), gradient)
