"""Arguments of run_ppo.py. Names are PaddleNLP's where it has the argument, the papers' terms otherwise."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from alignment.ppo.controllers import SCORE_SCALINGS
from alignment.runtime.argument_fields import argument
from alignment.runtime.faults import UsageError
from alignment.training.arguments import DataArguments, StageArguments
from alignment.training.inherited_arguments import SCHEDULES

EVAL_MODES = ("single", "tensor_parallel")
REWARDS = ("reward_model_name_or_path", "reward_function", "reward_server")
ANSWER_METRICS = ("reward_mean", "reward_sem", "kl_mean", "kl_sem", "length_mean", "truncated_rate")
JUDGE_METRICS = ("judge_reward_mean", "judge_reward_sem", "win_rate", "win_rate_sem")
OFFLOAD_LEVELS = ("freeze_model", "optimizer", "train_model")


@dataclass
class TrainingArguments(StageArguments):
    """Rollout, reward, objective and critic."""

    policy_loss: str = argument(
        "ppo",
        "Objective: ppo (clipped ratio), apa (squared advantage matching), awr (advantage-weighted regression).",
        group="Objective",
        choices=("ppo", "apa", "awr"),
    )
    clip_range_ratio: float = argument(0.2, "ppo: the ratio is clipped to 1 +- this.", group="Objective", gt=0)
    apa_anchor: str = argument(
        "initial",
        "apa: the policy that the log-ratio is against: initial, the reference; old, the one that sampled.",
        group="Objective",
        choices=("initial", "old"),
    )
    apa_lambda: float = argument(0.1, "apa: scale of the log-ratio against the advantage.", group="Objective", gt=0)
    awr_beta: float = argument(1.0, "awr: temperature; weights are exp(advantage / beta).", group="Objective", gt=0)
    awr_weight_clip: float | None = argument(None, "awr: largest weight; null: no limit.", group="Objective", gt=0)
    entropy_coeff: float = argument(0.0, "Weight of the entropy bonus.", group="Objective", ge=0)
    ptx_coeff: float = argument(0.0, "Weight of the language-model loss on ptx_datasets.", group="Objective", ge=0)
    gamma: float = argument(1.0, "Discount of rewards.", group="Objective", ge=0, le=1)
    gae_lambda: float = argument(0.95, "Lambda of generalised advantage estimation.", group="Objective", ge=0, le=1)
    normalize_advantage: bool = argument(False, "Whiten advantages, over whitening_scope.", group="Objective")
    whitening_scope: str = argument(
        "batch",
        "Whose mean and deviation whitening uses: batch, all answers of an iteration; rank, those of one share of it, "
        "as data-parallel processes have it: the result then depends on their number.",
        group="Objective",
        choices=("batch", "rank"),
    )
    update_iters: int = argument(1, "Passes over each iteration's answers.", group="Objective", ge=1)
    target_kl: float | None = argument(
        None, "Stop an iteration's passes when the approximate KL to its start exceeds this.", group="Objective", gt=0
    )

    kl_coeff: float = argument(0.02, "Coefficient of the KL penalty against the reference.", group="Reward", ge=0)
    kl_estimator: str = argument("k1", "KL estimate per token.", group="Reward", choices=("k1", "k2", "k3"))
    kl_controller: str = argument(
        "fixed", "adaptive moves kl_coeff towards kl_target.", group="Reward", choices=("fixed", "adaptive")
    )
    kl_target: float | None = argument(None, "adaptive: KL per answer to aim at, in nats.", group="Reward", gt=0)
    kl_horizon: float = argument(10000.0, "adaptive: answers over which it corrects.", group="Reward", gt=0)
    normalize_reward: bool = argument(False, 'The same as score_scaling "normalize".', group="Reward")
    score_scaling: str = argument(
        "none",
        "Puts scores on one scale: normalize by running mean and deviation; divide by the running deviation, by that "
        "of the first iteration, or by score_std (fixed).",
        group="Reward",
        choices=SCORE_SCALINGS,
    )
    score_std: float | None = argument(None, "fixed: what scores are divided by.", group="Reward", gt=0)
    score_centering: str = argument(
        "none",
        "reference: take off an answer's score that of the data set's own (better) answer to the prompt.",
        group="Reward",
        choices=("none", "reference"),
    )
    clip_range_score: float = argument(50.0, "Scores are clipped to +- this.", group="Reward", gt=0)
    missing_eos_penalty: float = argument(0.0, "Taken off the score of an answer without end.", group="Reward", ge=0)
    reward_function: str | None = argument(
        None, 'A Python function that scores answers: "module:name" or "file.py:name".', group="Reward"
    )
    reward_server: str | None = argument(None, "URL of a reward server.", group="Reward")
    reward_server_timeout: float = argument(60.0, "Seconds to wait for one answer of it.", group="Reward", gt=0)
    reward_server_retries: int = argument(3, "Further tries after the first.", group="Reward", ge=0)
    reward_server_token: str | None = argument(
        None, "Bearer token for it; kept out of run.json and other records.", group="Reward"
    )
    reward_weights: list[float] | None = argument(
        None,
        "Weights of the sources in use, in the order model, function, server; default: 1 each.",
        group="Reward",
    )

    per_device_prompt_batch_size: int = argument(16, "Prompts per device and iteration.", group="Rollout", ge=1)
    num_return_sequences: int = argument(1, "Answers per prompt.", group="Rollout", ge=1, aliases=("rollout_n",))
    temperature: float = argument(1.0, "Sampling temperature.", group="Rollout", gt=0)
    top_p: float = argument(
        1.0,
        "Sample from the likeliest tokens of this mass. Below 1 tokens come from another distribution than the one "
        "whose log-probabilities are trained, which biases the ratio and the KL (PaddleNLP's default was 0.8).",
        group="Rollout",
        gt=0,
        le=1,
    )
    top_k: int = argument(
        0, "Sample from this many likeliest tokens; 0: all. Biases as top_p does.", group="Rollout", ge=0
    )
    repetition_penalty: float = argument(1.0, "Divides the logits of tokens seen before.", group="Rollout", gt=0)
    min_new_tokens: int = argument(
        1, "Shortest answer, its end included.", group="Rollout", ge=1, aliases=("min_dec_len",)
    )
    max_new_tokens: int | None = argument(
        None, "Longest answer; default: max_length.", group="Rollout", ge=1, aliases=("max_dec_len",)
    )
    self_check_tolerance: float = argument(
        1e-3,
        "Largest difference between sampling and training log-probabilities on the first iteration, fp32.",
        group="Rollout",
        gt=0,
    )
    stop_strings: list[str] | None = argument(
        None, "Texts that end an answer, beside the model's end tokens; they stay in it.", group="Rollout"
    )
    use_fusemt: bool = argument(
        True, "Fused rollout engine; false: PaddleNLP's own forward pass, several times slower.", group="Rollout"
    )
    rollout_batch_size: int = argument(64, "Answers that a device decodes at a time.", group="Rollout", ge=1)
    rollout_oversampling: float = argument(
        1.0,
        "Draw this many times num_return_sequences answers a prompt and keep the shortest: the longest tail is never "
        "drawn, and long answers are learnt from less often.",
        group="Rollout",
        ge=1,
    )
    rollout_token_budget: int | None = argument(
        None,
        "Most answer tokens per iteration, the same for every prompt; the longest answers to a prompt are cut to fit.",
        group="Rollout",
        ge=1,
    )
    eval_mode: str | None = argument(
        None,
        "Layout of the policy that samples: null the training layout, tensor_parallel all layers on every process "
        "with matrices divided as in training, single the whole policy on every process.",
        group="Rollout",
        choices=("", *EVAL_MODES),
    )
    offload_level: str = argument(
        "",
        "What leaves the device between the phases that use it, a space between the words: freeze_model (reward "
        "model, reference and judge), optimizer (its state), train_model (weights of actor and critic).",
        group="Precision and memory",
    )

    critic_shares_trunk: bool = argument(
        False,
        "The critic is a value head on the policy's own layers, learnt in the same step, instead of a model.",
        group="Critic",
    )
    value_loss_coeff: float = argument(
        1.0, "critic_shares_trunk: weight of the value loss beside the policy's.", group="Critic", ge=0
    )
    critic_learning_rate: float | None = argument(None, "Default: learning_rate.", group="Critic", gt=0)
    critic_weight_decay: float | None = argument(None, "Default: weight_decay.", group="Critic", ge=0)
    critic_lr_scheduler_type: str | None = argument(
        None, "Default: lr_scheduler_type.", group="Critic", choices=SCHEDULES
    )
    critic_warmup_ratio: float | None = argument(None, "Default: warmup_ratio.", group="Critic", ge=0, le=1)
    critic_recompute: bool | None = argument(None, "Default: recompute.", group="Critic")
    critic_num_layers_unfrozen: int | None = argument(None, "Default: num_layers_unfrozen.", group="Critic", ge=-1)
    clip_range_value: float = argument(5.0, "Values stay within +- this of the old estimate.", group="Critic", gt=0)

    total_episodes: int | None = argument(
        None, "Answers to sample in all; replaces max_steps and num_train_epochs.", group="Length of the run", ge=1
    )
    num_eval_prompts: int | None = argument(
        None, "Held-out prompts per evaluation; default: all.", group="Evaluation", ge=1
    )

    @staticmethod
    def validate(values: dict[str, Any]) -> None:
        """See StageArguments.validate."""
        StageArguments.validate(values, answer_metrics(values))
        settle_offload(values)
        values["eval_mode"] = values["eval_mode"] or None
        settle_lengths(values)
        _validate_batches(values)
        validate_rewards(values)
        _settle_score_scaling(values)
        validate_judge(values)
        _validate_rollout(values)
        if values["kl_controller"] == "adaptive" and values["kl_target"] is None:
            raise UsageError('"kl_controller": "adaptive" needs "kl_target"')
        if values["ptx_coeff"] > 0 and not values["ptx_datasets"]:
            raise UsageError(f'"ptx_coeff": {values["ptx_coeff"]} needs "ptx_datasets"')
        if values["total_episodes"] is not None and values["max_steps"] > 0:
            raise UsageError('"total_episodes": give it or "max_steps", not both')


def answer_metrics(values: dict[str, Any]) -> tuple[str, ...]:
    """What an evaluation measures of the policy's answers; see StageArguments.validate."""
    return ANSWER_METRICS + (JUDGE_METRICS if values["judge_model_name_or_path"] else ())


