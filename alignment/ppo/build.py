"""From PPO's arguments to its trainer: data and reward sources first, for they fail fast; then the models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import paddle

from alignment.ppo.bases import Bases
from alignment.ppo.models.adapters import resume_adapters
from alignment.ppo.models.freezing import freeze, set_trainable_layers
from alignment.ppo.models.loading import load_policy
from alignment.ppo.models.lora import LoRASettings
from alignment.ppo.models.placement import Placement
from alignment.ppo.models.policy import passes_of
from alignment.ppo.models.tokenizer import Tokenizer, load_tokenizer
from alignment.ppo.models.value import load_value
from alignment.ppo.offload import Offload
from alignment.ppo.rewards import FunctionReward, RewardSource, ServerReward, WeightedRewards
from alignment.ppo.rewards.model import ModelReward
from alignment.ppo.rollout.protocol import SamplingParameters
from alignment.ppo.trainer import PARTS, Models, PPOTrainer, critic_checkpoint
from alignment.runtime.console import say
from alignment.runtime.faults import UsageError
from alignment.runtime.timing import PhaseTimer
from alignment.training.checkpoint import find_checkpoint
from alignment.training.setup import (
    check_positions,
    check_resumes_alike,
    load_data,
    load_dataset,
    load_named,
    weight_dtype,
)
from data import PromptOnlyDataset, SupervisedDataset
from data.templates import get_template

ACTOR, CRITIC, REWARD = (
    "actor_model_name_or_path",
    "reward_critic_model_name_or_path",
    "reward_model_name_or_path",
)


def build_trainer(model_args: Any, data_args: Any, args: Any) -> PPOTrainer:
    """The trainer that the arguments describe.

    Raises: UsageError or data.DataError, naming argument or data set, for anything that cannot work.
    """
    policy = find_checkpoint(args.output_dir, args.resume_from_checkpoint, PARTS[0])
    value = policy and critic_checkpoint(policy)
    check_resumes_alike(args, policy)
    text_rewards = _text_rewards(args)
    tokenizer = load_named(ACTOR, load_tokenizer, model_args.actor_model_name_or_path)
    prompts, eval_prompts = load_data(PromptOnlyDataset, data_args, args, tokenizer, data_args.max_prompt_len)
    ptx_set = _load_texts(data_args, args, tokenizer) if args.ptx_coeff > 0 else None
    offload = Offload(args.offload_level.split(), Path(args.output_dir), PhaseTimer())
    models = _load_models(model_args, data_args, args, tokenizer, text_rewards, offload, policy, value)
    longest = max(len(item["input_ids"]) for part in (prompts, eval_prompts or ()) for item in part)
    for model in (models.actor, models.critic):
        check_positions("max_new_tokens", model, longest + args.max_new_tokens)
    if ptx_set is not None:
        check_positions("max_length", models.actor, max(len(item["input_ids"]) for item in ptx_set))
    sampling = _sampling(args, models)
    if sampling.is_truncated:
        say("notice: top_p, top_k, repetition_penalty or min_new_tokens shape sampling, but not the ratio and the KL")
    return PPOTrainer(args, models, offload, sampling, prompts, eval_prompts, ptx_set, policy)


def _text_rewards(args: Any) -> list[RewardSource]:
    """The sources that need no model here, in the order of reward_weights."""
    sources: list[RewardSource] = []
    if args.reward_function:
        sources.append(load_named("reward_function", FunctionReward, args.reward_function))
    if args.reward_server:
        server = (args.reward_server_timeout, args.reward_server_retries, args.reward_server_token)
        sources.append(load_named("reward_server", ServerReward, args.reward_server, *server))
    return sources


def _load_texts(data_args: Any, args: Any, tokenizer: Tokenizer) -> SupervisedDataset:
    texts = load_dataset(SupervisedDataset, data_args.ptx_datasets, data_args, args, tokenizer)
    say(f"ptx: {texts.report.summary()}")
    return texts


def _load_models(
    model_args: Any,
    data_args: Any,
    args: Any,
    tokenizer: Tokenizer,
    text_rewards: list[RewardSource],
    offload: Offload,
    policy: Path | None,
    value: Path | None,
) -> Models:
    """Frozen models leave the device as soon as they are read. policy, value: checkpoints to resume from, or None."""
    if args.lora:
        return _load_sharing_models(model_args, data_args, args, tokenizer, text_rewards, offload, policy, value)
    start, dtype = model_args.actor_model_name_or_path, weight_dtype(args)
    sources = text_rewards
    if model_args.reward_model_name_or_path:
        name = model_args.reward_model_name_or_path
        model = load_named(REWARD, load_value, name, "reward", dtype, require_head=True, placement=Placement.here())
        source = _reward_source(model, name, data_args, args, tokenizer)
        offload.add_frozen(source.pipeline)
        sources = [source, *sources]
    here = Placement.here()
    reference = load_named(ACTOR, load_policy, start, dtype, placement=here)
    reference.eval()
    freeze(reference)
    reference = passes_of(reference)
    offload.add_frozen(reference)
    actor = load_named(ACTOR, load_policy, policy or start, dtype, args.recompute, here)
    load_named("num_layers_unfrozen", set_trainable_layers, actor, args.num_layers_unfrozen)
    critic = _load_critic(value or model_args.reward_critic_model_name_or_path, args, tokenizer, dtype)
    return Models(actor, reference, critic, WeightedRewards(sources, args.reward_weights), tokenizer)


def _load_sharing_models(
    model_args: Any,
    data_args: Any,
    args: Any,
    tokenizer: Tokenizer,
    text_rewards: list[RewardSource],
    offload: Offload,
    policy: Path | None,
    value: Path | None,
) -> Models:
    """As ``_load_models``, with LoRA: one copy of the weights that several models start from; it stays where it is."""
    bases, sources = Bases(LoRASettings.from_arguments(args), args.seed, weight_dtype(args)), text_rewards
    reference = load_named(ACTOR, bases.load_reference, model_args.actor_model_name_or_path)
    reference.eval()
    actor = load_named(ACTOR, bases.load_actor, args.recompute)
    name = model_args.reward_model_name_or_path
    if name:
        model = load_named(REWARD, bases.load_reward, name)
        sources = [_reward_source(model, name, data_args, args, tokenizer), *sources]
    start = model_args.reward_critic_model_name_or_path
    _check_vocabulary(start, tokenizer)
    critic = load_named(CRITIC, bases.load_critic, start, _recomputes_critic(args))
    for model, checkpoint in ((actor, policy), (critic, value)):
        if checkpoint is not None:
            load_named("resume_from_checkpoint", resume_adapters, model, checkpoint)
    bases.mark_shared()
    say(bases.describe())
    reference = passes_of(reference)
    for passes in [*(source.pipeline for source in sources[:1] if name), reference]:
        offload.add_frozen(passes)
    return Models(actor, reference, critic, WeightedRewards(sources, args.reward_weights), tokenizer)


def _reward_source(
    model: paddle.nn.Layer, name: str, data_args: Any, args: Any, actor_tokenizer: Tokenizer
) -> ModelReward:
    return ModelReward(
        model,
        load_named(REWARD, load_tokenizer, name),
        actor_tokenizer,
        batch_size=args.per_device_eval_batch_size,
        add_special_tokens=get_template(data_args.prompt_template).add_special_tokens,
    )


def _load_critic(name: str | Path, args: Any, actor_tokenizer: Tokenizer, dtype: str) -> paddle.nn.Layer:
    _check_vocabulary(name, actor_tokenizer)
    options = {"seed": args.seed, "placement": Placement.here()}
    critic = load_named(CRITIC, load_value, name, "critic", dtype, _recomputes_critic(args), **options)
    if critic.head_is_new:
        say("the critic starts with a new value head")
    unfrozen = args.num_layers_unfrozen if args.critic_num_layers_unfrozen is None else args.critic_num_layers_unfrozen
    load_named("critic_num_layers_unfrozen", set_trainable_layers, critic, unfrozen)
    return critic


def _check_vocabulary(name: str | Path, actor_tokenizer: Tokenizer) -> None:
    if load_named(CRITIC, load_tokenizer, name).get_vocab() != actor_tokenizer.get_vocab():
        raise UsageError(f'"{CRITIC}": {name} has another vocabulary than the actor, whose tokens it must read')


def _recomputes_critic(args: Any) -> bool:
    return args.recompute if args.critic_recompute is None else args.critic_recompute


def _sampling(args: Any, models: Models) -> SamplingParameters:
    """An answer ends at the tokenizer's EOS, or at one that the model's configuration names."""
    configured = models.actor.config.eos_token_id
    configured = configured if isinstance(configured, list | tuple) else [configured]
    ends = [models.tokenizer.eos_token_id, *(token for token in configured if token is not None)]
    return SamplingParameters(
        max_new_tokens=args.max_new_tokens,
        min_new_tokens=args.min_new_tokens,
        eos_token_ids=tuple(dict.fromkeys(ends)),
        pad_token_id=models.tokenizer.pad_token_id,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
        stop_strings=tuple(args.stop_strings or ()),
    )
