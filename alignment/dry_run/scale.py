"""A run's arguments, as its dry run takes them: one step, few rows, short texts, and the launched layout."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from alignment.dry_run.models import LAYERS
from alignment.parallel.layout import Layout

# Each becomes at most this; those that a stage does not have are left out.
MOST = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "per_device_eval_batch_size": 2,
    "num_return_sequences": 2,
    "rollout_batch_size": 4,
    "num_eval_prompts": 2,
    "update_iters": 2,
    "max_new_tokens": 8,
    "min_new_tokens": 8,
}
LENGTHS = {"max_length": 128, "max_prompt_len": 64}  # room for the embedded tokenizer's system message
_ONE_STEP = {"max_steps": 1, "total_episodes": None}
_AFRESH = {"resume_from_checkpoint": None, "overwrite_output_dir": False}
_ALONE = {
    "tensor_parallel_degree": -1,
    "pipeline_parallel_degree": -1,
    "sharding": "",
    "sharding_parallel_degree": -1,
    "sharding_degree": -1,
    "sequence_parallel": False,
}


def without_parallelism(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same run on one process."""
    return {**values, **_ALONE}


def scale_down(values: Mapping[str, Any], layout: Layout, own_tokenizer: bool) -> dict[str, Any]:
    """The arguments of the one small step.

    Args:
        values: all arguments of the stage by name, checked, with what their ``validate`` settled.
        layout: of the processes that take the step.
        own_tokenizer: the run's own counts the tokens; another may need more room for the same texts.
    """
    layers = max(LAYERS, layout.pipeline)
    limits = MOST | LENGTHS | {"num_layers_unfrozen": layers - 1, "critic_num_layers_unfrozen": layers - 1}
    small = dict(values)
    for name, most in limits.items():
        if small.get(name) is not None:
            small[name] = most if name in LENGTHS and not own_tokenizer else min(small[name], most)
    for changes in (_ONE_STEP, _AFRESH):
        small |= {name: value for name, value in changes.items() if name in small}
    if not own_tokenizer and small.get("sep_token"):
        small["sep_token"] = None  # a token of the run's own tokenizer
    if small["truncation"] == "error":  # the texts were made for longer limits
        small["truncation"] = "prompt"
    if "per_device_prompt_batch_size" in small:
        small["per_device_prompt_batch_size"] = _prompts(small)
        _keep_budget(small, layout)
    return small


def _prompts(small: Mapping[str, Any]) -> int:
    """Two, or one where the run has one, or as many more as the minibatches of an optimizer step need."""
    minibatch = small["per_device_train_batch_size"] * small["gradient_accumulation_steps"]
    step = minibatch // math.gcd(minibatch, small["num_return_sequences"])
    wanted = min(small["per_device_prompt_batch_size"], 2)
    return -(-wanted // step) * step


def _keep_budget(small: dict[str, Any], layout: Layout) -> None:
    """A token budget holds at least a token for each answer of the iteration."""
    if small.get("rollout_token_budget") is not None:
        prompts = small["per_device_prompt_batch_size"] * layout.data * layout.sharding
        small["rollout_token_budget"] = max(small["rollout_token_budget"], prompts * small["num_return_sequences"])
