"""A model's sizes, read from its config.json, and how many parameters they make. Loads no weights and no Paddle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.ppo.models.default import DEFAULT_MODEL_ALIASES, DEFAULT_MODEL_NAME, cache_directory
from alignment.runtime.arguments import read_json_object
from alignment.runtime.faults import UsageError

CONFIG_FILE = "config.json"
SHAPES = Path(__file__).resolve().parents[3] / "config" / "shapes"
FAMILIES = ("llama", "qwen2")
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Llama or Qwen2 model, under their names in config.json. Counts below are in parameters.

    Tensor parallelism over ``tensor`` ranks divides every matrix of a layer, and the vocabulary where it divides
    evenly; norms are whole on every rank.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # Qwen2: of queries, keys and values

    @property
    def key_value_size(self) -> int:
        """Width of keys, and of values: smaller than hidden_size where query heads share them."""
        return self.hidden_size // self.num_attention_heads * self.num_key_value_heads

    def layer_parameters(self, tensor: int = 1) -> int:
        """One layer's part on a rank."""
        hidden, narrow = self.hidden_size, self.key_value_size
        matrices = 2 * hidden * hidden + 2 * hidden * narrow + 3 * hidden * self.intermediate_size
        biases = (hidden + 2 * narrow) * self.attention_bias
        return (matrices + biases) // tensor + 2 * hidden

    def vocabulary_part(self, tensor: int = 1) -> int:
        """Rows of the embedding, and columns of the head, on a rank."""
        return self.vocab_size // tensor if self.vocab_size % tensor == 0 else self.vocab_size

    def embedding_parameters(self, tensor: int = 1) -> int:
        """The embedding's part on a rank; a head of its own has as many."""
        return self.vocabulary_part(tensor) * self.hidden_size

    @property
    def parameters(self) -> int:
        """Of the whole language model."""
        ends = 1 if self.tie_word_embeddings else 2
        layers = self.num_hidden_layers * self.layer_parameters()
        return layers + ends * self.embedding_parameters() + self.hidden_size


def read_shape(path: str | Path) -> ModelShape:
    """The shape in a config.json, in the one of a directory, or of a name in config/shapes.

    Raises: UsageError that names the file: not there, another kind of model, sizes missing or not fitting together.
    """
    file = locate_config(path)
    fields = read_json_object(file)
    if fields.get("model_type") not in FAMILIES:
        raise UsageError(f"{file}: model_type {fields.get('model_type')!r} is not one of {', '.join(FAMILIES)}")
    sizes = {name: _size(fields.get(name), name, file) for name in _SIZES}
    shared = fields.get("num_key_value_heads")
    sizes["num_key_value_heads"] = (
        sizes["num_attention_heads"] if shared is None else _size(shared, "num_key_value_heads", file)
    )
    for whole, part in (("hidden_size", "num_attention_heads"), ("num_attention_heads", "num_key_value_heads")):
        if sizes[whole] % sizes[part]:
            raise UsageError(f"{file}: {part} = {sizes[part]} does not divide {whole} = {sizes[whole]}")
    tied = bool(fields.get("tie_word_embeddings", False))
    return ModelShape(**sizes, tie_word_embeddings=tied, attention_bias=fields["model_type"] == "qwen2")


def locate_config(path: str | Path) -> Path:
    """The config.json that ``read_shape`` reads; what is not there is the reader's to refuse."""
    return find_config(path) or find_config(SHAPES / path) or Path(path)


def _size(value: Any, name: str, file: Path) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UsageError(f"{file}: {name} = {value!r} must be a whole number >= 1")
    return value


def find_config(name: str | Path) -> Path | None:
    """The config.json that a model argument leads to on this machine, or None: nothing is downloaded or converted.

    Args: name: the file, its directory, a stage's output directory (its newest checkpoint), or the embedded model.
    """
    path = Path(name).expanduser()
    if str(name) in DEFAULT_MODEL_ALIASES:
        path = cache_directory() / DEFAULT_MODEL_NAME
    if path.is_file():
        return path
    if (path / CONFIG_FILE).is_file():
        return path / CONFIG_FILE
    numbered = [file for file in path.glob(f"checkpoint-*/{CONFIG_FILE}") if file.parent.name[11:].isdigit()]
    return max(numbered, key=lambda file: int(file.parent.name[11:]), default=None)
