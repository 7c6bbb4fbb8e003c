"""Directories of LoRA adapters in PaddleNLP's form.

Those that PaddleNLP trained are read without executing their pickle and merged into the weights they adapt. Ours
stand in a checkpoint's sub-directory ``adapters``, score head included: resuming reads them, exact as they are, and
so does a run that has the same base in memory. ``lora_config.json`` says which base that is by the SHA-256 of its
weight files.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import paddle
from paddlenlp.peft import LoRAConfig, LoRAModel

from alignment.ppo.models.config import read_json
from alignment.ppo.models.loading import load_policy
from alignment.ppo.models.lora import LoRASettings, adapter_parameters
from alignment.ppo.models.pickled_arrays import read_pickled_arrays
from alignment.ppo.models.placement import merged, names_of_all_layers, own_slice, split_axis
from alignment.ppo.models.weights import AdapterFiles, add_weights, is_writer
from alignment.runtime.faults import UsageError
from alignment.runtime.files import Files
from alignment.runtime.metrics import is_main_process

ADAPTERS = "adapters"
CONFIG_FILE = "lora_config.json"
PICKLED = "lora_model_state.pdparams"
_BASE_HASH = "base_sha256"
_ARGUMENTS = {"rank": "lora_rank", "alpha": "lora_alpha", "targets": "lora_target_modules"}
_UNSUPPORTED = ("pissa", "loraga", "do_qat")  # they change the base weights, which the adapter does not carry


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds LoRA adapters."""
    return (directory / CONFIG_FILE).is_file()


def base_of(directory: Path) -> str | None:
    """The base model that an adapter's lora_config.json names, if it does."""
    return read_json(directory / CONFIG_FILE).get("base_model_name_or_path")


def load_merged_policy(base: str | Path, directory: Path) -> paddle.nn.Layer:
    """The policy ``base`` with the adapters of ``directory`` merged into its weights, float32.

    Raises:
        UsageError: as ``load_policy``; adapters missing, unreadable, of an unsupported kind or for another model.
    """
    fields = read_json(directory / CONFIG_FILE)
    for kind in _UNSUPPORTED:
        if fields.get(kind):
            raise UsageError(f"{directory / CONFIG_FILE}: {kind} adapters cannot be merged")
    config = LoRAConfig.from_pretrained(str(directory))
    config.dtype = "float32"
    adapted = LoRAModel(load_policy(base), config)
    parameters = adapted.model.state_dict()
    tensors = read_adapters(directory)
    wanted = {name for name, parameter in parameters.items() if not parameter.stop_gradient}
    if wanted != tensors.keys():
        name = sorted(wanted ^ tensors.keys())[0]
        raise UsageError(
            f"{directory}: {name} is {'missing' if name in wanted else 'not a weight of the adapted model'}"
        )
    for name, value in tensors.items():
        if list(value.shape) != parameters[name].shape:
            raise UsageError(
                f"{directory}: {name} has shape {list(value.shape)}, {base} needs {parameters[name].shape}"
            )
        parameters[name].set_value(value)
    adapted.merge()
    return adapted.model


def collect_adapters(model: paddle.nn.Layer, files: Files) -> None:
    """Add what an adapted model has beside its base, in ADAPTERS. Every process of the job calls it."""
    weights = {}
    for name, parameter in adapter_parameters(model).items():
        value = merged(parameter.detach(), split_axis(parameter))
        if is_writer():
            weights[_stored_name(name, model)] = value.contiguous().cpu()
    add_weights(weights, files, AdapterFiles, "np", f"{ADAPTERS}/")
    if is_main_process():
        fields = model.lora.config(model.config.dtype).to_dict()
        fields |= {"base_model_name_or_path": str(model.base.directory), _BASE_HASH: model.base.sha256}
        files.add_text(f"{ADAPTERS}/{CONFIG_FILE}", json.dumps(fields, indent=2, sort_keys=True) + "\n")


def read_settings(directory: Path) -> tuple[LoRASettings, str | None]:
    """How the adapters in ``directory`` were made, and the SHA-256 of their base, if it was written down.

    Raises: UsageError without a readable lora_config.json.
    """
    fields = read_json(directory / CONFIG_FILE)
    try:
        targets = tuple(pattern.replace(".*", "") for pattern in fields["target_modules"])
        return LoRASettings(fields["r"], fields["lora_alpha"], targets), fields.get(_BASE_HASH)
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{directory / CONFIG_FILE}: not a configuration of LoRA adapters ({error!r})") from None


def load_adapters(model: paddle.nn.Layer, directory: Path) -> None:
    """Fill A and B of an adapted model from what ``collect_adapters`` gave in whatever layout.

    A score model takes the score head too; where a policy's adapters have none, its own stays as it is.

    Raises: UsageError if names or shapes are others.
    """
    files = AdapterFiles(directory)
    own = {_stored_name(name, model): parameter for name, parameter in adapter_parameters(model).items()}
    heads = {"score_head.weight"} & files.names() if model.base_model_prefix == "trunk" else set()
    own = {name: parameter for name, parameter in own.items() if name in heads or "lora_" in name}
    differing = (names_of_all_layers(own, model.config.num_hidden_layers) | heads) ^ files.names()
    if differing:
        raise UsageError(f"{directory}: {min(differing)} is in the file or in the model, but not in both")
    for name, parameter in own.items():
        value = own_slice(files.read(name), parameter, model.placement)
        if value.shape != parameter.shape:
            raise UsageError(f"{directory}: {name} has shape {value.shape}, the model needs {parameter.shape}")
        parameter.set_value(value.astype(parameter.dtype))


def resume_adapters(model: paddle.nn.Layer, checkpoint: Path) -> None:
    """``load_adapters`` of a checkpoint of the same run.

    Raises: UsageError if that run had none, others, or another base.
    """
    settings, sha256 = read_settings(checkpoint / ADAPTERS)
    for field, argument in _ARGUMENTS.items():
        then, now = getattr(settings, field), getattr(model.lora, field)
        if then != now:
            raise UsageError(f'"{argument}": {now}, but {checkpoint} was trained with {then}')
    if sha256 != model.base.sha256:
        raise UsageError(f"{model.base.directory} is not the model that the adapters in {checkpoint} belong to")
    load_adapters(model, checkpoint / ADAPTERS)


def _stored_name(name: str, model: paddle.nn.Layer) -> str:
    """``trunk.layers.0...`` of a score model -> ``llama.layers.0...``, as in a policy."""
    prefix = f"{model.base_model_prefix}."
    return f"{model.config.model_type}.{name.removeprefix(prefix)}" if name.startswith(prefix) else name


def read_adapters(directory: Path) -> dict[str, np.ndarray]:
    """Name -> float32 array, from ``peft_model.safetensors`` or PaddleNLP's ``lora_model_state.pdparams``."""
    if not (directory / PICKLED).is_file():
        files = AdapterFiles(directory)
        return {name: files.read(name).astype("float32").numpy() for name in files.names()}
    try:
        return {name: _as_float32(value) for name, value in read_pickled_arrays(directory / PICKLED).items()}
    except ValueError as error:
        raise UsageError(f"{directory / PICKLED}: not a readable file of adapter weights ({error})") from None


def _as_float32(value: np.ndarray) -> np.ndarray:
    if value.dtype == np.uint16:  # Paddle's way to store bfloat16
        return (value.astype(np.uint32) << 16).view(np.float32)
    return value.astype(np.float32)
