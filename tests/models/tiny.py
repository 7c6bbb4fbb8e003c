"""Real Llama and Qwen2 models of a few thousand random weights, with a tokenizer to match."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import paddle
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from alignment.ppo.models.loading import load_policy
from alignment.ppo.models.policy import hidden_states, pack_responses, response_log_probs
from alignment.ppo.models.tokenizer import load_tokenizer
from tests.models.reference import logits, make_config, random_weights, write_checkpoint

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")


class TinyPolicy(NamedTuple):
    """A loaded policy, and what the NumPy reference needs to compute the same."""

    directory: Path
    config: dict
    weights: dict[str, np.ndarray]
    model: paddle.nn.Layer

    def log_softmax(self, ids, temperature: float = 1.0) -> np.ndarray:
        """float64 [L, V] for one unpadded sequence."""
        return log_softmax(logits(self.weights, self.config, ids) / temperature)


def tiny_policy(directory: Path, family: str = "llama", tied: bool = False, seed: int = 0, **changes) -> TinyPolicy:
    config = make_config(family, tied, **changes)
    weights = random_weights(config, seed)
    if not tied:
        weights["lm_head.weight"] *= 4  # some tokens likely, some not, as in a trained model
    write_checkpoint(directory, config, weights)
    return TinyPolicy(directory, config, weights, load_policy(directory))


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def answer_log_probs(
    model: paddle.nn.Layer, ids, mask, response_mask, temperature: float = 1.0, train_entropy: bool = False
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Log-probabilities and entropies [B, T] of answers, by both halves of a forward pass over arrays."""
    ids, mask, response_mask = (paddle.to_tensor(x) for x in (ids, mask, response_mask))
    packed = pack_responses(ids, mask, response_mask)
    hidden = hidden_states(model, packed.input_ids, packed.attention_mask)
    return response_log_probs(model, hidden, packed, response_mask, temperature, train_entropy)


def tiny_tokenizer(directory: Path, vocab_size: int = 48):
    """Token i is the word "w<i>"; 0 to 3 are unknown, begin, end and padding."""
    words = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), vocab_size))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece()
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    names = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), SPECIAL, strict=True))
    (directory / "tokenizer_config.json").write_text(json.dumps(names))
    return load_tokenizer(directory)
