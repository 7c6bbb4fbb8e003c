"""A model directory's config.json: what of it PaddleNLP's layers compute faithfully, and what must be refused."""

from __future__ import annotations

from pathlib import Path

from paddlenlp.transformers import LlamaConfig, PretrainedConfig, Qwen2Config

from alignment.ppo.models.pooling import POOLING_TYPES
from alignment.runtime.faults import UsageError
from data.errors import DataError
from data.limits import parse_json, read_text

FAMILIES = {"llama": LlamaConfig, "qwen2": Qwen2Config}
SCORE_ARCHITECTURE = {"llama": "LlamaForScore", "qwen2": "Qwen2ForScore"}
CAUSAL_ARCHITECTURE = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}

# Fields that both PaddleNLP and transformers read, in the order they are written.
_SAVED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "hidden_act",
    "initializer_range",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
LONGEST = 1 << 24  # positions; tables of all of them are made
_KERNELS = (
    "use_flash_attention",
    "use_flash_attention_for_generation",
    "use_fused_rms_norm",
    "use_fused_rope",
    "use_fused_linear",
    "use_fused_linear_cross_entropy",
    "use_fused_dropout_add",
    "fuse_attention_qkv",
    "fuse_attention_ffn",
)


def read_config(directory: Path) -> PretrainedConfig:
    """PaddleNLP's configuration for a Llama or Qwen2 model, written by PaddleNLP or by transformers.

    Fused kernels named in the file are switched off: they exist on GPUs only and change the names of weights.

    Raises:
        UsageError: no readable config.json, or a model that PaddleNLP would load but compute differently.
    """
    fields = read_json(directory / "config.json")
    family = fields.get("model_type")
    if family not in FAMILIES:
        raise UsageError(f"{directory / 'config.json'}: model_type {family!r} is not one of {', '.join(FAMILIES)}")
    normalise_rope(fields)
    check_supported(fields, directory / "config.json")
    config = FAMILIES[family].from_dict(fields)
    for kernel in _KERNELS:
        setattr(config, kernel, False)
    return config


def read_json(path: Path) -> dict:
    """A JSON object, or a UsageError that names the file."""
    try:
        content = parse_json(read_text(path))
    except FileNotFoundError:
        raise UsageError(f"{path.parent}: no {path.name}") from None
    except DataError as error:
        raise UsageError(str(error)) from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path}: must hold a JSON object")
    return content


def normalise_rope(fields: dict) -> None:
    """Bring the rotary settings of transformers 4 and 5 into the one form PaddleNLP reads."""
    parameters = fields.pop("rope_parameters", None)  # transformers 5
    if parameters:
        fields["rope_theta"] = parameters["rope_theta"]
        fields["rope_scaling"] = None if parameters.get("rope_type", "default") == "default" else parameters
    scaling = fields.get("rope_scaling")
    if scaling and "rope_type" not in scaling:
        scaling["rope_type"] = scaling.get("type")


def check_supported(fields: dict, path: Path) -> None:
    """Refuse a config without sizes, and settings that PaddleNLP ignores, with the setting's name and value."""
    family = fields["model_type"]
    for name in _SIZES:
        if not isinstance(fields.get(name), int) or fields[name] < 1:
            raise UsageError(f"{path}: {name} = {fields.get(name)!r} must be an integer of at least 1")
    positions = fields.get("max_position_embeddings", 1)
    if not isinstance(positions, int) or not 1 <= positions <= LONGEST:
        raise UsageError(f"{path}: max_position_embeddings = {positions!r} must be an integer from 1 to {LONGEST}")
    allowed = {
        "rope_scaling": (None, "llama3") if family == "llama" else (None,),
        "head_dim": (None, fields["hidden_size"] // fields["num_attention_heads"]),
        "hidden_act": (None, "silu"),
        "attention_dropout": (None, 0),  # only kernels on GPUs have it, with a random state of their own
        "use_sliding_window": (None, False),
        "attention_bias": (None, False),
        "mlp_bias": (None, False),
        "pooling_type": (None, *POOLING_TYPES),  # of a reward model
    }
    for name, values in allowed.items():
        value = fields.get(name)
        kind = value.get("rope_type") if isinstance(value, dict) else value
        if kind not in values:
            raise UsageError(f"{path}: {name} = {kind!r} is not supported for {family} models")


def config_fields(config: PretrainedConfig, architecture: str, dtype: str) -> dict:
    """Content of a config.json that PaddleNLP and transformers both read."""
    fields = {"architectures": [architecture], "model_type": config.model_type, "torch_dtype": dtype}
    for name in _SAVED:
        value = getattr(config, name, None)
        if value is not None:
            fields[name] = value
    fields.setdefault("hidden_act", "silu")
    return fields
