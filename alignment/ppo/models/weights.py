"""Weight files: safetensors in either naming, and the mapping between the two.

========================================  ===========================================  ==========
Hugging Face                              this process (PaddleNLP layers)              linear
========================================  ===========================================  ==========
``model.layers.0.mlp.up_proj.weight``     ``llama.layers.0.mlp.up_proj.weight``        transposed
``lm_head.weight``                        ``lm_head.weight``                           transposed
``score_head.weight``                     ``score_head.weight``                        transposed
``model.norm.weight``                     ``llama.norm.weight``                        as it is
========================================  ===========================================  ==========

Hugging Face keeps linear layers as [out, in], Paddle as [in, out]. A tied ``lm_head`` is not stored.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import paddle
from paddlenlp.transformers import PretrainedConfig
from safetensors import SafetensorError, safe_open

from alignment.parallel.collectives import gather_objects
from alignment.parallel.topology import topology
from alignment.ppo.models.config import read_json
from alignment.ppo.models.lora import plain_parameters
from alignment.ppo.models.placement import is_copy, merged, names_of_all_layers, own_slice, split_axis
from alignment.runtime.bootstrap import tensor_views
from alignment.runtime.faults import UsageError
from alignment.runtime.files import Files, sha256_of
from alignment.runtime.metrics import is_main_process

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_LINEAR = ("_proj.weight", "lm_head.weight", "score_head.weight")
_COMPUTED = ("rotary_emb.inv_freq",)  # old checkpoints store this constant; it is computed here


def is_linear(name: str) -> bool:
    """Whether a weight is a linear layer's matrix, so transposed between the two forms."""
    return name.endswith(_LINEAR)


def huggingface_name(name: str, trunk: str) -> str:
    """Name in a Hugging Face file of the parameter ``name``; ``trunk`` is the attribute that holds the transformer."""
    return "model." + name.removeprefix(f"{trunk}.") if name.startswith(f"{trunk}.") else name


class WeightFiles:
    """The safetensors files of a model directory, single or sharded, opened lazily (nothing is unpickled).

    Raises:
        UsageError: no safetensors, a missing shard, an unreadable index, or a corrupt or truncated file.
    """

    single, index = SINGLE_FILE, INDEX_FILE
    always_indexed = False

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files = [_open(path) for path in _weight_files(directory, self.single, self.index)]
        self._owner = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118 (no iterator)

    def names(self) -> set[str]:
        """Names of all stored tensors that carry information."""
        return {name for name in self._owner if not name.endswith(_COMPUTED)}

    def dtype(self) -> str:
        """Type of the first tensor: "float32", "bfloat16", ..."""
        name = min(self.names())
        return str(self.read(name).dtype).removeprefix("paddle.")

    def shape(self, name: str) -> list[int]:
        """Shape of one tensor as stored."""
        return list(self._owner[name].get_slice(name).get_shape())

    def read(self, name: str) -> paddle.Tensor:
        """One tensor as stored, on the CPU."""
        try:
            with tensor_views():  # safetensors reads bytes and views them in their type
                return self._owner[name].get_tensor(name)
        except SafetensorError as error:
            raise UsageError(f"{self.directory}: cannot read {name} ({error})") from None


class AdapterFiles(WeightFiles):
    """The same for LoRA adapters, as PaddleNLP names them."""

    single, index = "peft_model.safetensors", "peft_model.safetensors.index.json"
    always_indexed = True  # without one PaddleNLP looks for its pickles


def weights_sha256(directory: Path) -> str:
    """SHA-256 of a model directory's weight files, in hexadecimal. Every process calls it, the main one reads them."""
    own = None
    if is_main_process():
        paths = _weight_files(directory.resolve(), SINGLE_FILE, INDEX_FILE)
        own = _sha256_once(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in paths))
    return gather_objects(own, "world")[0]


