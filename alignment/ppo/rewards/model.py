"""Rewards from a trained reward model: its score of prompt + response, read as its training read answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle

from alignment.parallel.pipeline import MicroBatch
from alignment.ppo.models.policy import passes_of
from alignment.ppo.rewards.base import RewardBatch, RewardSource, check_rewards
from alignment.runtime.faults import RunError


class ModelReward(RewardSource):
    """Scores with a ScoreModel, pooled as its pooling_type says; every process that holds a part of it scores along.

    With one vocabulary for actor and reward model the sampled ids are scored as they are; otherwise prompt text and
    response text are tokenised apart with the reward model's tokenizer, as its training data was. Either way a
    finished response ends with the reward tokenizer's EOS and a truncated one does not. A model with a sep_token_id
    gets that token between the two.
    """

    is_divided = True

    def __init__(
        self,
        score_model: paddle.nn.Layer,
        reward_tokenizer: Any,
        actor_tokenizer: Any | None = None,
        batch_size: int = 8,
        add_special_tokens: bool = False,
        name: str = "model",
    ) -> None:
        """actor_tokenizer None: only text arrives, always tokenise it. batch_size: sequences per forward pass.

        add_special_tokens: whether the tokenizer adds its own to a prompt's text (data.templates.Template says so).
        """
        self.name = name
        self.model = score_model
        self.pipeline = passes_of(score_model)
        self.tokenizer = reward_tokenizer
        self.separator = [] if score_model.sep_token_id is None else [score_model.sep_token_id]
        self.batch_size = batch_size
        self.add_special_tokens = add_special_tokens
        self.shares_vocabulary = actor_tokenizer is not None and (
            actor_tokenizer is reward_tokenizer or actor_tokenizer.get_vocab() == reward_tokenizer.get_vocab()
        )

    def __call__(self, batch: RewardBatch) -> np.ndarray:
        """float32 [N]; a response's reward does not depend on the others in `batch`.

        Raises RunError for a sequence longer than the model's positions or a score that is not finite.
        """
        if self.shares_vocabulary and batch.prompt_ids is not None:
            sequences = [self._ids_as_sampled(batch, index) for index in range(len(batch))]
        else:
            sequences = [self._ids_from_text(batch, index) for index in range(len(batch))]
        self._check_lengths(sequences)
        order = np.argsort([len(ids) for ids in sequences], kind="stable")  # alike lengths together: little padding
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        reports = self.pipeline.forward([self._micro_batch([sequences[i] for i in chosen]) for chosen in batches])
        scores = np.zeros(len(sequences), dtype=np.float32)
        for chosen, values in zip(batches, reports, strict=True):
            scores[chosen] = values
        return check_rewards(scores, len(batch), f"reward model {self.name!r}")

    def sit_out(self) -> None:
        self.pipeline.forward([])

    def _ids_as_sampled(self, batch: RewardBatch, index: int) -> list[int]:
        response = batch.response_ids[index].tolist()
        if batch.finished[index]:  # the actor may stop at another EOS id than the one the reward model was trained on
            response = response[:-1] + [self.tokenizer.eos_token_id]
        return batch.prompt_ids[index].tolist() + self.separator + response

    def _ids_from_text(self, batch: RewardBatch, index: int) -> list[int]:
        eos = self.tokenizer.eos_token_id
        prompt = list(self.tokenizer(batch.prompts[index], add_special_tokens=self.add_special_tokens)["input_ids"])
        if self.add_special_tokens and prompt[-1:] == [eos]:  # as the data sets do: the prompt is not the end
            prompt.pop()
        response = list(self.tokenizer(batch.responses[index], add_special_tokens=False)["input_ids"])
        return prompt + self.separator + response + [eos] * bool(batch.finished[index])

    def _check_lengths(self, sequences: list[list[int]]) -> None:
        if not all(sequences):
            raise RunError(f"reward model {self.name!r}: response {sequences.index([])} and its prompt are both empty")
        longest = max((len(ids) for ids in sequences), default=0)
        limit = self.model.config.max_position_embeddings
        if longest > limit:
            raise RunError(f"reward model {self.name!r}: {longest} tokens to score, but it has {limit} positions")

    def _micro_batch(self, sequences: list[list[int]]) -> MicroBatch:
        """B sequences, right-padded; its report is their scores, float32 [B]."""
        lengths = np.array([len(ids) for ids in sequences])
        mask = np.arange(lengths.max())[None, :] < lengths[:, None]
        input_ids = np.zeros(mask.shape, dtype=np.int64)  # any id will do where the mask is False
        input_ids[mask] = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in sequences])
        tokens = paddle.to_tensor(input_ids), paddle.to_tensor(mask)

        def finish(hidden: paddle.Tensor) -> tuple[None, np.ndarray]:
            return None, self.model.answer_scores(hidden, *tokens).numpy()

        return MicroBatch(*tokens, finish)
