"""From the layout that trains the policy to the layout that samples from it (``eval_mode``).

none                the training layout itself, all its processes answering the same prompts
tensor_parallel     matrices stay divided, but every process has all layers: pipeline stages answer different prompts
single              every process has the whole policy: all processes answer different prompts
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist

from alignment.parallel.collectives import gather_objects
from alignment.parallel.gloo import meet
from alignment.parallel.pipeline import Pipeline
from alignment.parallel.topology import topology
from alignment.ppo.models.loading import build_policy
from alignment.ppo.models.lora import insert_adapters, is_adapted, plain_parameters
from alignment.ppo.models.placement import Placement, is_copy, merged, split_axis
from alignment.ppo.models.sharing import build_sharing
from alignment.ppo.rollout.answers import Decode
from alignment.ppo.rollout.choose import build_engine
from alignment.ppo.rollout.protocol import Draw, Rollout, SamplingParameters
from alignment.runtime.bootstrap import return_freed_memory
from alignment.training.engine import TrainingEngine

Source = tuple[paddle.Tensor, Callable[[], paddle.Tensor]]  # a parameter, and its value in a plain model


class Sampler:
    """The policy as it answers prompts, with this process's part of them.

    Args:
        actor: the policy that is trained, or a fixed one; its weights are what ``refresh`` copies.
        eval_mode: as the argument of that name.
        batch_size: answers decoded at a time.
        use_fusemt: as the argument of that name.
        decode: text of token ids, for stop strings.
        drops_copy: where sampling needs a copy of the weights, give its memory back after each use.

    Attributes: engine: a RolloutEngine; part: (index, count) of the prompts that this process answers.
    """

    def __init__(
        self,
        actor: TrainingEngine | Pipeline,
        eval_mode: str | None,
        batch_size: int,
        use_fusemt: bool = True,
        decode: Decode | None = None,
        drops_copy: bool = False,
    ) -> None:
        self.actor, place = actor, topology()
        layout, model = place.layout, actor.model
        wanted = {
            None: Placement.of(place),
            "tensor_parallel": Placement(layout.tensor, place.tensor_rank),
            "single": Placement(),
        }[eval_mode]
        wanted = replace(wanted, sequence_parallel=False)  # PaddleNLP decodes without it
        self.is_copy = replace(model.placement, sequence_parallel=False) != wanted
        self.groups = {None: (), "tensor_parallel": ("pipe",), "single": ("model",)}[eval_mode] + ("data",)
        self.part = (0, 1)
        for name in reversed(self.groups):
            group = place.group(name)
            if group is not None:
                self.part = (self.part[0] * group.nranks + group.rank, self.part[1] * group.nranks)
        if self.is_copy:
            model = _build_alike(model, wanted)
            self.target = dict(model.named_parameters())
            own = [name for name in _own_parameters(actor.model) if name in self.target]  # a value head stays behind
            self.names = gather_objects(own, "pipe")  # of every stage
            self.drops_copy = drops_copy
            self._drop_copy()
        elif model.placement.sequence_parallel:
            model = build_sharing(lambda: _build_adapted(actor.model, wanted), actor.model)
        self.engine = build_engine(model, batch_size, use_fusemt, decode)

    def refresh(self) -> None:
        """Bring the policy's current weights, one parameter at a time, to where they are sampled from."""
        if self.is_copy:
            with self.actor.shards.whole_model(), paddle.no_grad():
                own = _own_parameters(self.actor.model)
                for stage, names in enumerate(self.names):
                    for name in names:
                        self._bring(name, stage, own.get(name))

    def answer(self, prompts: Sequence[np.ndarray], draws: Sequence[Draw], sampling: SamplingParameters) -> Rollout:
        """As RolloutEngine.generate, with all weights in memory meanwhile."""
        if not self.is_copy:
            with self.actor.shards.whole_model():
                return self.engine.generate(prompts, draws, sampling)
        try:
            return self.engine.generate(prompts, draws, sampling)
        finally:
            self._drop_copy()

    def gather(self, item: Any) -> list[Any]:
        """What all processes found for their parts."""
        found = [item]
        for name in self.groups:
            found = [one for part in gather_objects(found, name) for one in part]
        return found

    def _drop_copy(self) -> None:
        if self.drops_copy:
            for parameter in self.target.values():
                parameter._clear_data()
            return_freed_memory()

    def _bring(self, name: str, stage: int, source: Source | None) -> None:
        target, pipe = self.target[name], topology().group("pipe")
        if not target._is_initialized():
            paddle.empty(target.shape, dtype=target.dtype)._share_buffer_to(target)
        if stage == topology().stage:
            axis, value = split_axis(source[0]), source[1]()
            changes = axis is not None and split_axis(target) is None
            paddle.assign(merged(value, axis) if changes else value, target)
        if pipe is not None:
            meet(pipe, "a broadcast of weights")
            dist.broadcast(target, src=pipe.ranks[stage], group=pipe)


def _build_alike(model: paddle.nn.Layer, placement: Placement) -> paddle.nn.Layer:
    """A policy like ``model``, with weights still to be filled, for another place."""
    return build_policy(deepcopy(model.config), model.config.dtype, False, placement)


def _build_adapted(model: paddle.nn.Layer, placement: Placement) -> paddle.nn.Layer:
    twin = _build_alike(model, placement)
    if is_adapted(model):
        insert_adapters(twin, model.lora)
    return twin


def _own_parameters(model: paddle.nn.Layer) -> dict[str, Source]:
    """By name, what this stage brings: each parameter, and what gives its current value, adapters merged."""
    names = dict(model.named_parameters())  # a tied head has none of its own
    plain = plain_parameters(model)
    return {name: (value, read) for name, value, read in plain if name in names and not is_copy(name, model)}
