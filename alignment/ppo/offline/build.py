"""From the arguments of run_offline.py to its trainer: data and reward sources first, for they fail fast."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from alignment.parallel.pipeline import Pipeline
from alignment.parallel.topology import topology
from alignment.ppo.build import load_text_rewards, sampling_of
from alignment.ppo.judge import WinRate
from alignment.ppo.load import ACTOR, ModelLoader, Models
from alignment.ppo.models.freezing import freeze
from alignment.ppo.models.policy import passes_of
from alignment.ppo.models.tokenizer import Tokenizer, load_tokenizer
from alignment.ppo.offline.ilql_learner import IlqlLearner
from alignment.ppo.offline.ilql_model import add_heads
from alignment.ppo.offline.learner import AdvantageLearner, critic_steps
from alignment.ppo.offline.logged import LoggedAnswers, LoggedDataset, Samples, read_answers
from alignment.ppo.offline.measure import LoggedCollector
from alignment.ppo.offline.trainer import PARTS, OfflineLearner, OfflineTrainer
from alignment.ppo.offload import Offload
from alignment.ppo.reshard import Sampler
from alignment.ppo.trainer import critic_checkpoint
from alignment.runtime.console import say
from alignment.runtime.faults import UsageError
from alignment.runtime.timing import PhaseTimer
from alignment.training.batches import BatchSchedule
from alignment.training.checkpoint import find_checkpoint
from alignment.training.engine import OptimizerSettings, TrainingEngine
from alignment.training.nonfinite import Guard
from alignment.training.setup import (
    check_positions,
    check_resumes_alike,
    load_data,
    load_dataset,
    load_named,
    total_steps,
)
from data import PromptOnlyDataset


def build_trainer(model_args: Any, data_args: Any, args: Any) -> OfflineTrainer:
    """The trainer that the arguments describe.

    Raises: UsageError or data.DataError, naming argument or data set, for anything that cannot work.
    """
    policy = find_checkpoint(args.resume_from_checkpoint, PARTS[0])
    check_resumes_alike(args, policy)
    text_rewards = load_text_rewards(args)
    tokenizer = load_named(ACTOR, load_tokenizer, model_args.actor_model_name_or_path)
    kind = partial(LoggedDataset, max_prompt_len=data_args.max_prompt_len)
    train_set, eval_set = load_data(kind, data_args, args, tokenizer, policy)
    train, held_out = read_answers(train_set), eval_set and read_answers(eval_set)
    say(f"{len(train)} logged answers" + (f", {len(held_out)} held out" if held_out else ""))
    has_rewards, needs_scores = bool(text_rewards or model_args.reward_model_name_or_path), args.policy_loss != "bc"
    if needs_scores and not has_rewards:
        _check_scores(train, held_out)
    prompts = _held_out_prompts(eval_set, data_args, args, tokenizer) if eval_set and has_rewards else None
    needs_critic = args.policy_loss in ("apa", "awr")
    value = critic_checkpoint(policy) if policy and needs_critic and args.critic_training != "none" else None
    offload = Offload(args.offload_level.split(), Path(args.output_dir), PhaseTimer())
    loader = ModelLoader(model_args, data_args, args, tokenizer, text_rewards, offload, policy, value, needs_critic)
    models = loader.load()
    if args.policy_loss == "ilql":
        load_named("resume_from_checkpoint", add_heads, models.actor, args.seed, policy)
    _check_lengths(models, args, train, held_out, prompts)
    learner = build_learner(args, models, offload, train, held_out, answers=prompts is not None)
    win_rate = WinRate(models.judge_name) if models.judge and prompts else None
    sampling = sampling_of(args, models.actor, tokenizer)
    return OfflineTrainer(args, tokenizer, learner, prompts, sampling, win_rate, policy, models.frozen)


def build_learner(
    args: Any,
    models: Models,
    offload: Offload,
    train: LoggedAnswers,
    held_out: LoggedAnswers | None,
    answers: bool,
) -> OfflineLearner:
    """Engines, their passes and what learns with them.

    Args: answers: whether the policy answers held-out prompts.
    """
    own = args.per_device_train_batch_size * args.gradient_accumulation_steps
    schedule = BatchSchedule(len(train), own * topology().data_size, args.data_seed, args.dataloader_drop_last)
    steps = total_steps(args, schedule.steps_per_epoch)
    settings, critic = OptimizerSettings.from_arguments(args), None
    actor = TrainingEngine(models.actor, settings, steps, "actor", Guard.from_arguments(args))
    if models.critic is not None and args.critic_training != "none":
        settings = OptimizerSettings.from_arguments(args, "critic_")
        guard, steps = Guard.from_arguments(args), critic_steps(args, schedule) or steps
        critic = TrainingEngine(models.critic, settings, steps, "critic", guard)
    collector = LoggedCollector(
        sampler=_sampler(args, models, actor, offload) if answers else None,
        actor=actor.pipeline,
        reference=models.reference,
        critic=critic.pipeline if critic else _fixed_critic(models, offload),
        rewards=models.rewards,
        tokenizer=models.tokenizer,
        batch_size=args.per_device_eval_batch_size,
        timer=offload.timer,
        judge=models.judge,
    )
    for engine in filter(None, (critic, actor)):
        offload.add_trained(engine)
    if args.policy_loss == "ilql":
        return IlqlLearner(args, actor, collector, schedule, train, held_out)
    return AdvantageLearner(args, actor, critic, collector, schedule, train, held_out)


def _sampler(args: Any, models: Models, actor: TrainingEngine, offload: Offload) -> Sampler:
    decode = partial(models.tokenizer.decode, skip_special_tokens=False)
    drops_copy = "train_model" in offload.levels
    return Sampler(actor, args.eval_mode, args.rollout_batch_size, args.use_fusemt, decode, drops_copy)


def _fixed_critic(models: Models, offload: Offload) -> Pipeline | None:
    if models.critic is None:
        return None
    freeze(models.critic)
    passes = passes_of(models.critic)
    offload.add_frozen(passes)
    return passes


def _check_scores(*parts: LoggedAnswers | None) -> None:
    given = np.concatenate([part.given for part in parts if part is not None])
    missing = int(np.isnan(given).sum())
    if missing:
        raise UsageError(
            f"no reward: {missing} of {len(given)} logged answers have no score of their own; set one of "
            "reward_model_name_or_path, reward_function, reward_server"
        )


def _held_out_prompts(held_out: LoggedDataset, data_args: Any, args: Any, tokenizer: Tokenizer) -> list[dict]:
    source = data_args.eval_datasets or [(Samples(held_out), 1)]
    prompts = load_dataset(PromptOnlyDataset, source, data_args, args, tokenizer, data_args.max_prompt_len)
    return list(prompts)[: args.num_eval_prompts]


def _check_lengths(
    models: Models, args: Any, train: LoggedAnswers, held_out: LoggedAnswers | None, prompts: list[dict] | None
) -> None:
    longest = max(int(part.experience.attention_mask.sum(-1).max()) for part in filter(None, (train, held_out)))
    for model in filter(None, (models.actor, models.critic)):
        check_positions("max_length", model, longest)
    if prompts:
        asked = max(len(item["input_ids"]) for item in prompts)
        check_positions("max_new_tokens", models.actor, asked + args.max_new_tokens)
