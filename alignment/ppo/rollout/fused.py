"""The fused engine: continuous batching over kernels that do a layer in two calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist

from alignment.parallel.pipeline import receive, send
from alignment.parallel.topology import topology
from alignment.ppo.models.policy import trunk
from alignment.ppo.rollout.answers import Answers, Decode
from alignment.ppo.rollout.decoder import read_decoder
from alignment.ppo.rollout.kernels import Kernels, SampledTokens, TokenDraws
from alignment.ppo.rollout.model_group import ModelGroup
from alignment.ppo.rollout.protocol import AdjustLogits, Draw, Rollout, SamplingParameters, uniforms
from alignment.ppo.rollout.schedule import Pass, Schedule

ROWS_PER_PASS = 256  # enough for full speed of the matrix products, few enough to stay in a core's cache


class FusedRolloutEngine:
    """Answers prompts with ``batch_size`` of them decoding at any time.

    Args:
        model: a PaddleNLP causal language model (Llama or Qwen2 family), or this process's part of one, whose other
            processes then answer the same prompts; its current weights are packed at each call, and packed weights
            and cache are given back after it.
        batch_size: slots; an answer that ends makes room for the next at once.
        kernels: makes what computes, see alignment.ppo.rollout.choose.
        decode: text of token ids, for stop strings.
    """

    def __init__(
        self, model: paddle.nn.Layer, batch_size: int, kernels: Callable[..., Kernels], decode: Decode | None = None
    ) -> None:
        self.model, self.batch_size, self.kernels, self.decode = model, batch_size, kernels, decode
        self.placement = model.placement
        self.group = ModelGroup(model)
        self.adjust_logits: AdjustLogits | None = None

    @paddle.no_grad()
    def generate(
        self, prompts: Sequence[np.ndarray], draws: Sequence[Draw], sampling: SamplingParameters
    ) -> Rollout:
        """Answer every prompt; see ``RolloutEngine.generate``."""
        answers = Answers(draws, sampling, self.decode)
        if len(prompts):
            _Generation(self, prompts, draws, answers).run()
        return self.group.share(answers.rollout())

    def make_kernels(self, schedule: Schedule) -> Kernels:
        """Pack the current weights and make room for keys and values."""
        sizes = (schedule.rows, schedule.places, schedule.tables.shape[1])
        sum_parts = None
        if self.placement.tensor > 1:
            tensor_group = topology().group("tensor")

            def sum_parts(tensor: paddle.Tensor) -> None:
                dist.all_reduce(tensor, group=tensor_group)

        kernels = self.kernels(read_decoder(self.model), *sizes, sum_parts)
        self.group.wait()  # whoever packs more takes longer
        return kernels

    def run_layers(self, kernels: Kernels, tables: np.ndarray, step: Pass) -> Any:
        """Hidden states after the last layer that is here; received from and sent to the neighbouring stages."""
        if not len(step.tokens):
            return None
        kernels.begin(step.positions, step.slots, tables)
        if self.placement.is_first:
            hidden = kernels.embed(step.tokens)
        else:
            shape = [len(step.tokens), self.model.config.hidden_size]
            hidden = kernels.from_tensor(receive(shape, self.model.config.dtype, -1))
        for layer in range(len(kernels.decoder.layers)):
            hidden = kernels.mlp(layer, kernels.attention(layer, hidden))
        if not self.placement.is_last:
            send(kernels.to_tensor(hidden), +1)
        return hidden


class _Generation:
    """One call of ``generate``."""

    def __init__(
        self, engine: FusedRolloutEngine, prompts: Sequence[np.ndarray], draws: Sequence[Draw], answers: Answers
    ) -> None:
        self.engine, self.prompts, self.draws, self.answers = engine, prompts, draws, answers
        self.sampling = sampling = answers.sampling
        slots = min(engine.batch_size, len(prompts))
        # Answers that wait for each other (a token budget) begin one after the other.
        order = sorted(range(len(draws)), key=lambda i: (draws[i].prompt_id, draws[i].sample))
        self.schedule = Schedule(prompts, slots, sampling.max_new_tokens, ROWS_PER_PASS, order)
        answers.limits.check_slots(slots)
        self.kernels = engine.make_kernels(self.schedule)
        self.uniforms = np.zeros([slots, sampling.max_new_tokens])
        penalises = sampling.repetition_penalty != 1.0
        self.seen = np.zeros([slots, engine.model.config.vocab_size], np.uint8) if penalises else None
        self.remembered: dict[int, Any] = {}  # last hidden states of prompts that more answers will begin from

    def run(self) -> None:
        """Pass after pass until every answer has ended."""
        schedule, limits = self.schedule, self.answers.limits
        paused = None
        while not schedule.is_done:
            step = schedule.next_pass(paused)
            hidden = self.engine.run_layers(self.kernels, schedule.tables, step)
            self._begin_answers(step.drawing[schedule.length[step.drawing] == 0])
            ended = self._draw(step, hidden)
            if limits.is_active:
                done, paused = limits.apply(schedule, exclude=ended)
                ended = np.concatenate([ended, done])
            for slot in ended:
                schedule.finish(slot)

    def _begin_answers(self, slots: np.ndarray) -> None:
        for slot in slots:
            answer = self.schedule.answer[slot]
            self.uniforms[slot] = uniforms(self.draws[answer], self.sampling.max_new_tokens)
            if self.seen is not None:
                self.seen[slot] = 0
                self.seen[slot, self.prompts[answer]] = 1

    def _draw(self, step: Pass, hidden: Any) -> np.ndarray:
        """One token for each of ``step.drawing``; returns the slots whose answers end with it.

        Only the model's head draws; the others take its tokens, and know nothing of what they cost.
        """
        slots = step.drawing
        if not len(slots):
            return slots
        drawn = SampledTokens(np.zeros([len(slots)], np.int64), *np.zeros([2, len(slots)], np.float32))
        if self.engine.placement.is_last:
            drawn = self._sample(step, hidden)
        drawn = drawn._replace(tokens=self.engine.group.agree(drawn.tokens))
        self.schedule.record(slots, drawn.tokens)
        if self.seen is not None:
            self.seen[slots, drawn.tokens] = 1
        return slots[self.answers.add(self.schedule.answer[slots], drawn)]

    def _sample(self, step: Pass, hidden: Any) -> SampledTokens:
        for row, prompt in step.to_keep:
            self.remembered[prompt] = hidden[step.wanted[row : row + 1]]
        parts = [hidden[step.wanted]] if len(step.wanted) else []
        parts += [self.remembered[int(prompt)] for prompt in step.remembered]
        logits = self._logits(self.kernels.concat(parts))
        if self.engine.group.divides_vocabulary:
            whole = self.engine.group.whole_logits(self.kernels.to_tensor(logits))
            logits = self.kernels.from_tensor(whole)
        position = self.schedule.length[step.drawing]
        chances = self.uniforms[step.drawing, position]
        forbids_end = position + 1 < self.sampling.min_new_tokens
        draws = TokenDraws(step.sources, step.drawing, chances, forbids_end, self.seen)
        return self.kernels.sample(logits, draws, self.sampling)

    def _logits(self, hidden: Any) -> Any:
        """float32 [rows, columns here] from hidden states after the last layer, which are not normed yet."""
        logits, engine, kernels = self.kernels.logits(hidden), self.engine, self.kernels
        if engine.adjust_logits is None:
            return logits
        final = trunk(engine.model).norm(kernels.to_tensor(hidden))
        return kernels.from_tensor(engine.adjust_logits(final, kernels.to_tensor(logits)))
