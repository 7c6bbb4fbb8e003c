"""From PPO's arguments to its trainer: data and reward sources first, for they fail fast; then the models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import paddle

from alignment.ppo.load import ACTOR, ModelLoader
from alignment.ppo.models.tokenizer import Tokenizer, load_tokenizer
from alignment.ppo.offload import Offload
from alignment.ppo.rewards import FunctionReward, RewardSource, ServerReward
from alignment.ppo.rollout.protocol import SamplingParameters
from alignment.ppo.trainer import PARTS, PPOTrainer, critic_checkpoint
from alignment.runtime.console import say
from alignment.runtime.timing import PhaseTimer
from alignment.training.checkpoint import find_checkpoint
from alignment.training.same_data import check_same_data
from alignment.training.setup import check_positions, check_resumes_alike, load_data, load_dataset, load_named
from data import PromptOnlyDataset, SupervisedDataset


def build_trainer(model_args: Any, data_args: Any, args: Any) -> PPOTrainer:
    """The trainer that the arguments describe.

    Raises: UsageError or data.DataError, naming argument or data set, for anything that cannot work.
    """
    policy = find_checkpoint(args.resume_from_checkpoint, PARTS[0])
    value = policy and critic_checkpoint(policy)
    check_resumes_alike(args, policy)
    text_rewards = load_text_rewards(args)
    tokenizer = load_named(ACTOR, load_tokenizer, model_args.actor_model_name_or_path)
    prompts, eval_prompts = load_data(PromptOnlyDataset, data_args, args, tokenizer, policy, data_args.max_prompt_len)
    ptx_set = _load_texts(data_args, args, tokenizer, policy) if args.ptx_coeff > 0 else None
    offload = Offload(args.offload_level.split(), Path(args.output_dir), PhaseTimer())
    how = {"policy": policy, "value": value, "shares_trunk": args.critic_shares_trunk}
    models = ModelLoader(model_args, data_args, args, tokenizer, text_rewards, offload, **how).load()
    longest = max(len(item["input_ids"]) for part in (prompts, eval_prompts or ()) for item in part)
    for model in (models.actor, models.critic):
        check_positions("max_new_tokens", model, longest + args.max_new_tokens)
    if ptx_set is not None:
        check_positions("max_length", models.actor, max(len(item["input_ids"]) for item in ptx_set))
    sampling = sampling_of(args, models.actor, tokenizer)
    if sampling.is_truncated:
        say("notice: top_p, top_k, repetition_penalty or min_new_tokens shape sampling, but not the ratio and the KL")
    return PPOTrainer(args, models, offload, sampling, prompts, eval_prompts, ptx_set, policy)


def load_text_rewards(args: Any) -> list[RewardSource]:
    """The sources that need no model here, in the order of reward_weights."""
    sources: list[RewardSource] = []
    if args.reward_function:
        sources.append(load_named("reward_function", FunctionReward, args.reward_function))
    if args.reward_server:
        server = (args.reward_server_timeout, args.reward_server_retries, args.reward_server_token)
        sources.append(load_named("reward_server", ServerReward, args.reward_server, *server))
    return sources


def _load_texts(data_args: Any, args: Any, tokenizer: Tokenizer, checkpoint: Path | None) -> SupervisedDataset:
    texts = load_dataset(SupervisedDataset, data_args.ptx_datasets, data_args, args, tokenizer)
    say(f"ptx: {texts.report.summary()}")
    check_same_data({"ptx_datasets": texts}, checkpoint)
    return texts


def sampling_of(args: Any, policy: paddle.nn.Layer, tokenizer: Tokenizer) -> SamplingParameters:
    """An answer ends at the tokenizer's EOS, or at one that the model's configuration names."""
    configured = policy.config.eos_token_id
    configured = configured if isinstance(configured, list | tuple) else [configured]
    ends = [tokenizer.eos_token_id, *(token for token in configured if token is not None)]
    return SamplingParameters(
        max_new_tokens=args.max_new_tokens,
        min_new_tokens=args.min_new_tokens,
        eos_token_ids=tuple(dict.fromkeys(ends)),
        pad_token_id=tokenizer.pad_token_id,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
        stop_strings=tuple(args.stop_strings or ()),
    )
