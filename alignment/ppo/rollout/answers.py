"""Answers while they grow."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from alignment.ppo.rollout.kernels import SampledTokens
from alignment.ppo.rollout.limits import Limits
from alignment.ppo.rollout.protocol import Draw, Rollout, SamplingParameters

Decode = Callable[[list[int]], str]


class Answers:
    """Tokens of one answer a draw; an answer ends by an end token, a stop string or at max_new_tokens.

    Args: decode: text of token ids; only stop strings need it.
    """

    def __init__(self, draws: Sequence[Draw], sampling: SamplingParameters, decode: Decode | None) -> None:
        if sampling.stop_strings and decode is None:
            raise ValueError("stop strings need an engine that can decode tokens")
        self.sampling, self.decode = sampling, decode
        self.limits = Limits(draws, sampling)
        self.ends = np.asarray(sampling.eos_token_ids, np.int64)
        # A token is at least a byte, and the tail may begin within a character.
        self.tail = max((len(text.encode()) for text in sampling.stop_strings), default=0) + 4
        shape = [len(draws), sampling.max_new_tokens]
        self.ids = np.full(shape, sampling.pad_token_id, np.int64)
        self.log_probs, self.entropy = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        self.lengths, self.finished = np.zeros([len(draws)], np.int64), np.zeros([len(draws)], bool)

    def add(self, answers: np.ndarray, drawn: SampledTokens) -> np.ndarray:
        """One more token for each of ``answers``, int64 [m]; returns bool [m]: whether it was the last."""
        position = self.lengths[answers]
        self.ids[answers, position] = drawn.tokens
        self.log_probs[answers, position], self.entropy[answers, position] = drawn.log_probs, drawn.entropies
        self.lengths[answers] += 1
        self.finished[answers] = np.isin(drawn.tokens, self.ends) | [self._stops(answer) for answer in answers]
        ended = self.finished[answers] | (self.lengths[answers] == self.sampling.max_new_tokens)
        self.limits.end(answers[ended], self.lengths[answers[ended]])
        return ended

    def rollout(self) -> Rollout:
        """What was drawn, with the limits applied."""
        kept, lengths = self.limits.settle(self.lengths)
        width = int(lengths.max(initial=1))
        mask = np.arange(width) < lengths[:, None]
        return Rollout(
            response_ids=np.where(mask, self.ids[:, :width], self.sampling.pad_token_id),
            response_mask=mask,
            log_probs=np.where(mask, self.log_probs[:, :width], np.float32(0)),
            entropy=np.where(mask, self.entropy[:, :width], np.float32(0)),
            finished=self.finished & (lengths == self.lengths),
            kept=kept,
            drawn_tokens=int(self.lengths.sum()),
        )

    def _stops(self, answer: int) -> bool:
        if not self.sampling.stop_strings:
            return False
        end = self.lengths[answer]
        text = self.decode(self.ids[answer, max(0, end - self.tail) : end].tolist())
        return any(stop in text for stop in self.sampling.stop_strings)
