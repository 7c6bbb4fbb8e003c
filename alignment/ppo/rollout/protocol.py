"""What every rollout engine takes and gives."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import paddle

BROKEN = -1  # in place of a token: its logits were not finite

# (final hidden states [n, H], logits float32 [n, columns that are here]) -> logits to sample from
AdjustLogits = Callable[[paddle.Tensor, paddle.Tensor], paddle.Tensor]


@dataclass(frozen=True)
class SamplingParameters:
    """How answers are drawn. ``temperature`` 0 means greedy; ``top_k`` 0 and ``top_p`` 1 switch their filters off.

    ``min_new_tokens`` counts EOS, so 1 forbids nothing (transformers does not count it).
    """

    max_new_tokens: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    min_new_tokens: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop_strings: tuple[str, ...] = ()  # an answer ends with the token that completes one of them
    keep: int | None = None  # of the answers to each prompt: the shortest, the rest is dropped
    token_budget: int | None = None  # of the answers to each prompt together: the longest are cut

    @property
    def is_truncated(self) -> bool:
        """True if tokens are drawn from something else than softmax(logits / temperature)."""
        return (
            self.temperature == 0
            or self.top_k > 0
            or self.top_p < 1.0
            or self.repetition_penalty != 1.0
            or self.min_new_tokens > 1
        )


@dataclass(frozen=True)
class Draw:
    """One answer to sample: its randomness is a function of these four numbers alone (see ``uniforms``)."""

    seed: int
    iteration: int
    prompt_id: int
    sample: int


@dataclass(frozen=True)
class Rollout:
    """N answers; T is the longest of them.

    response_ids  int64   [N, T]  sampled tokens, EOS included, ``pad_token_id`` after it
    response_mask bool    [N, T]  True at sampled tokens (EOS is one), False after
    log_probs     float32 [N, T]  log softmax(logits / temperature) of the sampled tokens, before top-k and top-p
    entropy       float32 [N, T]  entropy of the same distribution, in nats
    finished      bool    [N]     True if the answer ended by EOS or a stop string, False if a limit cut it
    kept          bool    [N]     False for answers that ``SamplingParameters.keep`` drops, whose rows may be cut
    drawn_tokens  int             tokens that were drawn, those of dropped answers and behind cuts included
    """

    response_ids: np.ndarray
    response_mask: np.ndarray
    log_probs: np.ndarray
    entropy: np.ndarray
    finished: np.ndarray
    kept: np.ndarray
    drawn_tokens: int


class RolloutEngine(Protocol):
    """Anything that answers prompts with the current policy.

    Attributes: adjust_logits: makes another policy of it, which the answers and their log-probabilities are then of;
        None (as at first) leaves it as it is. Called where the model's last stage is.
    """

    adjust_logits: AdjustLogits | None

    def generate(
        self, prompts: Sequence[np.ndarray], draws: Sequence[Draw], sampling: SamplingParameters
    ) -> Rollout:
        """Answer ``prompts[i]`` (int64 [L_i]) with the randomness of ``draws[i]``; N = len(prompts) answers.

        Raises: ValueError for stop strings where the engine cannot decode tokens, or a token budget where it decodes
            fewer answers at a time than a prompt has; RunError if the policy's logits are not finite.
        """
        ...


def uniforms(draw: Draw, count: int) -> np.ndarray:
    """float64 [count] in [0, 1): number t decides token t of the answer.

    Philox is counter-based: the stream is a pure function of the draw, so neither batch order, slot, rank count nor
    engine can change which token is sampled from the same logits.
    """
    key = np.array([draw.seed & (2**64 - 1), draw.iteration], dtype=np.uint64)
    counter = np.array([0, 0, draw.prompt_id, draw.sample], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter)).random(count)
