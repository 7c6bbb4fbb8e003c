"""How a job's processes share one model and its data, checked before anything is loaded.

N processes = data x pipeline x sharding x tensor degrees. A process keeps 1 / tensor of each large matrix and 1 /
pipeline of the layers; sharding splits the optimizer (stage 1), gradients (2) and parameters (3) of processes that
otherwise hold the same weights; data and sharding processes work on different samples.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from alignment.runtime.faults import UsageError

STAGES = {"": 0, "stage1": 1, "stage2": 2, "stage3": 3}
SHARDING_DEGREES = ("sharding_parallel_degree", "sharding_degree")


@dataclass(frozen=True)
class Layout:
    """Degrees of each kind of parallelism; sharding_stage 0 means that nothing is sharded."""

    data: int = 1
    pipeline: int = 1
    sharding: int = 1
    tensor: int = 1
    sharding_stage: int = 0
    sequence_parallel: bool = False

    def __str__(self) -> str:
        degrees = f"data {self.data} x pipeline {self.pipeline} x sharding {self.sharding} x tensor {self.tensor}"
        stage = f", sharding stage {self.sharding_stage}" if self.sharding_stage else ""
        return degrees + stage + ", sequence parallel" * self.sequence_parallel

    @property
    def processes(self) -> int:
        """How many processes the layout takes."""
        return self.data * self.pipeline * self.sharding * self.tensor


def resolve_layout(values: Mapping[str, Any], processes: int) -> Layout:
    """The layout that the arguments ask for: data parallelism takes the processes that the other degrees leave.

    Args: values: tensor_parallel_degree, pipeline_parallel_degree, sharding_parallel_degree (or sharding_degree),
        sharding and sequence_parallel, as in PaddleNLP; -1 means 1, or all that is left if ``sharding`` is set.
    Raises: UsageError that says what would work.
    """
    tensor, pipeline = (_degree(values, f"{kind}_parallel_degree") for kind in ("tensor", "pipeline"))
    model = tensor * pipeline
    if processes % model:
        raise UsageError(
            f'"tensor_parallel_degree" {tensor} * "pipeline_parallel_degree" {pipeline} = {model} must divide the '
            f"job's processes, of which there are {processes}; start a multiple of {model} or change a degree"
        )
    left = processes // model
    stage, sharding = _resolve_sharding(values, left)
    if stage >= 2 and pipeline > 1:
        raise UsageError(
            f'"sharding": "stage{stage}" does not go with "pipeline_parallel_degree": {pipeline}; use "stage1"'
        )
    if values["sequence_parallel"] and tensor == 1:
        raise UsageError('"sequence_parallel": true needs "tensor_parallel_degree" of at least 2; set it to false')
    return Layout(left // sharding, pipeline, sharding, tensor, stage, bool(values["sequence_parallel"]))


def least_processes(values: Mapping[str, Any]) -> int:
    """How many processes the degrees of ``resolve_layout``'s arguments ask for at least."""
    tensor, pipeline = (_degree(values, f"{kind}_parallel_degree") for kind in ("tensor", "pipeline"))
    sharding = max(_degree(values, name) for name in SHARDING_DEGREES)
    return tensor * pipeline * sharding


def _degree(values: Mapping[str, Any], name: str) -> int:
    if values[name] < 1 and values[name] != -1:
        raise UsageError(f'"{name}": {values[name]} must be at least 1, or -1 for the default')
    return max(1, values[name])


def _resolve_sharding(values: Mapping[str, Any], left: int) -> tuple[int, int]:
    """(stage, degree) of sharding over the ``left`` processes that hold the same part of the model."""
    wanted = " ".join(values["sharding"].split())
    if wanted not in STAGES:
        raise UsageError(f'"sharding": "{wanted}" must be one of {", ".join(map(json.dumps, STAGES))}')
    is_given = any(values[name] != -1 for name in SHARDING_DEGREES)
    degree = max(_degree(values, name) for name in SHARDING_DEGREES) if is_given else -1
    if degree > 1 and not wanted:
        raise UsageError(f'"sharding_parallel_degree": {degree} needs "sharding": "stage1" (or stage2, stage3)')
    if not wanted:
        return 0, 1
    degree = left if degree < 1 else degree
    if left % degree:
        raise UsageError(
            f'"sharding_parallel_degree": {degree} must divide the {left} processes that the tensor and pipeline '
            "degrees leave"
        )
    return (STAGES[wanted], degree) if degree > 1 else (0, 1)


def check_model(config: Any, tensor: int, stages: int) -> None:
    """Raises UsageError if a model's heads or layers cannot be divided so; config: its PaddleNLP configuration."""
    names = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    for name in names:
        size = getattr(config, name)
        if size % tensor:
            fitting = [d for d in range(1, size + 1) if all(getattr(config, other) % d == 0 for other in names)]
            raise UsageError(
                f'"tensor_parallel_degree": {tensor} does not divide the model\'s {name} = {size}; '
                f"what does: {', '.join(map(str, fitting))}"
            )
    if stages > config.num_hidden_layers:
        raise UsageError(
            f'"pipeline_parallel_degree": {stages} is more than the model\'s {config.num_hidden_layers} layers'
        )


def layers_of_stage(layers: int, stages: int, stage: int) -> range:
    """The consecutive layers of a pipeline stage; where they do not divide evenly, the middle stages take more.

    The first stage also embeds and the last also has the head, which costs as much as some layers.
    """
    each, rest = divmod(layers, stages)
    first_to_grow = (stages - rest) // 2
    sizes = [each + (first_to_grow <= i < first_to_grow + rest) for i in range(stages)]
    return range(sum(sizes[:stage]), sum(sizes[: stage + 1]))
