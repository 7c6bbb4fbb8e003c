"""Arguments of run_apo.py. Importing this loads no Paddle."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.runtime.argument_fields import argument
from alignment.runtime.arguments import read_json_object
from alignment.runtime.faults import UsageError
from data import RawDataset, load_dataset_modules, parse_specs

STAGES = ("sample", "evaluation", "score", "reward", "testing_reward", "policy")
PAIRS = ("preference_datasets", "testing_reward_datasets", "eval_datasets")
QUERIES = ("golden_datasets", "policy_datasets")


@dataclass(kw_only=True)
class RoundArguments:
    """Of the game between reward model and policy (arXiv:2311.08045)."""

    rounds: int = argument(3, "How often both are updated.", group="Game", ge=1)
    adversarial: bool = argument(
        True,
        "Reward models also learn to tell golden answers from the policy's; false: the same game without.",
        group="Game",
    )
    policy_update: str = argument(
        "rjs", "How the policy learns from scored answers; see run_update.py.", group="Game",
        choices=("rjs", "rrhf", "dpo"),
    )  # fmt: skip
    reward_restart: str = argument(
        "base",
        "What each round's reward model starts from: reward_model_base, or the round's before (the paper's seq).",
        group="Game",
        choices=("base", "continue"),
    )
    policy_restart: str = argument(
        "continue",
        "What each round's update starts from: the policy whose answers were scored, or the initial one.",
        group="Game",
        choices=("continue", "initial"),
    )
    num_return_sequences: int = argument(4, "Answers to each prompt, golden or policy's.", group="Game", ge=1)
    min_margin: float = argument(
        0.0, "Prompts whose best and worst answers' scores differ by less are left out.", group="Game", ge=0
    )
    seed: int = argument(42, "Of every step; answers are drawn anew in each.", group="Game", ge=0, lt=2**32)
    data_seed: int | None = argument(
        None, "Of the order of the data, and of what a proportion takes; default: seed.", group="Game", ge=0, lt=2**32
    )
    model_name_or_path: str = argument(
        "smollm2-135m-instruct", "Policy to start from: local directory, hub name, or embedded.", group="Model"
    )
    reward_model_base: str | None = argument(
        None, "What reward models start from; default: model_name_or_path.", group="Model"
    )
    testing_reward_model_name_or_path: str | None = argument(
        None, "Reward model to evaluate by, instead of one trained on testing_reward_datasets.", group="Model"
    )
    preference_datasets: str = argument(
        "", "People's pairs for each round's reward model (required): name[:proportion[:path]], ...", group="Data"
    )
    golden_datasets: str | None = argument(
        None,
        "Prompts with golden answers: data sets whose better answers stand in for them, or a file of golden answers "
        "with their queries.",
        group="Data",
    )
    golden_query_file: str | None = argument(
        None, "File with the queries of golden answers that stand in that file without theirs.", group="Data"
    )
    policy_datasets: str = argument(
        "", "Prompts to update the policy on (required): data sets, or a file of queries.", group="Data"
    )
    eval_datasets: str = argument(
        "", "Held-out pairs (required): reward models are measured on them, policies on their prompts.", group="Data"
    )
    testing_reward_datasets: str | None = argument(
        None, "Pairs to train the testing reward model on: all that there are.", group="Data"
    )
    dataset_modules: list[str] = argument(
        list, "Modules or .py files imported first, so that data sets in them register.", group="Data"
    )
    prompt_template: str = argument("chat", "Of every step; see run_reward.py.", group="Data")
    reward_learning_rates: list[float] | None = argument(
        None, "Of the reward model, one a round; the last repeats. Default: that of reward_arguments.", group="Steps"
    )
    policy_learning_rates: list[float] | None = argument(
        None, "Of the policy, one a round; the last repeats. Default: that of policy_arguments.", group="Steps"
    )
    sample_arguments: str | dict[str, Any] | None = argument(
        None,
        "Arguments of run_sample.py, an object or a JSON file; keys that the game sets are replaced (so in all of "
        "these).",
        group="Steps",
    )
    evaluation_arguments: str | dict[str, Any] | None = argument(
        None, "What differs from sample_arguments in an evaluation, where one answer is drawn.", group="Steps"
    )
    score_arguments: str | dict[str, Any] | None = argument(None, "Arguments of run_score.py.", group="Steps")
    reward_arguments: str | dict[str, Any] | None = argument(
        None, "Arguments of run_reward.py. In an adversarial game apo_loss_coeff is 0.1 by default.", group="Steps"
    )
    testing_reward_arguments: str | dict[str, Any] | None = argument(
        None, "What differs from reward_arguments, less those of APO's loss, for the testing model.", group="Steps"
    )
    policy_arguments: str | dict[str, Any] | None = argument(None, "Arguments of run_update.py.", group="Steps")
    nproc_per_node: int = argument(
        1, "Processes of each step that runs a model; more than 1: under Paddle's launcher.", group="Steps", ge=1
    )
    device: str = argument(
        "auto", "Where to compute; auto takes the GPU if there is one.", group="Steps", choices=("auto", "cpu", "gpu")
    )
    output_dir: str = argument("", "Directory of all steps' outputs and of the report.", group="Output")
    overwrite_output_dir: bool = argument(
        False, "Do steps again that were begun with other arguments, and all after them.", group="Output"
    )
    dry_run: bool = argument(
        False, "Check all arguments, show the commands, and dry-run the kinds of training. Writes nothing.",
        group="Output",
    )  # fmt: skip

    @staticmethod
    def validate(values: dict[str, Any]) -> None:
        """Checks combinations and names of data sets, reads the steps' argument files, settles defaults."""
        _require(values, "preference_datasets", "policy_datasets", "eval_datasets", "output_dir")
        if values["adversarial"]:
            _require(values, "golden_datasets")
        if values["golden_query_file"] and not (values["golden_datasets"] and is_file(values["golden_datasets"])):
            raise UsageError(f'"golden_query_file": {values["golden_query_file"]} needs a file as "golden_datasets"')
        if bool(values["testing_reward_datasets"]) == bool(values["testing_reward_model_name_or_path"]):
            raise UsageError(
                'give either "testing_reward_datasets", to train the testing reward model on, or '
                '"testing_reward_model_name_or_path"'
            )
        if "," in values["output_dir"]:
            raise UsageError(f'"output_dir": {values["output_dir"]} must have no comma: it becomes part of data paths')
        _check_data(values)
        for name in ("reward_learning_rates", "policy_learning_rates"):
            rates = values[name]
            if rates is not None and not (rates and all(0 < rate < math.inf for rate in rates)):
                raise UsageError(f'"{name}": {rates} is not allowed; it must be a list of numbers > 0')
        for stage in STAGES:
            given = values[f"{stage}_arguments"]
            values[f"{stage}_arguments"] = read_json_object(given) if isinstance(given, str) else given or {}
        values["data_seed"] = values["seed"] if values["data_seed"] is None else values["data_seed"]
        values["reward_model_base"] = values["reward_model_base"] or values["model_name_or_path"]


def is_file(source: str) -> bool:
    """Whether prompts come from a file of APO's and not from registered data sets."""
    return Path(source).is_file() or (source.endswith((".json", ".jsonl")) and ":" not in source)


def _require(values: dict[str, Any], *names: str) -> None:
    for name in names:
        if not values[name]:
            raise UsageError(f'"{name}": required')


def _check_data(values: dict[str, Any]) -> None:
    load_dataset_modules(values["dataset_modules"])
    for name in (*PAIRS, *QUERIES):
        source = values[name]
        if not source:
            continue
        if name in QUERIES and is_file(source):
            if not Path(source).is_file():
                raise UsageError(f'"{name}": {source}: no such file')
            continue
        for spec in parse_specs(source):
            RawDataset.find(spec.dataset)
