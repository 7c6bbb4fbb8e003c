"""Arguments of run_update.py."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from alignment.runtime.argument_fields import argument
from alignment.runtime.faults import UsageError
from alignment.training.arguments import DataArguments, ModelArguments, StageArguments

OWN = {  # which arguments have a meaning for which update alone
    "rrhf": ("rrhf_sft_coeff",),
    "dpo": ("dpo_beta", "dpo_loss_type", "dpo_pairs", "label_smoothing"),
}
METRICS = {  # of held-out answers, by policy_update
    "rjs": ("loss", "perplexity"),
    "rrhf": ("loss", "rank_loss", "sft_loss", "accuracy"),
    "dpo": ("loss", "accuracy", "log_ratio"),
}


@dataclass
class TrainingArguments(StageArguments):
    """The update, beside what every stage has. A batch size counts prompts, each with all its answers."""

    policy_update: str = argument(
        "rjs",
        "rjs: learn the best answer (RAFT); rrhf: rank all answers; dpo: pairs against the initial policy.",
        group="Policy update",
        choices=("rjs", "rrhf", "dpo"),
    )
    rrhf_sft_coeff: float = argument(
        1.0, "rrhf: weight of the best answer's cross-entropy beside the ranking.", group="Policy update", ge=0
    )
    dpo_beta: float = argument(
        0.1, "dpo: scale of the implicit reward; the larger, the nearer to the initial policy.",
        group="Policy update",
        gt=0,
    )
    dpo_loss_type: str = argument(
        "sigmoid",
        "dpo: sigmoid: -log sigmoid of the reward margin; ipo: squared distance of the log-ratio margin from "
        "1 / (2 dpo_beta).",
        group="Policy update",
        choices=("sigmoid", "ipo"),
    )
    dpo_pairs: str = argument(
        "best_worst",
        "dpo: compare the best answer with the worst, or all answers with different scores.",
        group="Policy update",
        choices=("best_worst", "all"),
    )
    label_smoothing: float = argument(
        0.0,
        "dpo, sigmoid: share of pairs that are believed to be the wrong way round (conservative DPO).",
        group="Policy update",
        ge=0,
        lt=0.5,
    )

    @staticmethod
    def validate(values: dict[str, Any]) -> None:
        """See StageArguments.validate."""
        update = values["policy_update"]
        StageArguments.validate(values, METRICS[update])
        for owner, names in OWN.items():
            for name in names:
                given, default = values[name], TrainingArguments.__dataclass_fields__[name].default
                if owner != update and given != default:
                    raise UsageError(
                        f'"{name}": {json.dumps(given)} is for "policy_update": "{owner}" and has no meaning for '
                        f'"{update}"; leave it out'
                    )
        if values["label_smoothing"] and values["dpo_loss_type"] == "ipo":
            raise UsageError('"label_smoothing": give it or "dpo_loss_type": "ipo", not both')


GROUPS = (ModelArguments, DataArguments, TrainingArguments)
