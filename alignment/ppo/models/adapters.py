"""LoRA adapters that PaddleNLP trained: read without executing a pickle, merged into the weights they adapt."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import paddle
from paddlenlp.peft import LoRAConfig, LoRAModel

from alignment.ppo.models.config import read_json
from alignment.ppo.models.loading import load_policy
from alignment.ppo.models.weights import AdapterFiles
from alignment.runtime.faults import UsageError

CONFIG_FILE = "lora_config.json"
PICKLED = "lora_model_state.pdparams"
_ADAPTER_PARTS = (".lora_A", ".lora_B", ".lora_AB")
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


def is_adapter_part(name: str) -> bool:
    """Whether a parameter of a merged model belongs to an adapter, so that a plain model has none of that name."""
    return name.endswith(_ADAPTER_PARTS)


def read_adapters(directory: Path) -> dict[str, np.ndarray]:
    """Name -> float32 array, from ``peft_model.safetensors`` or PaddleNLP's ``lora_model_state.pdparams``."""
    if not (directory / PICKLED).is_file():
        files = AdapterFiles(directory)
        return {name: files.read(name).astype("float32").numpy() for name in files.names()}
    try:
        with open(directory / PICKLED, "rb") as file:
            content = _ArrayUnpickler(file).load()
        names = [name for name in content if name != "StructuredToParameterName@@"]
        return {name: _as_float32(content[name]) for name in names}
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise UsageError(f"{directory / PICKLED}: not a readable file of adapter weights ({error})") from None


def _as_float32(value: np.ndarray) -> np.ndarray:
    if value.dtype == np.uint16:  # Paddle's way to store bfloat16
        return (value.astype(np.uint32) << 16).view(np.float32)
    return value.astype(np.float32)


class _ArrayUnpickler(pickle.Unpickler):
    """Builds dictionaries of NumPy arrays and nothing else: no other class or function of the file is called."""

    _ALLOWED = {("collections", "OrderedDict"), ("numpy", "ndarray"), ("numpy", "dtype")}
    _MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")

    def find_class(self, module: str, name: str):
        if (module, name) in self._ALLOWED or (module in self._MODULES and name == "_reconstruct"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it calls {module}.{name}")
