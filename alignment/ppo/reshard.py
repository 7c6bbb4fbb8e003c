"""From the layout that trains the policy to the layout that samples from it (``eval_mode``).

none                the training layout itself, all its processes answering the same prompts
tensor_parallel     matrices stay divided, but every process has all layers: pipeline stages answer different prompts
single              every process has the whole policy: all processes answer different prompts
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist

from alignment.parallel.collectives import gather_objects
from alignment.parallel.gloo import meet
from alignment.parallel.topology import topology
from alignment.ppo.models.loading import build_policy
from alignment.ppo.models.placement import Placement, is_copy, merged, split_axis
from alignment.ppo.rollout.answers import Decode
from alignment.ppo.rollout.choose import build_engine
from alignment.ppo.rollout.protocol import Draw, Rollout, SamplingParameters
from alignment.runtime.bootstrap import return_freed_memory
from alignment.training.engine import TrainingEngine


class Sampler:
    """The policy as it answers prompts, with this process's part of them.

    Args:
        actor: the policy that is trained; its weights are what ``refresh`` copies.
        eval_mode: as the argument of that name.
        batch_size: answers decoded at a time.
        use_fusemt: as the argument of that name.
        decode: text of token ids, for stop strings.
        drops_copy: where sampling needs a copy of the weights, give its memory back after each use.

    Attributes: engine: a RolloutEngine; part: (index, count) of the prompts that this process answers.
    """

    def __init__(
        self,
        actor: TrainingEngine,
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
            model = build_policy(deepcopy(model.config), model.config.dtype, False, wanted)
            self.target = dict(model.named_parameters())
            self.names = gather_objects(_own_names(actor.model), "pipe")  # of every stage
            self.drops_copy = drops_copy
            self._drop_copy()
        elif model.placement.sequence_parallel:
            trained, model = model, build_policy(deepcopy(model.config), model.config.dtype, False, wanted)
            _share_parameters(trained, model)
        self.engine = build_engine(model, batch_size, use_fusemt, decode)

    def refresh(self) -> None:
        """Bring the policy's current weights, one parameter at a time, to where they are sampled from."""
        if self.is_copy:
            with self.actor.shards.whole_model(), paddle.no_grad():
                own = dict(self.actor.model.named_parameters())
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

    def _bring(self, name: str, stage: int, source: paddle.Tensor | None) -> None:
        target, pipe = self.target[name], topology().group("pipe")
        if not target._is_initialized():
            paddle.empty(target.shape, dtype=target.dtype)._share_buffer_to(target)
        if stage == topology().stage:
            changes = split_axis(source) is not None and split_axis(target) is None
            value = merged(source.detach(), split_axis(source)) if changes else source.detach()
            paddle.assign(value, target)
        if pipe is not None:
            meet(pipe)
            dist.broadcast(target, src=pipe.ranks[stage], group=pipe)


def _share_parameters(source: paddle.nn.Layer, target: paddle.nn.Layer) -> None:
    """Let ``target``, of the same parts, compute with the parameters of ``source``."""
    layers = zip(source.named_sublayers(include_self=True), target.named_sublayers(include_self=True), strict=True)
    for (name, layer), (same_name, twin) in layers:
        assert name == same_name
        twin._parameters.update(layer._parameters)


def _own_names(model: paddle.nn.Layer) -> list[str]:
    return [name for name, _ in model.named_parameters() if not is_copy(name, model)]
