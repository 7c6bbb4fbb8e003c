"""The eager engine: PaddleNLP's own forward with a KV cache. Slow, simple, the yardstick of faster engines."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import paddle
import paddle.nn.functional as F

from alignment.parallel.pipeline import receive, send
from alignment.ppo.losses import entropy_from_logits, log_probs_from_logits
from alignment.ppo.models.policy import language_model_head, position_ids_of, trunk
from alignment.ppo.models.vocabulary import split_entropy, split_log_probs
from alignment.ppo.rollout.answers import Answers, Decode
from alignment.ppo.rollout.kernels import SampledTokens
from alignment.ppo.rollout.model_group import ModelGroup
from alignment.ppo.rollout.protocol import AdjustLogits, Draw, Rollout, SamplingParameters, uniforms
from alignment.ppo.rollout.sampling import choose_tokens, mark_broken, sampling_logits


class EagerRolloutEngine:
    """Answers prompts in batches of at most ``batch_size`` left-padded rows.

    Args:
        model: a PaddleNLP causal language model (Llama or Qwen2 family), or this process's part of one, whose other
            processes then answer the same prompts; its current weights are used at each call.
        batch_size: rows decoded together.
        decode: text of token ids, for stop strings.
    """

    def __init__(self, model: paddle.nn.Layer, batch_size: int, decode: Decode | None = None) -> None:
        self.model, self.batch_size, self.decode = model, batch_size, decode
        self.group = ModelGroup(model)
        self.adjust_logits: AdjustLogits | None = None

    @paddle.no_grad()
    def generate(
        self, prompts: Sequence[np.ndarray], draws: Sequence[Draw], sampling: SamplingParameters
    ) -> Rollout:
        """Answer every prompt; see ``RolloutEngine.generate``."""
        self.model.eval()
        answers = Answers(draws, sampling, self.decode)
        # Rows of like length decode together, so that little of a batch is padding.
        order = np.argsort([len(prompt) for prompt in prompts], kind="stable")
        for start in range(0, len(order), self.batch_size):
            self._decode(order[start : start + self.batch_size], prompts, draws, sampling, answers)
        return self.group.share(answers.rollout())

    def _decode(
        self,
        rows: np.ndarray,
        prompts: Sequence[np.ndarray],
        draws: Sequence[Draw],
        sampling: SamplingParameters,
        answers: Answers,
    ) -> None:
        input_ids, attention_mask = _pad_left([prompts[row] for row in rows], sampling.pad_token_id)
        uniform = paddle.to_tensor(np.stack([uniforms(draws[row], sampling.max_new_tokens) for row in rows]))
        seen = self._tokens_in(input_ids, attention_mask) if sampling.repetition_penalty != 1.0 else None
        position_ids = position_ids_of(attention_mask)
        cache, open_rows = None, np.arange(len(rows))
        for position in range(sampling.max_new_tokens):
            logits, cache = self._next_logits(input_ids, attention_mask, position_ids, cache)
            tokens = paddle.zeros([len(rows)], dtype="int64")
            if logits is not None:
                whole = self.group.whole_logits(logits)
                forbids_end = paddle.full([len(rows)], position + 1 < sampling.min_new_tokens, dtype="bool")
                shaped = sampling_logits(whole, seen, forbids_end, sampling)
                tokens = mark_broken(choose_tokens(shaped, uniform[:, position], sampling.temperature == 0), whole)
            tokens = paddle.to_tensor(self.group.agree(tokens.numpy()))
            drawn = SampledTokens(tokens, *self._describe(logits, tokens, sampling.temperature or 1.0))
            ended = answers.add(rows[open_rows], SampledTokens(*(part.numpy()[open_rows] for part in drawn)))
            open_rows = open_rows[~ended]
            if not len(open_rows):
                break
            if seen is not None:
                seen = seen | F.one_hot(tokens, seen.shape[-1]).astype("bool")
            input_ids = tokens.unsqueeze(-1)
            attention_mask = paddle.concat([attention_mask, paddle.ones([len(rows), 1], dtype="bool")], axis=1)
            position_ids = position_ids[:, -1:] + 1

    def _next_logits(self, input_ids, attention_mask, position_ids, cache):
        """Logits float32 [B, V] (or [B, V / T]) after the last column, None before the last stage; the new cache."""
        placement, config = self.model.placement, self.model.config
        received = None
        if not placement.is_first:
            received = receive([*input_ids.shape, config.hidden_size], config.dtype, -1)
        hidden, cache = trunk(self.model)(
            input_ids=input_ids if received is None else None,
            inputs_embeds=received,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            return_dict=False,
        )[:2]
        if not placement.is_last:
            send(hidden.astype(config.dtype), +1)
            return None, cache
        last = hidden[:, -1]
        logits = language_model_head(self.model, last).astype("float32")
        return logits if self.adjust_logits is None else self.adjust_logits(last, logits), cache

    def _describe(
        self, logits: paddle.Tensor | None, tokens: paddle.Tensor, temperature: float
    ) -> tuple[paddle.Tensor, paddle.Tensor]:
        """Log-probabilities and entropies, float32 [B], computed as in training; zeros where there are no logits."""
        if logits is None:
            return (paddle.zeros(tokens.shape),) * 2
        if self.group.divides_vocabulary:
            return split_log_probs(logits, tokens, temperature), split_entropy(logits, temperature)
        return log_probs_from_logits(logits, tokens, temperature), entropy_from_logits(logits, temperature)

    def _tokens_in(self, input_ids: paddle.Tensor, attention_mask: paddle.Tensor) -> paddle.Tensor:
        """bool [B, V]: which tokens stand in the real part of each row."""
        seen = np.zeros([input_ids.shape[0], self.model.config.vocab_size], dtype=bool)
        rows, columns = np.nonzero(attention_mask.numpy())
        seen[rows, input_ids.numpy()[rows, columns]] = True
        return paddle.to_tensor(seen)


def _pad_left(prompts: list[np.ndarray], pad_token_id: int) -> tuple[paddle.Tensor, paddle.Tensor]:
    width = max(len(prompt) for prompt in prompts)
    ids = np.full([len(prompts), width], pad_token_id, dtype=np.int64)
    mask = np.zeros([len(prompts), width], dtype=bool)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = True
    return paddle.to_tensor(ids), paddle.to_tensor(mask)
