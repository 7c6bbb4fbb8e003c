"""The four models of PPO, each with weights of its own, or LoRA adapters on weights that they share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paddle

from alignment.parallel.pipeline import Pipeline
from alignment.ppo.bases import Bases
from alignment.ppo.models.adapters import resume_adapters
from alignment.ppo.models.freezing import freeze, set_trainable_layers
from alignment.ppo.models.loading import load_policy
from alignment.ppo.models.lora import LoRASettings
from alignment.ppo.models.placement import Placement
from alignment.ppo.models.policy import passes_of
from alignment.ppo.models.tokenizer import Tokenizer, load_tokenizer
from alignment.ppo.models.value import add_value_head, load_value
from alignment.ppo.offload import Offload
from alignment.ppo.rewards import RewardSource, WeightedRewards
from alignment.ppo.rewards.model import ModelReward
from alignment.runtime.console import say
from alignment.runtime.faults import UsageError
from alignment.training.setup import load_named, weight_dtype
from data.templates import get_template

ACTOR, CRITIC, REWARD = (
    "actor_model_name_or_path",
    "reward_critic_model_name_or_path",
    "reward_model_name_or_path",
)


@dataclass(frozen=True)
class Models:
    """What PPO works with: this process's parts of the models, rewards, tokenizer. The reference is frozen."""

    actor: paddle.nn.Layer
    reference: Pipeline
    critic: paddle.nn.Layer
    rewards: WeightedRewards
    tokenizer: Tokenizer


@dataclass(frozen=True)
class ModelLoader:
    """Reads what the arguments name; frozen models leave the device as soon as they are read, if they ever do.

    Args:
        text_rewards: the reward sources that are no models here; the reward model is put before them.
        policy, value: checkpoints of actor and critic to resume from, or None.
    """

    model_args: Any
    data_args: Any
    args: Any
    tokenizer: Tokenizer
    text_rewards: list[RewardSource]
    offload: Offload
    policy: Path | None
    value: Path | None

    def load(self) -> Models:
        """Raises: UsageError, naming the argument, for a model that cannot be read or does not fit the others."""
        reward, reference, actor, critic = self._sharing() if self.args.lora else self._separate()
        sources = [*([reward] if reward else []), *self.text_rewards]
        return Models(actor, reference, critic, WeightedRewards(sources, self.args.reward_weights), self.tokenizer)

    def _separate(self) -> tuple[ModelReward | None, Pipeline, paddle.nn.Layer, paddle.nn.Layer]:
        args, dtype, here = self.args, weight_dtype(self.args), Placement.here()
        start, reward_name = self.model_args.actor_model_name_or_path, self.model_args.reward_model_name_or_path
        reward = None
        if reward_name:
            model = load_named(REWARD, load_value, reward_name, "reward", dtype, require_head=True, placement=here)
            reward = self._reward_source(model)
            self.offload.add_frozen(reward.pipeline)
        reference = load_named(ACTOR, load_policy, start, dtype, placement=here)
        freeze(reference)
        passes = self._passes_of_reference(reference)
        actor = load_named(ACTOR, load_policy, self.policy or start, dtype, args.recompute, here)
        load_named("num_layers_unfrozen", set_trainable_layers, actor, args.num_layers_unfrozen)
        if args.critic_shares_trunk:
            critic = load_named("resume_from_checkpoint", add_value_head, actor, args.seed, self.value)
        else:
            critic = self._separate_critic(self.value or self.model_args.reward_critic_model_name_or_path)
        return reward, passes, actor, critic

    def _sharing(self) -> tuple[ModelReward | None, Pipeline, paddle.nn.Layer, paddle.nn.Layer]:
        """One copy of the weights that several models start from; it stays on the device."""
        args, reward_name = self.args, self.model_args.reward_model_name_or_path
        bases = Bases(LoRASettings.from_arguments(args), args.seed, weight_dtype(args))
        reference = load_named(ACTOR, bases.load_reference, self.model_args.actor_model_name_or_path)
        actor = load_named(ACTOR, bases.load_actor, args.recompute)
        reward = self._reward_source(load_named(REWARD, bases.load_reward, reward_name)) if reward_name else None
        start = self.model_args.reward_critic_model_name_or_path
        self._check_vocabulary(start)
        critic = load_named(CRITIC, bases.load_critic, start, self._recomputes_critic)
        for model, checkpoint in ((actor, self.policy), (critic, self.value)):
            if checkpoint is not None:
                load_named("resume_from_checkpoint", resume_adapters, model, checkpoint)
        bases.mark_shared()
        say(bases.describe())
        if reward:
            self.offload.add_frozen(reward.pipeline)
        return reward, self._passes_of_reference(reference), actor, critic

    def _passes_of_reference(self, reference: paddle.nn.Layer) -> Pipeline:
        reference.eval()
        passes = passes_of(reference)
        self.offload.add_frozen(passes)
        return passes

    def _reward_source(self, model: paddle.nn.Layer) -> ModelReward:
        return ModelReward(
            model,
            load_named(REWARD, load_tokenizer, self.model_args.reward_model_name_or_path),
            self.tokenizer,
            batch_size=self.args.per_device_eval_batch_size,
            add_special_tokens=get_template(self.data_args.prompt_template).add_special_tokens,
        )

    def _separate_critic(self, name: str | Path) -> paddle.nn.Layer:
        self._check_vocabulary(name)
        args, options = self.args, {"seed": self.args.seed, "placement": Placement.here()}
        critic = load_named(
            CRITIC, load_value, name, "critic", weight_dtype(args), self._recomputes_critic, **options
        )
        if critic.head_is_new:
            say("the critic starts with a new value head")
        own = args.critic_num_layers_unfrozen
        unfrozen = args.num_layers_unfrozen if own is None else own
        load_named("critic_num_layers_unfrozen", set_trainable_layers, critic, unfrozen)
        return critic

    def _check_vocabulary(self, name: str | Path) -> None:
        if load_named(CRITIC, load_tokenizer, name).get_vocab() != self.tokenizer.get_vocab():
            raise UsageError(f'"{CRITIC}": {name} has another vocabulary than the actor, whose tokens it must read')

    @property
    def _recomputes_critic(self) -> bool:
        return self.args.recompute if self.args.critic_recompute is None else self.args.critic_recompute
