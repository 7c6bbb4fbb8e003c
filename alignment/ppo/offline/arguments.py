"""Arguments of run_offline.py: PPO's where they mean the same, and what logged data need."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any, ClassVar

from alignment.ppo import arguments as online
from alignment.runtime.argument_fields import argument
from alignment.runtime.faults import UsageError
from alignment.training.arguments import DataArguments, StageArguments

CRITIC_METRICS = ("value_loss", "vf_explained_var")
METRICS = {  # of held-out logged answers, by policy_loss
    "apa": ("loss", *CRITIC_METRICS),
    "awr": ("loss", *CRITIC_METRICS),
    "bc": ("loss",),
    "ilql": ("loss", "td_loss", "expectile_loss", "cql_loss", "awac_loss"),
}
ONLINE = {field.name: field for field in dataclasses.fields(online.TrainingArguments)}


def as_online(name: str) -> Any:
    """A field like PPO's argument of that name."""
    field = ONLINE[name]
    return dataclasses.field(default=field.default, metadata=field.metadata)


@dataclass
class TrainingArguments(StageArguments):
    """Objective, scores, critic, and how held-out prompts are answered."""

    policy_loss: str = argument(
        "apa",
        "Objective: apa (squared advantage matching), awr (advantage-weighted regression), bc (behaviour cloning: "
        "likelihood of all logged answers), ilql (implicit language Q-learning).",
        group="Objective",
        choices=("apa", "awr", "bc", "ilql"),
    )
    apa_lambda: float = as_online("apa_lambda")
    awr_beta: float = as_online("awr_beta")
    awr_weight_clip: float | None = as_online("awr_weight_clip")
    gamma: float = as_online("gamma")
    gae_lambda: float = as_online("gae_lambda")
    normalize_advantage: bool = argument(True, "Whiten advantages over all training answers.", group="Objective")

    ilql_tau: float = argument(
        0.6, "V's expectile of Q: 0.5 is the mean over the logged actions, near 1 the best.", group="ILQL", gt=0, lt=1
    )
    ilql_cql_scale: float = argument(0.1, "Weight of the term that keeps Q small elsewhere.", group="ILQL", ge=0)
    ilql_awac_scale: float = argument(1.0, "Weight of the policy's own term.", group="ILQL", ge=0)
    ilql_awac_beta: float = argument(
        0.0, "The policy's term weighs an action by exp(beta (Q - V)); 0: behaviour cloning.", group="ILQL", ge=0
    )
    ilql_alpha: float = argument(0.005, "How far the target Q heads move towards Q.", group="ILQL", gt=0, le=1)
    steps_for_target_q_sync: int = argument(1, "Optimizer steps between such moves.", group="ILQL", ge=1)
    ilql_decoding_beta: list[float] = argument(
        lambda: [1.0],
        "Held-out prompts are answered by softmax(log pi + beta (Q - V)), once for each beta given here.",
        group="ILQL",
    )

    normalize_reward: bool = argument(
        True, "Subtract the mean of all training answers' scores, divide by their deviation.", group="Reward"
    )
    clip_range_score: float = as_online("clip_range_score")
    reward_function: str | None = as_online("reward_function")
    reward_server: str | None = as_online("reward_server")
    reward_server_timeout: float = as_online("reward_server_timeout")
    reward_server_retries: int = as_online("reward_server_retries")
    reward_server_token: str | None = as_online("reward_server_token")
    reward_weights: list[float] | None = as_online("reward_weights")

    critic_training: str = argument(
        "first",
        "first: fit the critic to the logged returns, then compute advantages once and train the policy; joint: both "
        "learn in the same step; none: the critic stays as it starts.",
        group="Critic",
        choices=("first", "joint", "none"),
    )
    critic_epochs: float = argument(
        1.0, "first: passes of the critic over the training answers.", group="Critic", gt=0
    )
    critic_refresh: int = argument(
        100, "joint: compute advantages anew every so many optimizer steps.", group="Critic", ge=1
    )
    critic_learning_rate: float | None = as_online("critic_learning_rate")
    critic_weight_decay: float | None = as_online("critic_weight_decay")
    critic_lr_scheduler_type: str | None = as_online("critic_lr_scheduler_type")
    critic_warmup_ratio: float | None = as_online("critic_warmup_ratio")
    critic_recompute: bool | None = as_online("critic_recompute")
    critic_num_layers_unfrozen: int | None = as_online("critic_num_layers_unfrozen")

    temperature: float = as_online("temperature")
    top_p: float = as_online("top_p")
    top_k: int = as_online("top_k")
    repetition_penalty: float = as_online("repetition_penalty")
    min_new_tokens: int = as_online("min_new_tokens")
    max_new_tokens: int | None = as_online("max_new_tokens")
    stop_strings: list[str] | None = as_online("stop_strings")
    use_fusemt: bool = as_online("use_fusemt")
    rollout_batch_size: int = as_online("rollout_batch_size")
    eval_mode: str | None = as_online("eval_mode")
    offload_level: str = as_online("offload_level")
    num_eval_prompts: int | None = as_online("num_eval_prompts")

    apa_anchor: ClassVar[str] = "initial"  # what sampled the answers is unknown
    critic_shares_trunk: ClassVar[bool] = False
    clip_range_value: ClassVar[float] = math.inf  # returns are fixed: there is no old estimate to stay near

    @staticmethod
    def validate(values: dict[str, Any]) -> None:
        """See StageArguments.validate."""
        answered = any(values[name] for name in online.REWARDS)
        metrics = METRICS[values["policy_loss"]] + (online.answer_metrics(values) if answered else ())
        StageArguments.validate(values, metrics)
        online.settle_offload(values)
        values["eval_mode"] = values["eval_mode"] or None
        online.settle_lengths(values)
        online.validate_rewards(values, needed=False)
        online.validate_judge(values)
        if values["judge_model_name_or_path"] and not any(values[name] for name in online.REWARDS):
            raise UsageError(
                '"judge_model_name_or_path" judges answers that a reward scores: set one of '
                f"{', '.join(online.REWARDS)}"
            )
        if values["policy_loss"] == "ilql":
            _validate_ilql(values)


def _validate_ilql(values: dict[str, Any]) -> None:
    betas = values["ilql_decoding_beta"]
    if not betas or len(set(betas)) < len(betas) or not all(0 <= beta < math.inf for beta in betas):
        raise UsageError(f'"ilql_decoding_beta": {betas} must be one or more different finite numbers >= 0')
    if values["eval_mode"] is not None:
        raise UsageError(
            f'"eval_mode": {json.dumps(values["eval_mode"])} does not go with "policy_loss": "ilql", whose heads stay '
            "in the training layout; it must be null"
        )


@dataclass
class ModelArgument(online.ModelArgument):
    """Where the models come from. The reference is the actor's start."""

    @staticmethod
    def validate(values: dict[str, Any]) -> None:
        """Settles which model the critic starts from."""
        names = ("reward_critic_model_name_or_path", "reward_model_name_or_path", "actor_model_name_or_path")
        values[names[0]] = next(values[name] for name in names if values[name])


@dataclass
class DataArgument(DataArguments):
    """Logged answers."""

    max_prompt_len: int | None = argument(
        None,
        "Longest prompt, in tokens, also of held-out prompts that are answered; default: max_length.",
        group="Data",
        ge=1,
        aliases=("max_src_len",),
    )


GROUPS = (ModelArgument, DataArgument, TrainingArguments)
