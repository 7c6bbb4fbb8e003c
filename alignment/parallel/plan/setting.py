"""What a stage runs at once: its models, their layout, and the passes that make up an optimizer step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from alignment.parallel.layout import Layout
from alignment.parallel.plan.activations import Activations, Precision
from alignment.parallel.plan.arguments import Sizes
from alignment.parallel.plan.models import Model


class Pass(NamedTuple):
    """A micro-batch through one model; targets: tokens whose logits are computed, all columns of them."""

    model: Model
    activations: Activations
    targets: int

    @property
    def recomputes(self) -> bool:
        """Whether the backward pass computes each layer anew: if asked to, and always where ZeRO divides layers."""
        return self.model.recompute or self.activations.layout.sharding_stage == 3


@dataclass(frozen=True)
class Setting:
    """A stage on the ranks of a layout; ``models`` as ``models_of`` gives them, the policy first."""

    stage: str
    sizes: Sizes
    layout: Layout
    precision: Precision
    models: tuple[Model, ...]

    @property
    def prompt_length(self) -> int:
        """Longest prompt of ppo, in tokens."""
        return self.sizes.max_prompt_len or self.sizes.max_length

    @property
    def answer_length(self) -> int:
        """Longest answer of ppo, in tokens."""
        return self.sizes.max_new_tokens or self.sizes.max_length

    @property
    def rollout_layout(self) -> Layout:
        """Layout of the actor while it samples: its own, or what eval_mode asks for; never sequence parallel."""
        layout = replace(self.layout, sequence_parallel=False)
        if not self.sizes.eval_mode:
            return layout
        return replace(layout, pipeline=1, tensor=1 if self.sizes.eval_mode == "single" else layout.tensor)

    @property
    def has_copy(self) -> bool:
        """Whether that takes a second actor."""
        own, other = self.layout, self.rollout_layout
        return self.stage == "ppo" and (own.tensor, own.pipeline) != (other.tensor, other.pipeline)

    @property
    def evaluates(self) -> bool:
        """Whether forward passes are made apart: to evaluate, and in dpo to ask the initial policy."""
        dpo = self.stage == "update" and self.sizes.policy_update == "dpo"
        return self.stage == "ppo" or self.sizes.evaluation_strategy != "no" or dpo

    @property
    def sequences(self) -> int:
        """Sequences of a sample."""
        return self.sizes.sequences(self.stage)

    def activations(self, model: Model, rows: int, length: int) -> Activations:
        """Of ``rows`` samples, the sequences of ``length`` tokens."""
        rows *= self.sequences
        return Activations(model.shape, self.layout, self.precision, rows, length)

    def learning(self) -> Iterator[Pass]:
        """The passes that a micro-batch of an optimizer step makes, each forward and backward."""
        rows, longest, policy = self.sizes.per_device_train_batch_size, self.sizes.max_length, self.models[0]
        if self.stage == "ppo":
            both = self.prompt_length + self.answer_length
            yield Pass(policy, self.activations(policy, rows, both), rows * self.answer_length)
            if not self.sizes.critic_shares_trunk:
                yield Pass(self.models[1], self.activations(self.models[1], rows, both), 0)
        if self.stage != "ppo" or self.sizes.ptx_coeff > 0:
            targets = 0 if policy.scores else self.sequences * rows * longest
            yield Pass(policy, self.activations(policy, rows, longest), targets)

    def judging(self) -> Iterator[Pass]:
        """The passes of ppo's scoring, and of the others' evaluation: forward only."""
        rows = self.sizes.per_device_eval_batch_size
        length = self.prompt_length + self.answer_length if self.stage == "ppo" else self.sizes.max_length
        targets = self.sequences * rows * (self.answer_length if self.stage == "ppo" else length)
        for model in self.models:
            yield Pass(model, self.activations(model, rows, length), 0 if model.scores else targets)
