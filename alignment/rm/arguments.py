"""Arguments of run_reward.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from alignment.ppo.models.pooling import POOLING_TYPES
from alignment.rm.losses import APO_LOSS_TYPES
from alignment.runtime.argument_fields import argument
from alignment.runtime.faults import UsageError
from alignment.training.arguments import DataArguments, ModelArguments, StageArguments

METRICS = (  # of held-out pairs
    *("loss", "accuracy", "margin", "min_reward", "mean_reward", "max_reward", "reward_std"),
    *("ece", "ace", "mce", "ece_one_order", "ace_one_order", "mce_one_order"),
)


@dataclass
class TrainingArguments(StageArguments):
    """The loss, beside what every stage has."""

    loss_type: str = argument(
        "sequence-wise",
        "Compare one score an answer, or the scores at every token from where two answers differ.",
        group="Reward model",
        choices=("sequence-wise", "token-wise"),
    )
    regularization: float = argument(
        0.0, "Coefficient of the mean squared scores, which keeps them near 0.", group="Reward model", ge=0
    )
    rm_kl_coeff: float = argument(
        1.0, "Weight of the ranking loss on pairs that people compared.", group="Reward model", ge=0
    )
    apo_loss_coeff: float = argument(
        0.0,
        'Weight of the loss on APO\'s pairs (type "apo": golden answer over sample); 0: they count as people\'s.',
        group="Reward model",
        ge=0,
    )
    apo_sample_num: int = argument(
        1, "Samples a golden answer is compared with; divides apo_loss_coeff.", group="Reward model", ge=1
    )
    apo_loss_type: str = argument(
        "ranking",
        "Loss on APO's pairs: -log sigmoid(golden - sample), or diff, sample - golden, which has no lower bound.",
        group="Reward model",
        choices=APO_LOSS_TYPES,
    )
    calibrate_scores: bool = argument(
        False,
        "After training fit a temperature to the held-out pairs, by which the saved model divides its scores.",
        group="Reward model",
    )
    sampling_weights: dict[str, Any] | None = argument(
        None,
        'What share of each epoch a data set has, whatever its size: {"name": weight} for each of train_datasets.',
        group="Data",
    )

    @staticmethod
    def validate(values: dict[str, Any]) -> None:
        """See StageArguments.validate."""
        StageArguments.validate(values, METRICS)
        if values["loss_type"] == "token-wise" and values["pooling_type"] != "eos":
            raise UsageError(
                f'"pooling_type": "{values["pooling_type"]}" gives one score an answer; "loss_type": "token-wise" '
                'compares one a token and needs "eos"'
            )
        if values["sep_token"] is not None and not values["add_sep_token"]:
            raise UsageError(f'"sep_token": {values["sep_token"]!r} needs "add_sep_token": true')
        if values["rm_kl_coeff"] == values["apo_loss_coeff"] == 0:
            raise UsageError('"rm_kl_coeff": 0 with "apo_loss_coeff": 0 leaves nothing to learn; one must be above 0')
        if values["calibrate_scores"] and not (values["eval_datasets"] or values["eval_split_ratio"]):
            raise UsageError('"calibrate_scores": true needs held-out data: "eval_datasets" or "eval_split_ratio"')
        if values["calibrate_scores"] and values["load_best_model_at_end"]:
            raise UsageError(
                '"calibrate_scores": true changes the last checkpoint, "load_best_model_at_end": true means another; '
                "set one of them to false"
            )


@dataclass
class ModelArgument(ModelArguments):
    """The reward model's start, how it reads an answer, and its score normaliser."""

    pooling_type: str = argument(
        "eos",
        "What the score is made of: the last token's state, the last's before the end-of-text token (last), or the "
        "average or maximum over all tokens.",
        group="Reward model",
        choices=POOLING_TYPES,
    )
    add_sep_token: bool = argument(False, "Put a separator token between prompt and answer.", group="Reward model")
    sep_token: str | None = argument(
        None,
        "The separator, a token of the vocabulary; default: the tokenizer's sep_token, or its end-of-text token.",
        group="Reward model",
    )
    normalize_score_during_training: bool = argument(
        False, "Normalise scores before the loss, by running statistics.", group="Reward model"
    )
    normalizer_type: str = argument(
        "ExponentialMovingAverage",
        "Running statistics of the scores: over everything seen, or with exponential forgetting.",
        group="Reward model",
        choices=("RunningMeanStd", "ExponentialMovingAverage"),
    )
    normalizer_momentum: float = argument(
        0.1,
        "Weight of the newest batch: new = momentum * batch + (1 - momentum) * old. "
        "(PaddleNLP's code did the opposite of its help: its 0.9 is 0.1 here.)",
        group="Reward model",
        gt=0,
        le=1,
    )


GROUPS = (ModelArgument, DataArguments, TrainingArguments)
