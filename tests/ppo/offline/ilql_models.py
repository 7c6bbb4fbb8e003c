"""A tiny policy whose ILQL heads are random, every layer of them, and the same computed in NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import paddle

from alignment.ppo.models.loading import load_policy
from alignment.ppo.offline.ilql_model import add_heads
from tests.models.reference import hidden_states, make_config, random_weights, write_checkpoint


def write_policy(directory: Path, family: str = "llama", tied: bool = True, **changes) -> tuple[dict, dict]:
    """Configuration and weights of what is written."""
    config = make_config(family, tied, **changes)
    weights = random_weights(config)
    write_checkpoint(directory, config, weights)
    return config, weights


def load_with_heads(directory: Path, seed: int = 7, size: float = 0.3) -> paddle.nn.Layer:
    policy = load_policy(directory)
    add_heads(policy, seed)
    fill(policy.ilql_heads, seed, size)
    return policy


def fill(heads: paddle.nn.Layer, seed: int, size: float) -> None:
    random = np.random.default_rng(seed)
    for parameter in heads.parameters():
        parameter.set_value(random.normal(0, size, parameter.shape).astype(np.float32))


def head_output(head: paddle.nn.Layer, states: np.ndarray) -> np.ndarray:
    """float64 [n, columns]."""
    w = {name: parameter.numpy().astype(np.float64) for name, parameter in head.named_parameters()}
    inner = np.maximum(states @ w["inner.weight"] + w["inner.bias"], 0)
    return inner @ w["outer.weight"] + w["outer.bias"]


def q_values(policy: paddle.nn.Layer, weights: dict, config: dict, ids) -> tuple[list, list, np.ndarray]:
    """Both Q and both targets, each [L, V], and V [L] after every token of ids."""
    states, heads = hidden_states(weights, config, ids), policy.ilql_heads
    both = ([head_output(head, states) for head in part] for part in (heads.q, heads.target_q))
    return (*both, head_output(heads.v, states)[:, 0])