def settle_lengths(values: dict[str, Any]) -> None:
    """Fills in max_new_tokens and max_prompt_len. Raises UsageError for lengths that exclude each other."""
    longest = values["max_length"]
    values["max_new_tokens"] = values["max_new_tokens"] or longest
    values["max_prompt_len"] = values["max_prompt_len"] or longest
    if values["min_new_tokens"] > values["max_new_tokens"]:
        raise UsageError(
            f'"min_new_tokens": {values["min_new_tokens"]} is more than "max_new_tokens", {values["max_new_tokens"]}'
        )
    if values["max_prompt_len"] > longest:
        raise UsageError(f'"max_prompt_len": {values["max_prompt_len"]} is more than "max_length", {longest}')


def settle_offload(values: dict[str, Any]) -> None:
    """Puts the words of offload_level in order. Raises UsageError for an unknown one."""
    words = values["offload_level"].split()
    if not set(words) <= set(OFFLOAD_LEVELS):
        raise UsageError(
            f'"offload_level": {json.dumps(values["offload_level"])} is not allowed; it must be "" or some of '
            f"{', '.join(OFFLOAD_LEVELS)}, with a space between them"
        )
    values["offload_level"] = " ".join(level for level in OFFLOAD_LEVELS if level in words)


def _validate_batches(values: dict[str, Any]) -> None:
    answers = values["per_device_prompt_batch_size"] * values["num_return_sequences"]
    minibatch = values["per_device_train_batch_size"] * values["gradient_accumulation_steps"]
    if answers % minibatch:
        raise UsageError(
            f'"per_device_train_batch_size" * "gradient_accumulation_steps" = {minibatch} must divide '
            f'"per_device_prompt_batch_size" * "num_return_sequences" = {answers}'
        )


