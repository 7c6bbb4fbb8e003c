"""The four models of PPO, each with weights of its own, or LoRA adapters on weights that they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import paddle

from alignment.parallel.pipeline import Pipeline
from alignment.ppo.bases import Bases
from alignment.ppo.frozen import Prints, check_unchanged, fingerprints
from alignment.ppo.judge import KEY as JUDGE
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
# Reward model, judge, reference, actor, critic.
Loaded = tuple[ModelReward | None, ModelReward | None, Pipeline, paddle.nn.Layer, paddle.nn.Layer]
SCORERS = {REWARD: "model", JUDGE: "judge"}  # their names in metrics and messages


@dataclass(frozen=True)
class Models:
    """What PPO works with: this process's parts of the models, rewards, tokenizer. The reference is frozen.

    judge: scores evaluations, or None; judge_name: as the user calls it. frozen: what tells reference, reward model
    and judge from others. Logged data may do without a critic, and without rewards.
    """

    actor: paddle.nn.Layer
    reference: Pipeline
    critic: paddle.nn.Layer | None
    rewards: WeightedRewards | None
    tokenizer: Tokenizer
    judge: WeightedRewards | None = None
    judge_name: str | None = None
    frozen: Prints = field(default_factory=dict)


@dataclass(frozen=True)
class ModelLoader:
    """Reads what the arguments name; frozen models leave the device as soon as they are read, if they ever do.

    Args:
        text_rewards: the reward sources that are no models here; the reward model is put before them.
        policy, value: checkpoints of actor and critic to resume from, or None.
        with_critic: whether there is one; behaviour cloning needs none.
        shares_trunk: it is a head on the policy.
    """

    model_args: Any
    data_args: Any
    args: Any
    tokenizer: Tokenizer
    text_rewards: list[RewardSource]
    offload: Offload
    policy: Path | None
    value: Path | None
    with_critic: bool = True
    shares_trunk: bool = False

    def load(self) -> Models:
        """Raises: UsageError, naming the argument, for a model that cannot be read or does not fit the others, or
        that is not the one that the run to resume had."""
        load = self._sharing if self.args.lora else self._separate
        reward, judge, reference, actor, critic = load()
        frozen = fingerprints({key: getattr(self.model_args, key) for key in (ACTOR, REWARD, JUDGE)})
        if self.policy is not None:
            check_unchanged(frozen, self.policy)
        sources = [*([reward] if reward else []), *self.text_rewards]
        rewards = WeightedRewards(sources, self.args.reward_weights) if sources else None
        judge = judge and WeightedRewards([judge])
        name = getattr(self.model_args, JUDGE)
        return Models(actor, reference, critic, rewards, self.tokenizer, judge, name, frozen)

    def _separate(self) -> Loaded:
        args, dtype, here = self.args, weight_dtype(self.args), Placement.here()
        start = self.model_args.actor_model_name_or_path
        load = partial(load_value, score_type="reward", dtype=dtype, require_head=True, placement=here)
        reward, judge = (self._let_go(self._scorer(key, load)) for key in (REWARD, JUDGE))
        reference = load_named(ACTOR, load_policy, start, dtype, placement=here)
        freeze(reference)
        passes = self._passes_of_reference(reference)
        actor = load_named(ACTOR, load_policy, self.policy or start, dtype, args.recompute, here)
        load_named("num_layers_unfrozen", set_trainable_layers, actor, args.num_layers_unfrozen)
        if not self.with_critic:
            critic = None
        elif self.shares_trunk:
            critic = load_named("resume_from_checkpoint", add_value_head, actor, self.value)
        else:
            critic = self._separate_critic(self.value or self.model_args.reward_critic_model_name_or_path)
        return reward, judge, passes, actor, critic

    def _sharing(self) -> Loaded:
        """One copy of the weights that several models start from; it stays on the device."""
        args = self.args
        bases = Bases(LoRASettings.from_arguments(args), args.seed, weight_dtype(args))
        reference = load_named(ACTOR, bases.load_reference, self.model_args.actor_model_name_or_path)
        actor = load_named(ACTOR, bases.load_actor, args.recompute)
        reward = self._scorer(REWARD, bases.load_reward)
        critic, start = None, self.model_args.reward_critic_model_name_or_path
        if self.with_critic:
            self._check_vocabulary(start)
            critic = load_named(CRITIC, bases.load_critic, start, self._recomputes_critic)
        for model, checkpoint in ((actor, self.policy), (critic, self.value)):
            if checkpoint is not None:
                load_named("resume_from_checkpoint", resume_adapters, model, checkpoint)
        judge = self._scorer(JUDGE, partial(bases.load_reward, role="judge"))
        bases.mark_shared()
        say(bases.describe())
        return self._let_go(reward), self._let_go(judge), self._passes_of_reference(reference), actor, critic

    def _passes_of_reference(self, reference: paddle.nn.Layer) -> Pipeline:
        reference.eval()
        passes = passes_of(reference)
        self.offload.add_frozen(passes)
        return passes

    def _scorer(self, key: str, load: Callable[[str], paddle.nn.Layer]) -> ModelReward | None:
        """The reward model or the judge, if argument ``key`` names one."""
        name = getattr(self.model_args, key)
        how = (self.tokenizer, self.data_args.prompt_template, self.args.per_device_eval_batch_size)
        return name and load_scorer(key, name, load, *how)

    def _let_go(self, scorer: ModelReward | None) -> ModelReward | None:
        """It may leave the device until it scores: in every iteration, or the judge at evaluations alone."""
        if scorer:
            self.offload.add_frozen(scorer.pipeline, in_turn=scorer.name == SCORERS[REWARD])
        return scorer

    def _separate_critic(self, name: str | Path) -> paddle.nn.Layer:
        self._check_vocabulary(name)
        args, options = self.args, {"placement": Placement.here()}
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


def load_scorer(
    key: str, name: str, load: Callable[[str], paddle.nn.Layer], tokenizer: Tokenizer, template: str, batch_size: int
) -> ModelReward:
    """The reward model ``name``, of answers to prompts that ``tokenizer`` and ``template`` have written.

    Args: key: the argument that names it; load: reads its weights; batch_size: sequences of a forward pass.
    """
    return ModelReward(
        load_named(key, load, name),
        load_named(key, load_tokenizer, name),
        tokenizer,
        batch_size=batch_size,
        add_special_tokens=get_template(template).add_special_tokens,
        name=SCORERS[key],
    )
