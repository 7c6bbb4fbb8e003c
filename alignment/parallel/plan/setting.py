"""What a stage runs at once: its models, their layout, and the passes that make up an optimizer step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from alignment.parallel.layout import Layout
from alignment.parallel.plan.activations import Activations, Precision, precision_of
from alignment.parallel.plan.arguments import ACTOR_STAGES, Sizes
from alignment.parallel.plan.models import Heads, Model


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
        """Longest prompt that is answered, in tokens."""
        return self.sizes.max_prompt_len or self.sizes.max_length

    @property
    def answer_length(self) -> int:
        """Longest answer that is sampled, in tokens."""
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
        return self.samples and (own.tensor, own.pipeline) != (other.tensor, other.pipeline)

    @property
    def samples(self) -> bool:
        """Whether the policy answers prompts: in ppo to learn, offline to be evaluated."""
        return self.stage in ACTOR_STAGES

    @property
    def evaluates(self) -> bool:
        """Whether one model alone also runs forward only: to evaluate, and in dpo to ask the initial policy."""
        dpo = self.stage == "update" and self.sizes.policy_update == "dpo"
        return self.sizes.evaluation_strategy != "no" or dpo

    @property
    def sequences(self) -> int:
        """Sequences of a sample."""
        return self.sizes.sequences(self.stage)

    def width(self, model: Model) -> Precision:
        """Bytes of the model's numbers."""
        return precision_of(False, "") if isinstance(model, Heads) else self.precision

    def optimized_with(self, model: Model) -> tuple[Model, ...]:
        """What one optimizer trains: the model and, if that is ILQL's policy, the heads on it."""
        is_policy = model == self.models[0]
        return (model, *(head for head in self.models if isinstance(head, Heads) and head.trained and is_policy))

    def learning_with(self, model: Model) -> tuple[Model, ...]:
        """The models whose gradients exist together with that model's; offline policy and critic learn in turn."""
        if self.stage == "offline":
            return self.optimized_with(model)
        return tuple(other for other in self.models if other.trained)

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
        for critic in self.models[1:2]:
            if self.stage == "offline" and critic.name == "critic" and critic.trained:
                yield Pass(critic, self.activations(critic, rows, longest), 0)

    def judging(self) -> Iterator[Pass]:
        """The forward passes that are made apart: ppo scores what it sampled, offline also what was logged, and the
        others evaluate."""
        rows, longest = self.sizes.per_device_eval_batch_size, self.sizes.max_length
        sampled, logged = (self.prompt_length + self.answer_length, self.answer_length), (longest, longest)
        lengths = {"ppo": (sampled,), "offline": (sampled, logged)}.get(self.stage, (logged,))
        for model in self.models:
            for length, answer in () if isinstance(model, Heads) else lengths:
                targets = 0 if model.scores else self.sequences * rows * answer
                yield Pass(model, self.activations(model, rows, length), targets)
