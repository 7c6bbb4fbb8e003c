"""Model directories in Hugging Face form, which transformers and PaddleNLP load as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import paddle

from alignment.ppo.models.adapters import collect_adapters
from alignment.ppo.models.config import CAUSAL_ARCHITECTURE, SCORE_ARCHITECTURE, config_fields
from alignment.ppo.models.loading import TIED_HEAD
from alignment.ppo.models.lora import is_adapted
from alignment.ppo.models.value import HEAD, ScoreModel
from alignment.ppo.models.weights import add_weights, huggingface_weights
from alignment.runtime.files import Files
from alignment.runtime.metrics import is_main_process

ILQL_HEADS = "ilql_heads"  # sublayer of a policy (alignment.ppo.offline.ilql_model), saved by itself
_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def save_model(model: paddle.nn.Layer, tokenizer: Any, directory: str | Path, dtype: str | None = None) -> None:
    """Write the whole model into ``directory``: weights, config.json, generation_config.json, the tokenizer's files.

    Every process of the job calls it, and sees the same directory.

    transformers loads it by ``from_pretrained(directory)``, PaddleNLP by ``from_pretrained(directory,
    convert_from_torch=True)``, ``load_policy`` and ``load_value`` by its path. Weights are kept bit for bit, unless
    ``dtype`` ("float32", "bfloat16", "float16") asks for a cast.

    Args:
        model: a policy or a score model; where it has LoRA adapters, they are merged into these weights and stand
            once more, as they are, in the sub-directory ``adapters``.
        tokenizer: from ``load_tokenizer``; None: no tokenizer files.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    files = Files(directory)
    collect_model(model, tokenizer, files, dtype)
    files.check()


def collect_model(model: paddle.nn.Layer, tokenizer: Any, files: Files, dtype: str | None = None) -> None:
    """Add to ``files`` what ``save_model`` writes. Every process of the job calls it."""
    config = model.config
    score = isinstance(model, ScoreModel)
    skip = {TIED_HEAD} if config.tie_word_embeddings else set()
    if not score:
        skip.add(HEAD)  # of a critic that shares the policy's layers, which is saved by itself
    skip |= {name for name in model.state_dict() if name.startswith(f"{ILQL_HEADS}.")}
    weights = huggingface_weights(model, skip, dtype)
    add_weights(weights, files)
    if is_adapted(model):
        collect_adapters(model, files)
    if not is_main_process():
        return
    stored = str(next(iter(weights.values())).dtype).removeprefix("paddle.")
    architectures = SCORE_ARCHITECTURE if score else CAUSAL_ARCHITECTURE
    fields = config_fields(config, architectures[config.model_type], stored)
    if score:
        names = ("score_type", "do_normalize", "score_mean", "score_var", "pooling_type", "sep_token_id")
        fields |= {name: getattr(model, name) for name in names}
    else:
        special = {name: fields[name] for name in _SPECIAL_IDS if name in fields}
        _add_json(files, "generation_config.json", special)
    _add_json(files, "config.json", fields)
    if tokenizer is not None:
        for name, content in tokenizer.files.contents().items():
            files.add_bytes(name, content)


def _add_json(files: Files, name: str, content: dict) -> None:
    files.add_text(name, json.dumps(content, indent=2) + "\n")
