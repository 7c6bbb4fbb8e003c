"""The models of a dry run: of the same kind as the run's, small and random."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paddle

from alignment.parallel.collectives import barrier
from alignment.parallel.layout import Layout
from alignment.parallel.plan.shapes import CONFIG_FILE, locate_config, read_shape
from alignment.parallel.topology import topology
from alignment.ppo.models.config import SCORE_ARCHITECTURE, read_config
from alignment.ppo.models.default import DEFAULT_MODEL_ALIASES
from alignment.ppo.models.loading import build_policy, resolve_model_directory, stored_architecture
from alignment.ppo.models.placement import Placement
from alignment.ppo.models.saving import save_model
from alignment.ppo.models.tokenizer import Tokenizer, load_tokenizer
from alignment.ppo.models.value import build_score_model
from alignment.ppo.models.weights import WeightFiles
from alignment.runtime.arguments import read_json_object
from alignment.runtime.metrics import is_main_process
from alignment.training.setup import load_named

LAYERS = 2  # at least; one for each pipeline stage where that is more
HEAD_SIZE = 16
_DEVIATION = 0.02
_KEY = "model_name_or_path"  # how the names of arguments end that name a model
_REWARD = "reward_model_name_or_path"
_POLICIES = ("actor_model_name_or_path", "model_name_or_path")
_CONFIGS = {_REWARD: "reward_model_config"}  # which argument stands for the shape; otherwise model_config


@dataclass(frozen=True)
class Original:
    """What is known of a model that the run names.

    key, name: the argument and its value; config: its config.json; tokenizer: its directory; scores: it has a score
    head; is_here: config and tokenizer are its own, not what stands in for them.
    """

    key: str
    name: str
    config: Path
    tokenizer: Path
    scores: bool
    is_here: bool


def find_models(values: Mapping[str, Any]) -> tuple[list[Original], list[str]]:
    """The models that the arguments name, each once, the policy first; and a line for each that is not here.

    Nothing is downloaded. Raises: UsageError, naming the argument, for a directory that cannot be read.
    """
    named = sorted((key for key in values if key.endswith(_KEY) and values[key]), key=lambda key: key not in _POLICIES)
    found: dict[str, Original] = {}
    notes = []
    for key in named:
        name = values[key]
        if name in found:
            continue
        if name in DEFAULT_MODEL_ALIASES or Path(name).expanduser().exists():
            found[name] = load_named(key, _describe, key, name)
            continue
        policy = next(iter(found.values()), None)
        found[name] = _substitute(key, values, policy)
        notes.append(
            f"{key}: {name} is not on this machine; the shape is {found[name].config.parent.name}'s, "
            f"the tokenizer {found[name].tokenizer.name}'s"
        )
    return list(found.values()), notes


def _describe(key: str, name: str) -> Original:
    directory = resolve_model_directory(name)
    config = read_config(directory)
    WeightFiles(directory).names()
    scores = stored_architecture(directory) == SCORE_ARCHITECTURE[config.model_type]
    return Original(key, name, directory / CONFIG_FILE, directory, scores, True)


def _substitute(key: str, values: Mapping[str, Any], policy: Original | None) -> Original:
    """By the argument that gives a shape; else shaped as the policy, and the policy itself as the embedded model."""
    default = resolve_model_directory(DEFAULT_MODEL_ALIASES[0]) if policy is None else policy.tokenizer
    given = values.get(_CONFIGS.get(key, "model_config"))
    config = policy.config if policy else default / CONFIG_FILE
    if given:
        load_named(_CONFIGS.get(key, "model_config"), read_shape, given)
        config = locate_config(given)
    return Original(key, values[key], config, default, key == _REWARD, False)


def write_small_models(originals: list[Original], directory: Path) -> dict[str, str]:
    """Write a small model for each; returns {name: its directory}. Every process calls it and sees ``directory``."""
    written = {}
    for number, original in enumerate(originals):
        target = directory / f"{number}-{original.key}"
        write_small_model(original, target)
        written[original.name] = str(target)
    barrier()
    return written


def write_small_model(original: Original, directory: Path) -> None:
    """A random model with the original's tokenizer, the parts of the layout's processes put together."""
    tokenizer, layout = load_tokenizer(original.tokenizer), topology().layout
    if is_main_process():
        directory.mkdir(parents=True)
        fields = small_fields(original.config, tokenizer, layout)
        (directory / CONFIG_FILE).write_text(json.dumps(fields))
    barrier()
    config, here = read_config(directory), Placement.here()
    if original.scores:
        model = build_score_model(config, "reward", "float32", placement=here)
    else:
        model = build_policy(config, "float32", False, here)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.set_value(paddle.normal(0.0, _DEVIATION, parameter.shape))
        elif name.endswith("norm.weight"):
            parameter.set_value(paddle.ones_like(parameter))
    barrier()  # the file just read is written anew
    save_model(model, tokenizer, directory)


def small_fields(config: Path, tokenizer: Tokenizer, layout: Layout) -> dict[str, Any]:
    """A config.json of the same family, rope, ties and heads for each key/value head, which the layout divides.

    Args: config: the original's config.json; tokenizer: whose tokens the model must hold.
    """
    shape = read_shape(config)
    heads = shape.num_attention_heads // shape.num_key_value_heads * layout.tensor
    hidden = heads * HEAD_SIZE
    sizes = {
        "vocab_size": 1 + max(tokenizer.get_vocab().values()),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": max(LAYERS, layout.pipeline),
        "num_attention_heads": heads,
        "num_key_value_heads": layout.tensor,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    kept = {name: value for name, value in read_json_object(config).items() if name != "head_dim"}
    return kept | sizes
