"""Sharding of optimizer, gradients and parameters (ZeRO, Rajbhandari et al. 2020, arXiv:1910.02054).

Every parameter has one owner among the processes that hold the same part of the model. Stage 1: the owner alone keeps
its optimizer state, updates it and hands it to the others. Stage 2: the owner alone keeps the sum of its gradients.
Stage 3: between uses, only the owner has the parameters of the transformer layers. Ownership is of whole parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist
from paddle.autograd import PyLayer

from alignment.parallel.collectives import buckets, flatten, unflatten
from alignment.parallel.gloo import meet
from alignment.parallel.topology import topology

Home = Callable[[bool], AbstractContextManager]  # told whether its tensors will change; within it they are there


def assign_owners(sizes: Sequence[int], members: int) -> list[int]:
    """The owner of each parameter, so that all members own about as many elements: largest first, to the poorest."""
    load = [0] * members
    owners = [0] * len(sizes)
    for i in np.argsort([-size for size in sizes], kind="stable"):
        owners[i] = load.index(min(load))
        load[owners[i]] += sizes[i]
    return owners


class Shards:
    """Who owns which parameter of a model; without sharding this process owns all of them.

    Args:
        model: this process's part.
        layers: its transformer layers, which stage 3 divides.

    Attributes: home: where the parameters that this process keeps are between uses (alignment.ppo.offload).
    """

    def __init__(self, model: paddle.nn.Layer, layers: Sequence[paddle.nn.Layer]) -> None:
        place = topology()
        self.stage, self.members = place.layout.sharding_stage, place.layout.sharding
        self.member, self.group = place.sharding_rank, place.group("sharding")
        self.trained = [p for p in model.parameters() if not p.stop_gradient]
        frozen = [p for p in model.parameters() if p.stop_gradient]
        self.owner: dict[str, int] = {}
        for part in (self.trained, frozen):  # apart, so that each is divided evenly
            new = [parameter for parameter in part if not hasattr(parameter, "shard_owner")]
            for parameter, owner in zip(new, assign_owners([p.size for p in new], self.members), strict=True):
                parameter.shard_owner = owner  # kept with it, for another model may share the parameter
            self.owner |= {parameter.name: parameter.shard_owner for parameter in part}
        self.own = [p for p in self.trained if self.owner[p.name] == self.member]
        self.sums: dict[str, paddle.Tensor] = {}  # from stage 2 on: float32 gradients of ``own`` so far, by name
        self.layers = list(layers) if self.stage == 3 else []
        self.divided = {p.name for layer in self.layers for p in layer.parameters()}
        self.is_whole = not self.divided
        self.home: Home = nullcontext
        self._look: Callable[[paddle.Tensor], None] | None = None  # see ``looking_at_gradients``
        for layer in self.layers:
            _bring_when_called(layer, self)
            self._release(layer.parameters())

    # ---- gradients and updates --------------------------------------------------------------------------------------

    def collect_gradients(self) -> None:
        """Stages 2 and 3: send the gradients of the latest backward pass to their owners and forget them here."""
        self.collect(p for p in self.trained if p.name not in self.divided)

    def collect(self, parameters: Iterable[paddle.Tensor]) -> None:
        """``collect_gradients`` of some parameters."""
        meet(self.group, "collecting gradients")
        for member, owned in self._by_owner(p for p in parameters if not p.stop_gradient):
            for bucket in buckets(owned):
                flat = flatten([p.grad if p.grad is not None else paddle.zeros(p.shape) for p in bucket])
                if self._look is not None:
                    self._look(flat)
                dist.reduce(flat, dst=self.group.ranks[member], group=self.group)
                for parameter in bucket:
                    parameter.clear_gradient(False)
                if member == self.member:
                    self._add(flat, bucket)

    def _add(self, flat: paddle.Tensor, bucket: list[paddle.Tensor]) -> None:
        parts = paddle.split(flat, [parameter.size for parameter in bucket])
        for parameter, part in zip(bucket, parts, strict=True):
            part, before = part.reshape(parameter.shape), self.sums.get(parameter.name)
            self.sums[parameter.name] = part if before is None else before + part

    @contextmanager
    def looking_at_gradients(self, look: Callable[[paddle.Tensor], None]) -> Iterator[None]:
        """Within it, ``look`` sees each float32 [N] of this process's own gradients before they join the others'."""
        self._look = look
        try:
            yield
        finally:
            self._look = None

    def sit_out(self) -> None:
        """Take part in the collectives of a forward and backward pass of others, with nothing to compute."""
        for layer in self.layers:
            with self.brought(layer.parameters()):
                pass
        for layer in reversed(self.layers):
            if _is_trained(layer):
                with self.brought(layer.parameters()):
                    pass
                self.collect(layer.parameters())
        self.collect_gradients()

    def share_updates(self) -> None:
        """Give every member the parameters that their owners have changed, as far as it keeps them."""
        if self.group is not None:
            self._broadcast(p for p in self.trained if p.name not in self.divided)

    # ---- parameters -------------------------------------------------------------------------------------------------

    @contextmanager
    def brought(self, parameters: Sequence[paddle.Tensor]) -> Iterator[None]:
        """Within it, these divided parameters are here; every member must ask for them together."""
        self._broadcast(parameters)
        try:
            yield
        finally:
            self._release(parameters)

    @contextmanager
    def whole_model(self) -> Iterator[None]:
        """Within it, every parameter is here; every member must enter it together, and may then compute by itself."""
        parameters = [p for layer in self.layers for p in layer.parameters()]
        with self.home(False), nullcontext() if self.is_whole else self.brought(parameters):
            before, self.is_whole = self.is_whole, True
            try:
                yield
            finally:
                self.is_whole = before

    def _broadcast(self, parameters: Iterable[paddle.Tensor]) -> None:
        meet(self.group, "a broadcast of weights")
        for member, owned in self._by_owner(parameters):
            for bucket in buckets(owned):
                mine = member == self.member
                flat = flatten(bucket) if mine else paddle.empty([sum(p.size for p in bucket)], dtype="float32")
                dist.broadcast(flat, src=self.group.ranks[member], group=self.group)
                if not mine:
                    unflatten(flat, bucket)

    def _release(self, parameters: Iterable[paddle.Tensor]) -> None:
        for parameter in parameters:
            if self.owner[parameter.name] != self.member:
                parameter._clear_data()

    def _by_owner(self, parameters: Iterable[paddle.Tensor]) -> Iterator[tuple[int, list[paddle.Tensor]]]:
        parameters = list(parameters)
        for member in range(self.members):
            owned = [p for p in parameters if self.owner[p.name] == member]
            if owned:
                yield member, owned


def _is_trained(layer: paddle.nn.Layer) -> bool:
    return any(not parameter.stop_gradient for parameter in layer.parameters())


def _bring_when_called(layer: paddle.nn.Layer, shards: Shards) -> None:
    """Have a divided layer fetch its parameters for each call, and again for its backward pass."""
    compute = layer.forward

    def forward(hidden: paddle.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the layer's own, with its parameters here meanwhile."""
        if shards.is_whole:
            return compute(hidden, *args, **kwargs)
        if not paddle.is_grad_enabled() or (hidden.stop_gradient and not _is_trained(layer)):
            with shards.brought(layer.parameters()):
                return compute(hidden, *args, **kwargs)
        if hidden.stop_gradient:  # below the lowest trained layer: a PyLayer learns only if its input does
            hidden = hidden.detach()
            hidden.stop_gradient = False
        return _Brought.apply(hidden, lambda x: compute(x, *args, **kwargs), layer, shards)

    layer.forward = forward


class _Brought(PyLayer):
    """A layer whose parameters are here only while it computes; the backward pass computes it once more."""

    @staticmethod
    def forward(
        ctx: Any, hidden: paddle.Tensor, compute: Any, layer: paddle.nn.Layer, shards: Shards
    ) -> paddle.Tensor:
        ctx.save_for_backward(hidden)
        ctx.compute, ctx.layer, ctx.shards = compute, layer, shards
        with shards.brought(layer.parameters()):
            return compute(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: paddle.Tensor) -> paddle.Tensor:
        """Gradient of ``hidden`` [B, L, H]; those of the parameters go to their owners."""
        (hidden,) = ctx.saved_tensor()
        hidden = hidden.detach()
        hidden.stop_gradient = False
        parameters = ctx.layer.parameters()
        with ctx.shards.brought(parameters), paddle.enable_grad():
            paddle.autograd.backward([ctx.compute(hidden)], [gradient])
        if _is_trained(ctx.layer):
            ctx.shards.collect(parameters)
        return hidden.grad
