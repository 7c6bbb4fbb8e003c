"""What Paddle's fleet and gloo lack on CPUs, supplied from outside: every patch of Paddle stands here.

Found with paddlepaddle 3.3.1. ``prepare`` is called for CPU jobs only; on GPUs Paddle's own kernels and NCCL serve.
Each patch says what it is for; one whose reason is gone in a later Paddle can be deleted alone.
"""

from __future__ import annotations

import os
import secrets
import socket
from multiprocessing.connection import Client, Listener
from typing import Any

import paddle
import paddle.distributed as dist
import psutil
from paddle.base import core
from paddle.distributed import collective
from paddle.distributed.fleet.layers.mpu import mp_ops
from paddle.distributed.fleet.utils import sequence_parallel_utils
from paddle.distributed.parallel import ParallelEnv

from alignment.parallel.autograd import Concat, Copy, Split, Sum
from alignment.runtime.faults import LostPeer
from alignment.runtime.whereabouts import waiting

STORE_TIMEOUT_SECONDS = 300
_default_group_impl = collective._new_process_group_impl
_stores: list[Any] = []  # a group's connections live as long as its store
_meetings: dict[int, _Meeting] = {}  # by group id


def prepare() -> None:
    """Patch Paddle for tensor and pipeline parallelism over gloo; calling it again changes nothing."""
    # Gloo publishes the address that the host's name resolves to, often loopback, whatever the launcher was told.
    interface = _interface_of(host_address())
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    # ParallelEnv.device_id is read by fleet and never set on CPUs.
    ParallelEnv._device_id = 0
    # Gloo groups find their members by the keys "0", "1", ... of one store: from four ranks on they mistake them.
    collective._new_process_group_impl = _new_process_group
    # c_identity, c_split, c_concat and the in-place all-reduce on the "calc stream" have no CPU kernel.
    mp_ops.c_identity_eager, mp_ops.mp_allreduce_eager = Copy, Sum
    mp_ops._c_concat = collective._c_concat = lambda tensor, group=None: Concat.apply(tensor, group)
    mp_ops._c_split = collective._c_split = lambda tensor, group=None: Split.apply(tensor, group)
    # Gloo has no reduce-scatter; sequence parallelism asks for one.
    sequence_parallel_utils.reduce_scatter = _reduce_scatter


def meet(group: Any, operation: str) -> None:
    """Wait for the other members of a gloo group, however late they are; does nothing for another backend.

    Gloo's operations fail for good after 30 seconds without an answer, and that limit cannot be set: whoever may have
    to wait longer for a peer's work (its rollout, its layers, its disk) meets it here first.

    Args: operation: what comes then, for the watch-dog's message.
    """
    meeting = _meetings.get(group.id)
    if meeting is not None:
        with waiting(operation, group.ranks):
            meeting()


def _new_process_group(
    backend: str,
    store: Any,
    rank: int,
    world_size: int,
    group_name: str,
    pg_options: Any,
    group_id: int = 0,
    **more: Any,
) -> Any:
    """A gloo group with a store of its own, opened by the group's first rank on its host."""
    if backend != "gloo":
        return _default_group_impl(backend, store, rank, world_size, group_name, pg_options, group_id, **more)
    # All members see the same group id: ranks outside a group count it too.
    own = _own_store(store, f"group_store/{group_id}", rank == 0)
    _stores.append(own)
    _meetings[group_id] = _Meeting(store, f"group_meeting/{group_id}", rank, world_size)
    return core.ProcessGroupGloo.create(own, rank, world_size, group_id)


def _own_store(store: Any, key: str, opens: bool) -> Any:
    """A new store, whose address one member publishes in the job's ``store``.

    TCPStore takes no port 0, and a port that somebody else took meanwhile kills the process: a socket that is bound
    but does not listen reserves one until the store has bound it too (both set SO_REUSEADDR).
    """
    if not opens:
        host, _, port = store.get(key).decode().rpartition(":")
        return core.TCPStore(host, int(port), False, 1, STORE_TIMEOUT_SECONDS)
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("", 0))
        port = holder.getsockname()[1]
        own = core.TCPStore(host_address(), port, True, 1, STORE_TIMEOUT_SECONDS)
    store.set(key, f"{host_address()}:{port}")
    return own


def host_address() -> str:
    """The address at which the launcher made this process known to the others."""
    return (os.environ.get("PADDLE_CURRENT_ENDPOINT") or "127.0.0.1").rsplit(":", 1)[0]


def _interface_of(address: str) -> str | None:
    """The network interface that has this address; None: no interface of this host has it."""
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, found in interfaces if address in (entry.address for entry in found)), None)


class _Meeting:
    """A star of connections: everybody tells the first member that it has come, and is told when all have."""

    def __init__(self, store: Any, key: str, rank: int, size: int) -> None:
        if rank == 0:
            secret = secrets.token_hex(16)
            with Listener((host_address(), 0), backlog=size, authkey=secret.encode()) as listener:
                store.set(key, f"{host_address()}:{listener.address[1]}:{secret}")
                self.others = [listener.accept() for _ in range(size - 1)]
        else:
            host, port, secret = store.get(key).decode().rsplit(":", 2)
            self.others = [Client((host, int(port)), authkey=secret.encode())]
        self.is_host = rank == 0

    def __call__(self) -> None:
        try:
            if not self.is_host:
                self.others[0].send_bytes(b"here")
            for other in self.others:
                other.recv_bytes()
            if self.is_host:
                for other in self.others:
                    other.send_bytes(b"all")
        except (EOFError, OSError) as fault:
            raise LostPeer("another process of the job has ended") from fault


def _reduce_scatter(x: paddle.Tensor) -> paddle.Tensor:
    """The own rows of the sum of ``x`` over the tensor-parallel group."""
    group = dist.fleet.get_hybrid_communicate_group().get_model_parallel_group()
    x = paddle.assign(x)
    dist.all_reduce(x, group=group)
    return paddle.assign(paddle.split(x, group.nranks, axis=0)[group.rank])