def _validate_rollout(values: dict[str, Any]) -> None:
    if "" in (values["stop_strings"] or ()):
        raise UsageError('"stop_strings": "" would end every answer at once')
    budget, slots = values["rollout_token_budget"], values["rollout_batch_size"]
    if budget is None:
        return
    if values["rollout_oversampling"] > 1:
        raise UsageError('"rollout_token_budget": give it or "rollout_oversampling", not both')
    if values["num_return_sequences"] > slots:
        raise UsageError(
            f'"rollout_token_budget" needs "rollout_batch_size", {slots}, of at least "num_return_sequences", '
            f'{values["num_return_sequences"]}: answers to a prompt wait for each other'
        )


def validate_rewards(values: dict[str, Any], needed: bool = True) -> None:
    """Raises UsageError for weights that do not fit the reward sources, or if one is needed and there is none."""
    sources = [name for name in REWARDS if values[name]]
    if needed and not sources:
        raise UsageError(f"no reward: set one of {', '.join(REWARDS)}")
    weights = values["reward_weights"]
    if weights is not None and len(weights) != len(sources):
        named = ", ".join(sources) or "no source"
        raise UsageError(f'"reward_weights": {weights} must hold {len(sources)}, one each for {named}')


def _settle_score_scaling(values: dict[str, Any]) -> None:
    if values["normalize_reward"]:
        if values["score_scaling"] not in ("none", "normalize"):
            raise UsageError(f'"score_scaling": "{values["score_scaling"]}" excludes "normalize_reward": true')
        values["score_scaling"] = "normalize"
    if (values["score_scaling"] == "fixed") != (values["score_std"] is not None):
        raise UsageError('"score_scaling": "fixed" and "score_std" need each other')


