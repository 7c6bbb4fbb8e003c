"""The plan of the run itself: at its full size, on as many devices as it asks for."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import paddle

from alignment.dry_run.models import Original
from alignment.parallel.plan import Plan, Sizes, find_shapes, plan
from alignment.parallel.plan.arguments import RAGGED, Options
from alignment.parallel.plan.planning import GB
from alignment.runtime.faults import process_count
from alignment.training.argument_checks import planned_processes


def plan_run(stage: str, values: Mapping[str, Any], originals: Sequence[Original]) -> Plan | str:
    """The plan, or why there is none.

    Args: values: the run's arguments, as they were given; originals: its models, the policy first.
    Raises: UsageError if models and layout do not go together.
    """
    sizes = Sizes.of({**values, "lora": False})
    if sizes.sequences(stage) is None:
        return f"memory is not planned: {RAGGED}"
    policy = originals[0]
    if not policy.is_here and not values["model_config"]:
        return (
            f'memory is not planned: no config.json of "{policy.key}": {policy.name} on this machine; '
            'name one of its shape by "model_config"'
        )
    reward = next((str(model.config) for model in originals if model.key == "reward_model_name_or_path"), None)
    shapes = find_shapes(stage, sizes, str(policy.config), reward)
    processes = planned_processes(values)
    return plan(stage, sizes, shapes, processes, device_memory_gb(values, processes))


def device_memory_gb(values: Mapping[str, Any], processes: int) -> float:
    """Memory of this GPU; without one that of this machine, shared by its processes, if the run is for CPUs.

    A run that needs 16 bits, or more processes than were started, is for other devices: the plan's default then.
    """
    if paddle.get_device() != "cpu":
        return paddle.device.cuda.get_device_properties().total_memory / GB
    if values["bf16"] or processes > process_count():
        return Options.device_memory_gb
    here = int(os.environ.get("PADDLE_LOCAL_SIZE") or 1)
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GB / here, 1)
