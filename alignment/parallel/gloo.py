"""What Paddle's fleet lacks on CPUs, supplied from outside: every patch of Paddle in this toolkit stands here.

Found with paddlepaddle 3.3.1. ``prepare`` is called for CPU jobs only; on GPUs Paddle's own kernels and NCCL serve.
Each patch says what it is for; one whose reason is gone in a later Paddle can be deleted alone.
"""

from __future__ import annotations

import os
import socket
from typing import Any

import paddle
import paddle.distributed as dist
from paddle.autograd import PyLayer
from paddle.base import core
from paddle.distributed import collective
from paddle.distributed.fleet.layers.mpu import mp_ops
from paddle.distributed.fleet.utils import sequence_parallel_utils
from paddle.distributed.parallel import ParallelEnv

PORT_TRIES = 20
STORE_TIMEOUT_SECONDS = 300
_default_group_impl = collective._new_process_group_impl
_stores: list[Any] = []  # a group's connections live as long as its store


def prepare() -> None:
    """Patch Paddle for tensor and pipeline parallelism over gloo; calling it again changes nothing."""
    # ParallelEnv.device_id is read by fleet and never set on CPUs.
    ParallelEnv._device_id = 0
    # Every gloo group meets through the keys "0", "1", ... of one store: with four ranks, groups mistake each other's.
    collective._new_process_group_impl = _new_process_group
    # c_identity, c_split, c_concat and the in-place all-reduce on the "calc stream" have no CPU kernel.
    mp_ops.c_identity_eager = _Identity
    mp_ops.mp_allreduce_eager = _AllReduce
    mp_ops._c_concat = collective._c_concat = lambda tensor, group=None: _Concat.apply(tensor, group)
    mp_ops._c_split = collective._c_split = lambda tensor, group=None: _Split.apply(tensor, group)
    # Gloo has no reduce-scatter; sequence parallelism asks for one.
    sequence_parallel_utils.reduce_scatter = _reduce_scatter


def _new_process_group(
    backend: str, store: Any, rank: int, world_size: int, group_name: str, pg_options: Any, group_id: int = 0, **more: Any
) -> Any:
    """A gloo group with a store of its own, which its first rank opens where the launcher placed that rank."""
    if backend != "gloo" or group_id == 0:
        return _default_group_impl(backend, store, rank, world_size, group_name, pg_options, group_id, **more)
    # The id alone is not enough: disjoint groups are formed at the same time, and share it where a rank skips some.
    key = f"gloo_store/{group_name}/{group_id}"
    if rank == 0:
        host = (os.environ.get("PADDLE_CURRENT_ENDPOINT") or "127.0.0.1").rsplit(":", 1)[0]
        port, own = _open_store(host)
        store.set(key, f"{host}:{port}")
    else:
        host, _, port = store.get(key).decode().rpartition(":")
        own = core.TCPStore(host, int(port), False, 1, STORE_TIMEOUT_SECONDS)
    _stores.append(own)
    return core.ProcessGroupGloo.create(own, rank, world_size, group_id)


def _open_store(host: str) -> tuple[int, Any]:
    """A store that listens, and its port: another process may take a free port before we do, so we try some."""
    for attempt in range(PORT_TRIES):
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        try:
            return port, core.TCPStore(host, port, True, 1, STORE_TIMEOUT_SECONDS)
        except (RuntimeError, ValueError, OSError):
            if attempt == PORT_TRIES - 1:
                raise
    raise AssertionError("unreachable")


class _Identity(PyLayer):
    """x forward; the sum of the gradients over the group backward."""

    @staticmethod
    def forward(ctx: Any, x: paddle.Tensor, group: Any, *_: Any) -> paddle.Tensor:
        ctx.group = group
        return paddle.assign(x)

    @staticmethod
    def backward(ctx: Any, grad: paddle.Tensor) -> paddle.Tensor:
        grad = paddle.assign(grad)
        dist.all_reduce(grad, group=ctx.group)
        return grad


class _AllReduce(PyLayer):
    """The sum over the group forward; the gradient as it is backward."""

    @staticmethod
    def forward(ctx: Any, x: paddle.Tensor, group: Any, *_: Any) -> paddle.Tensor:
        x = paddle.assign(x)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: paddle.Tensor) -> paddle.Tensor:
        return paddle.assign(grad)


class _Concat(PyLayer):
    """All parts along the last axis forward; the own part of the gradient backward."""

    @staticmethod
    def forward(ctx: Any, x: paddle.Tensor, group: Any) -> paddle.Tensor:
        ctx.group = group
        parts: list[paddle.Tensor] = []
        dist.all_gather(parts, x.contiguous(), group=group)
        return paddle.concat(parts, axis=-1)

    @staticmethod
    def backward(ctx: Any, grad: paddle.Tensor) -> paddle.Tensor:
        return paddle.assign(paddle.split(grad, ctx.group.nranks, axis=-1)[ctx.group.rank])


class _Split(PyLayer):
    """The own part along the last axis forward; all parts of the gradient backward."""

    @staticmethod
    def forward(ctx: Any, x: paddle.Tensor, group: Any) -> paddle.Tensor:
        ctx.group = group
        return paddle.assign(paddle.split(x, group.nranks, axis=-1)[group.rank])

    @staticmethod
    def backward(ctx: Any, grad: paddle.Tensor) -> paddle.Tensor:
        parts: list[paddle.Tensor] = []
        dist.all_gather(parts, grad.contiguous(), group=ctx.group)
        return paddle.concat(parts, axis=-1)


def _reduce_scatter(x: paddle.Tensor) -> paddle.Tensor:
    """The own rows of the sum of ``x`` over the tensor-parallel group."""
    group = dist.fleet.get_hybrid_communicate_group().get_model_parallel_group()
    x = paddle.assign(x)
    dist.all_reduce(x, group=group)
    return paddle.assign(paddle.split(x, group.nranks, axis=0)[group.rank])