def _validate_shared_trunk(values: dict[str, Any]) -> None:
    """What a critic that is a model of its own could have, and a head cannot."""
    own = [name for name in values if name.startswith("critic_") and name != "critic_shares_trunk"]
    for name in (*own, "reward_critic_model_name_or_path"):
        if values[name] is not None:
            raise UsageError(f'"{name}" needs a critic of its own: give it or "critic_shares_trunk", not both')
    if values["lora"]:
        raise UsageError('"critic_shares_trunk": give it or "lora", which shares the weights of all models, not both')


def validate_judge(values: dict[str, Any]) -> None:
    """Raises UsageError for a judge without prompts to judge by, or one that answers are learnt from."""
    judge = values["judge_model_name_or_path"]
    if judge and not (values["eval_datasets"] or values["eval_split_ratio"]):
        raise UsageError('"judge_model_name_or_path" needs "eval_datasets" or "eval_split_ratio": prompts to judge by')
    if judge and judge == values["reward_model_name_or_path"]:
        raise UsageError(f'"judge_model_name_or_path": {judge} is the reward model; a judge is one not trained on')


@dataclass
class ModelArgument:
    """Where the models come from. The reference is the actor's start."""

    actor_model_name_or_path: str = argument(
        "smollm2-135m-instruct",
        "Policy to train: local directory, hub name, or the embedded smollm2-135m-instruct.",
        group="Model",
    )
    reward_model_name_or_path: str | None = argument(None, "Reward model.", group="Model")
    reward_critic_model_name_or_path: str | None = argument(
        None, "Start of the critic; default: the reward model, or the actor where there is none.", group="Model"
    )
    judge_model_name_or_path: str | None = argument(
        None,
        "A reward model that nothing is trained on: at every evaluation it scores the answers and compares them with "
        "those of the initial policy.",
        group="Model",
    )
    reward_model_config: str | None = argument(
        None, "The same as model_config, for the reward model; default: the actor's shape.", group="Dry run"
    )

    @staticmethod
    def validate(values: dict[str, Any]) -> None:
        """Settles which model the critic starts from."""
        if values["critic_shares_trunk"]:
            return _validate_shared_trunk(values)
        values["reward_critic_model_name_or_path"] = (
            values["reward_critic_model_name_or_path"]
            or values["reward_model_name_or_path"]
            or values["actor_model_name_or_path"]
        )


@dataclass
class DataArgument(DataArguments):
    """Prompts, and texts for the language-model loss."""

    max_length: int = argument(
        2048, "Longest prompt; longest answer where max_new_tokens is not set; longest ptx sample.", group="Data", ge=2
    )
    max_prompt_len: int | None = argument(
        None, "Longest prompt, in tokens; default: max_length.", group="Data", ge=1, aliases=("max_src_len",)
    )
    ptx_datasets: str | dict[str, Any] | None = argument(
        None, "Texts for the language-model loss (see ptx_coeff), written as train_datasets is.", group="Data"
    )


GROUPS = (ModelArgument, DataArgument, TrainingArguments)
