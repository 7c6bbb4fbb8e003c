"""A model's forward and backward passes over micro-batches, on one process or on a pipeline of them.

A stage receives hidden states, runs its layers and sends the result on; the last stage computes the loss. Training
follows the 1F1B schedule (Narayanan et al. 2021, arXiv:2104.04473, section 2.2): after warming up, a stage alternates
one forward and one backward pass, so that no more micro-batches are in its memory than stages are left, its own among
them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import paddle
import paddle.distributed as dist

from alignment.parallel.collectives import from_head, gather_objects
from alignment.parallel.gloo import meet
from alignment.parallel.sharding import Shards
from alignment.parallel.topology import topology

# (input_ids, attention_mask, what the stage before gave or None) -> hidden states [B, L, H]
RunLayers = Callable[[paddle.Tensor, paddle.Tensor, "paddle.Tensor | None"], paddle.Tensor]


class MicroBatch(NamedTuple):
    """What runs through the model at once, and what the last stage makes of it.

    finish: final hidden states [B, L, H] -> (loss or None, picklable report). The loss is divided by its global
    denominator already. Every stage has the same micro-batches; those other than the last only read their tokens.
    """

    input_ids: paddle.Tensor  # int64 [B, L]
    attention_mask: paddle.Tensor  # bool [B, L]
    finish: Callable[[paddle.Tensor], tuple[paddle.Tensor | None, Any]]
    samples: Sequence[int | str] = ()  # their indices in the data set, for messages


class Pipeline:
    """Passes of one model.

    Args:
        model: this process's part; config.dtype and config.hidden_size describe what travels.
        run_layers: the forward pass of that part.
        layers: its transformer layers.

    Attributes: shards: who owns which parameter.
    """

    def __init__(
        self, model: paddle.nn.Layer, run_layers: RunLayers, layers: Sequence[paddle.nn.Layer] = ()
    ) -> None:
        self.model, self.run_layers = model, run_layers
        self.shards = Shards(model, layers)
        self.dtype, self.hidden_size = model.config.dtype, model.config.hidden_size
        before = gather_objects(bool(self.shards.trained), "pipe")[: topology().stage]
        self.gradient_leaves = any(before)  # a stage before this one learns

    @paddle.no_grad()
    def forward(self, micro_batches: Sequence[MicroBatch]) -> list[Any]:
        """The reports of all micro-batches, on every process of the model; nothing is learnt."""
        self.model.eval()
        reports = []
        with self.shards.whole_model():
            for micro in micro_batches:
                hidden = self.run_layers(micro.input_ids, micro.attention_mask, self._receive_forward(micro))
                if topology().is_last_stage:
                    reports.append(micro.finish(hidden)[1])
                else:
                    self._send(hidden, +1)
        return from_head(reports)

    def forward_backward(self, micro_batches: Sequence[MicroBatch]) -> list[Any]:
        """Add the gradients of all micro-batches; returns their reports, on every process of the model."""
        self.model.train()
        flying: deque[tuple[MicroBatch, paddle.Tensor | None, paddle.Tensor]] = deque()
        reports: list[Any] = []
        place = topology()
        warm_up = min(place.layout.pipeline - 1 - place.stage, len(micro_batches))
        for micro in micro_batches[:warm_up]:
            flying.append(self._run(micro, self._receive_forward(micro), reports))
            self._send(flying[-1][2], +1)
        rest = micro_batches[warm_up:]
        received = self._receive_forward(rest[0]) if rest else None
        for number, micro in enumerate(rest):
            flying.append(self._run(micro, received, reports))
            if not place.is_last_stage:
                self._send(flying[-1][2], +1)
            gradient = self._backward(*flying.popleft())
            # The stage before sends its next result first, and then waits for this gradient.
            if number + 1 < len(rest):
                received = self._receive_forward(rest[number + 1])
            self._send_gradient(gradient)
        while flying:
            self._send_gradient(self._backward(*flying.popleft()))
        return from_head(reports)

    def _run(
        self, micro: MicroBatch, received: paddle.Tensor | None, reports: list[Any]
    ) -> tuple[MicroBatch, paddle.Tensor | None, paddle.Tensor]:
        """Forward pass of one micro-batch: what came in, and what goes out (the loss, on the last stage)."""
        if received is not None:
            received.stop_gradient = not self.gradient_leaves
        hidden = self.run_layers(micro.input_ids, micro.attention_mask, received)
        if not topology().is_last_stage:
            return micro, received, hidden
        loss, report = micro.finish(hidden)
        reports.append(report)
        return micro, received, loss

    def _backward(
        self, micro: MicroBatch, received: paddle.Tensor | None, sent: paddle.Tensor
    ) -> paddle.Tensor | None:
        """Backward pass of one micro-batch; returns the gradient of what the stage before gave."""
        if topology().is_last_stage:
            if not sent.stop_gradient:
                sent.backward()
        elif not sent.stop_gradient:
            paddle.autograd.backward([sent], [self._receive(micro, +1).astype(sent.dtype)])
        if received is None or not self.gradient_leaves:
            return None
        return received.grad

    def _receive_forward(self, micro: MicroBatch) -> paddle.Tensor | None:
        return None if topology().is_first_stage else self._receive(micro, -1)

    def _receive(self, micro: MicroBatch, direction: int) -> paddle.Tensor:
        """[B, L, H] from the next (+1) or the previous (-1) stage."""
        return receive([*micro.input_ids.shape, self.hidden_size], self.dtype, direction)

    def _send(self, tensor: paddle.Tensor, direction: int) -> None:
        send(tensor.astype(self.dtype), direction)

    def _send_gradient(self, gradient: paddle.Tensor | None) -> None:
        if gradient is not None:
            self._send(gradient, -1)


def send(tensor: paddle.Tensor, direction: int) -> None:
    """Give a tensor to the next (+1) or the previous (-1) stage, which must ``receive`` it."""
    group, peer = _neighbour(direction)
    meet(group, "sending between stages")
    dist.send(tensor.detach().contiguous(), dst=peer, group=group)


def receive(shape: list[int], dtype: str, direction: int) -> paddle.Tensor:
    """Take what the next (+1) or the previous (-1) stage sends."""
    group, peer = _neighbour(direction)
    tensor = paddle.empty(shape, dtype=dtype)
    meet(group, "sending between stages")
    dist.recv(tensor, src=peer, group=group)
    return tensor


def _neighbour(direction: int) -> tuple[Any, int]:
    """The group of this stage and a neighbour, and the neighbour's rank in the job."""
    place = topology()
    pipe = place.group("pipe")
    return place.group("next" if direction > 0 else "previous"), pipe.ranks[place.stage + direction]