@cache
def _sha256_once(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Several models may start from one directory. files: each with its size and the time of its last change."""
    return sha256_of(*(path for path, _, _ in files))


def _weight_files(directory: Path, single: str, index: str) -> list[Path]:
    if (directory / index).is_file():
        try:
            paths = [directory / name for name in part_names(read_json(directory / index))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{directory / index}: not a safetensors index ({error!r})") from None
    else:
        paths = [directory / single]
    for path in paths:
        if not path.is_file():
            raise UsageError(
                f"{directory}: no {path.name} (weights must be safetensors; .bin and .pdparams are not read)"
            )
    return paths


def check_sizes(files: WeightFiles, config: PretrainedConfig) -> None:
    """Raises UsageError where config.json asks for more than the files hold, before anything of that size is made."""
    wanted = {
        "embed_tokens.weight": [config.vocab_size, config.hidden_size],
        "layers.0.mlp.up_proj.weight": [config.intermediate_size, config.hidden_size],
    }
    for name in sorted(files.names()):
        for ending, shape in wanted.items():
            if name.endswith(f".{ending}") and sorted(files.shape(name)) != sorted(shape):
                stored = files.shape(name)
                raise UsageError(f"{files.directory}: {name} has shape {stored}, config.json asks for {shape}")
    if config.num_hidden_layers > len(files.names()):
        raise UsageError(
            f"{files.directory}: the checkpoint lacks weights of {config.num_hidden_layers} layers; it has "
            f"{len(files.names())} in all"
        )


def part_names(index: dict[str, Any]) -> list[str]:
    """The files that an index names. Raises ValueError unless they lie beside it."""
    names = sorted(set(index["weight_map"].values()))
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{name!r} is not the name of a file beside it")
    return names


def _open(path: Path):
    try:
        return safe_open(str(path), framework="paddle")
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path}: corrupt or truncated safetensors file ({error})") from None


def load_weights(
    layer: paddle.nn.Layer,
    files: WeightFiles,
    trunk: str,
    heads: Iterable[str] = (),
    skip: Iterable[str] = (),
    ignore: Iterable[str] = (),
) -> None:
    """Fill every parameter of ``layer`` from ``files``; both namings are recognised.

    ``layer`` may be a part of the model; the names of the whole are checked, so that every process sees a fault.

    Args:
        trunk: attribute of ``layer`` that holds the transformer; its parameters are stored as ``model.*``
            (Hugging Face) or ``<family>.*`` (PaddleNLP).
        heads: stored names of the head, if it is to be read.
        skip: parameters of ``layer`` not to fill (a tied head, a new score head).
        ignore: stored names that may stay unused.
    Raises:
        UsageError: stored and wanted weights differ in names or shapes. Nothing is left at random values.
    """
    stored = files.names()
    huggingface = any(name.startswith("model.") for name in stored)
    family = layer.config.model_type
    wanted = {}
    for name, parameter in layer.state_dict().items():
        if name not in skip:
            other = huggingface_name(name, trunk)
            wanted[other if huggingface else other.replace("model.", f"{family}.", 1)] = (name, parameter)
    prefix = "model." if huggingface else f"{family}."
    ends = {f"{prefix}embed_tokens.weight", f"{prefix}norm.weight", *heads}
    whole = names_of_all_layers(wanted, layer.config.num_hidden_layers) | ends
    _check_names(files.directory, whole, stored, set(ignore))
    for source, (name, parameter) in wanted.items():
        tensor = files.read(source)
        if huggingface and is_linear(name):
            tensor = tensor.transpose([1, 0])
        tensor = own_slice(tensor, parameter, layer.placement)
        if tensor.shape != parameter.shape:
            raise UsageError(
                f"{files.directory}: {source} has shape {tensor.shape}, config.json asks for {parameter.shape} "
                f"({'[out, in] files are shown' if huggingface else 'stored as'} [in, out])"
            )
        parameter.set_value(tensor.astype(parameter.dtype))


def _check_names(directory: Path, wanted: set[str], stored: set[str], ignore: set[str]) -> None:
    for names, problem in ((wanted - stored, "lacks"), (stored - wanted - ignore, "has unknown")):
        if names:
            shown = sorted(names)
            rest = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
            raise UsageError(f"{directory}: the checkpoint {problem} weights {', '.join(shown[:3])}{rest}")


def huggingface_weights(
    model: paddle.nn.Layer, skip: Iterable[str] = (), dtype: str | None = None
) -> dict[str, paddle.Tensor]:
    """This stage's tensors, whole and with adapters merged, under Hugging Face names and in that orientation.

    Every process of the job calls it; those that do not write (see ``is_writer``) get an empty dictionary.

    Args: skip: names of ``model.state_dict()`` to leave out; dtype: to cast to.
    """
    weights = {}
    for name, parameter, read in plain_parameters(model):
        if name in skip or is_copy(name, model):
            continue
        value = merged(read(), split_axis(parameter))
        if is_writer():
            value = value.astype(dtype) if dtype else value
            value = value.transpose([1, 0]) if is_linear(name) else value
            weights[huggingface_name(name, model.base_model_prefix)] = value.contiguous().cpu()
    return weights


def is_writer() -> bool:
    """Whether this process writes its stage's weights."""
    return topology().data_rank == 0 and topology().tensor_rank == 0


def add_weights(
    weights: dict[str, paddle.Tensor],
    files: Files,
    kind: type[WeightFiles] = WeightFiles,
    form: str = "pt",
    folder: str = "",
) -> None:
    """Add one file, or a part of it for each pipeline stage with an index. Every process calls it.

    Args: kind: names the files; form: for their metadata: "pt", which transformers asks for and PaddleNLP recognises,
        or PaddleNLP's own "np"; folder: sub-directory to write into, ending in "/".
    """
    place = topology()
    parts = gather_objects(list(weights), "pipe")
    if is_writer():
        name = part_name(kind.single, place.stage, place.layout.pipeline)
        files.add_tensors(folder + name, weights, {"format": form})
    if is_main_process():
        add_index(files, folder + kind.index, kind.single, parts, kind.always_indexed)


def part_name(file: str, part: int, parts: int) -> str:
    """Name of one of several files that together stand for ``file``: model-00001-of-00002.safetensors."""
    stem, _, ending = file.rpartition(".")
    return file if parts == 1 else f"{stem}-{part + 1:05d}-of-{parts:05d}.{ending}"


def add_index(files: Files, name: str, file: str, parts: list[list[str]], always: bool = False) -> None:
    """The index of a ``file`` in several parts: which tensor is in which. A whole file has one only if ``always``."""
    if len(parts) > 1 or always:
        owner = {tensor: part_name(file, i, len(parts)) for i, tensors in enumerate(parts) for tensor in tensors}
        files.add_text(name, json.dumps({"metadata": {}, "weight_map": dict(sorted(owner.items()))}, indent=2) + "\n")
