"""Checks of the shared arguments' combinations, and defaults that depend on other arguments."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from alignment.parallel.layout import least_processes
from alignment.ppo.models.lora import TARGETS as LORA_TARGETS
from alignment.runtime.faults import UsageError, process_count


def planned_processes(values: Mapping[str, Any]) -> int:
    """Processes of the job; of one that is only rehearsed or printed, and has one, as many as its degrees ask for."""
    started = process_count()
    is_planned = values["dry_run"] or values.get("print_config", False)
    return least_processes(values) if is_planned and started == 1 else started


def settle_lora(values: dict[str, Any]) -> None:
    """Defaults of the adapters. Raises: UsageError for a partial unfreezing beside them."""
    values["lora_alpha"] = values["lora_alpha"] or 2 * values["lora_rank"]
    values["lora_target_modules"] = list(dict.fromkeys(values["lora_target_modules"])) or list(LORA_TARGETS)
    for name in ("num_layers_unfrozen", "critic_num_layers_unfrozen"):
        if values["lora"] and values.get(name) not in (None, -1):
            raise UsageError(f'"{name}": {values[name]} does not go with "lora": true; set it to null')


def validate_evaluation(values: dict[str, Any]) -> None:
    """Raises: UsageError if there is nothing to evaluate on, or no say when."""
    if values["eval_datasets"] and values["eval_split_ratio"]:
        raise UsageError('"eval_split_ratio": give it or "eval_datasets", not both')
    has_data = values["eval_datasets"] or values["eval_split_ratio"]
    strategy = getattr(values["evaluation_strategy"], "value", values["evaluation_strategy"])
    if strategy != "no" and not has_data:
        raise UsageError(
            f'"evaluation_strategy": "{strategy}" needs held-out data: set "eval_datasets" or "eval_split_ratio"'
        )
    if strategy == "steps" and values["eval_steps"] is None:
        raise UsageError('"evaluation_strategy": "steps" needs "eval_steps"')


def settle_best(values: dict[str, Any], metrics: Sequence[str]) -> None:
    """What makes a model the best one. Raises: UsageError if nothing is ever evaluated, or not by this metric.

    Args: metrics: see StageArguments.validate.
    """
    wanted = [name for name in ("load_best_model_at_end", "early_stopping_patience") if values[name]]
    name = values["metric_for_best_model"] or (metrics[0] if wanted else None)
    if name is None:
        return
    if getattr(values["evaluation_strategy"], "value", values["evaluation_strategy"]) == "no":
        key = "metric_for_best_model" if values["metric_for_best_model"] else wanted[0]
        raise UsageError(f'"{key}": needs evaluations to compare; set "evaluation_strategy"')
    values["metric_for_best_model"] = name = name if "/" in name else f"eval/{name.removeprefix('eval_')}"
    known = [f"eval/{metric}" for metric in metrics]
    if name not in known and name.count("/") == 1:  # eval/<data set, reward source or the like>/... is known later
        raise UsageError(
            f'"metric_for_best_model": "{name}" is not among the metrics of an evaluation: {", ".join(known)}'
        )
    if values["greater_is_better"] is None:
        values["greater_is_better"] = not name.endswith("loss")


def refuse_unbuilt(values: Mapping[str, Any], built: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises UsageError for the first argument whose value is not among those that work today."""
    for name, allowed in built.items():
        if values[name] not in allowed:
            works = " or ".join(map(json.dumps, allowed))
            raise UsageError(f'"{name}": {json.dumps(values[name])} is not available yet; what works today is {works}')
