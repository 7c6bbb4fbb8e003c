"""How N processes divide a model and its data; private to the plan until it shares the run's own module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from alignment.runtime.faults import UsageError

STAGES = {"": 0, "stage1": 1, "stage2": 2, "stage3": 3}


@dataclass(frozen=True)
class Layout:
    """Degrees of each kind of parallelism, and the ZeRO stage (0: nothing is sharded)."""

    data: int = 1
    pipeline: int = 1
    sharding: int = 1
    tensor: int = 1
    sharding_stage: int = 0
    sequence_parallel: bool = False


def resolve_layout(values: Mapping[str, Any], processes: int) -> Layout:
    """The layout that PaddleNLP's arguments ask for; data parallelism takes what the other degrees leave.

    Raises: UsageError where degrees and processes do not go together.
    """
    tensor, pipeline = (max(1, values[f"{kind}_parallel_degree"]) for kind in ("tensor", "pipeline"))
    left, rest = divmod(processes, tensor * pipeline)
    if rest:
        raise UsageError(
            f'"tensor_parallel_degree" {tensor} * "pipeline_parallel_degree" {pipeline} must divide the {processes} '
            "processes"
        )
    stage = STAGES[values["sharding"]]
    degree = max(values["sharding_parallel_degree"], values["sharding_degree"])
    if degree > 1 and not stage:
        raise UsageError(f'"sharding_parallel_degree": {degree} needs "sharding": "stage1" (or stage2, stage3)')
    sharding = 1 if not stage else degree if degree > 0 else left
    if left % sharding:
        raise UsageError(f'"sharding_parallel_degree": {sharding} must divide the {left} processes that are left')
    if sharding == 1:
        stage = 0
    if stage >= 2 and pipeline > 1:
        raise UsageError(f'"sharding": "stage{stage}" does not go with "pipeline_parallel_degree" {pipeline}')
    if values["sequence_parallel"] and tensor == 1:
        raise UsageError('"sequence_parallel": true needs "tensor_parallel_degree" of at least 2')
    return Layout(left // sharding, pipeline, sharding, tensor, stage, values["sequence_parallel"])


def check_model(config: Any, tensor: int, stages: int) -> None:
    """Raises UsageError if a model's heads or layers cannot be divided so."""
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        size = getattr(config, name)
        if size % tensor:
            raise UsageError(f'"tensor_parallel_degree": {tensor} does not divide the model\'s {name} = {size}')
    if stages > config.num_hidden_layers:
        layers = config.num_hidden_layers
        raise UsageError(f'"pipeline_parallel_degree": {stages} is more than the model\'s {layers} layers')


def layers_of_stage(total: int, stages: int, stage: int) -> range:
    """Consecutive layers, as even as possible; the earlier stages take the remainder."""
    each, rest = divmod(total, stages)
    start = stage * each + min(stage, rest)
    return range(start, start + each + (stage < rest))
