"""Collecting experience: the policy answers, the other three models and the reward sources judge."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import paddle

from alignment.parallel.collectives import gather_objects
from alignment.parallel.pipeline import MicroBatch, Pipeline
from alignment.parallel.topology import topology
from alignment.ppo.experience import Experience, merge
from alignment.ppo.models.policy import Packed, before_targets, pack_responses, response_log_probs
from alignment.ppo.reshard import Sampler
from alignment.ppo.rewards import RewardBatch, WeightedRewards
from alignment.ppo.rollout.protocol import Draw, Rollout, SamplingParameters
from alignment.runtime.timing import PhaseTimer
from alignment.training.batches import deal, own_micro_batches


@dataclass(frozen=True)
class Collected:
    """The experience of all processes, in one order, with what only people and metrics want to know.

    answers: N decoded answers; components: {"rewards/<source>": float32 [N]}, unweighted.
    """

    experience: Experience
    answers: list[str]
    components: dict[str, np.ndarray]


@dataclass(frozen=True)
class Collector:
    """Turns prompts into experience: every process works on its share, and all end with the whole.

    Args:
        sampler: answers prompts with the current policy.
        actor: passes of the model of that policy.
        reference: passes of the frozen initial policy.
        critic: passes of the value model.
        rewards: the reward sources.
        tokenizer: decodes answers for the reward sources.
        batch_size: rows of one scoring forward pass.
        timer: told of the phases "reshard", "rollout" and "score".
    """

    sampler: Sampler
    actor: Pipeline
    reference: Pipeline
    critic: Pipeline
    rewards: WeightedRewards
    tokenizer: object
    batch_size: int
    timer: PhaseTimer

    def collect(
        self,
        prompts: Sequence[dict],
        samples_per_prompt: int,
        seed: int,
        iteration: int,
        sampling: SamplingParameters,
        trust_engine: bool = True,
    ) -> Collected:
        """Answer each prompt ``samples_per_prompt`` times and measure everything on the answers.

        Args:
            prompts: items of a PromptOnlyDataset, the same global list on every process.
            seed, iteration: decide, with prompt id and sample number, every random choice.
            trust_engine: take the engine's log-probabilities; False has the actor's own forward pass compute them,
                for in 16 bits two ways of computing them differ too much for a ratio.
        """
        collected = self._answer(prompts, samples_per_prompt, seed, iteration, sampling)
        experience, temperature = collected.experience, sampling.temperature or 1.0
        with self.timer("score"):
            self._fill_log_probs(experience.ref_log_probs, self.reference, experience, temperature)
            if not trust_engine:
                self._fill_log_probs(experience.log_probs, self.actor, experience, temperature)
            self._fill(experience.values, self.critic, experience, response_values)
        return collected

    def evaluate(self, prompts: Sequence[dict], seed: int, iteration: int, sampling: SamplingParameters) -> Collected:
        """As ``collect``, one answer a prompt and without values, which stay 0: nothing is learnt from these."""
        collected = self._answer(prompts, 1, seed, iteration, sampling)
        temperature = sampling.temperature or 1.0
        self._fill_log_probs(collected.experience.ref_log_probs, self.reference, collected.experience, temperature)
        return collected

    def _answer(
        self, prompts: Sequence[dict], samples_per_prompt: int, seed: int, iteration: int, sampling: SamplingParameters
    ) -> Collected:
        """All answers with their rewards; log-probabilities of the reference and values are still 0."""
        asked = [(item, k) for item in prompts for k in range(samples_per_prompt)]
        with self.timer("reshard"):
            self.sampler.refresh()
        with self.timer("rollout"):
            own = deal(range(len(asked)), lambda row: len(asked[row][0]["input_ids"]), *self.sampler.part)
            draws = [Draw(seed, iteration, int(asked[row][0]["prompt_id"]), asked[row][1]) for row in own]
            rollout = self.sampler.answer([asked[row][0]["input_ids"] for row in own], draws, sampling)
            parts = self.sampler.gather(_join(own, [asked[row][0] for row in own], rollout))
        experience = merge(parts)
        with self.timer("score"):
            answers = [self._decode(experience, row) for row in range(len(experience))]
            components = self._reward([item for item, _ in asked], answers, experience)
        return Collected(experience, answers, components)

    def _decode(self, experience: Experience, row: int) -> str:
        ids = experience.response_ids[row][experience.response_mask[row]].tolist()
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _reward(self, items: list[dict], answers: list[str], experience: Experience) -> dict[str, np.ndarray]:
        """Fill in the scores, every process judging its share; returns the components of each."""
        place = topology()
        own = deal(range(len(items)), experience.lengths.__getitem__, place.data_rank, place.data_size)
        judged = gather_objects((own, *self._judge(own, items, answers, experience)))
        names = next(components for rows, _, components in judged if rows)
        whole = {name: np.zeros(len(items), dtype=np.float32) for name in names}
        for rows, scores, components in judged:
            experience.scores[rows] = scores
            for name, values in components.items():
                whole[name][rows] = values
        return whole

    def _judge(
        self, rows: list[int], items: list[dict], answers: list[str], experience: Experience
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        if not rows:  # fewer answers than processes
            self.rewards.sit_out()
            return np.zeros([0], dtype=np.float32), {}
        batch = RewardBatch(
            prompts=[items[row]["prompt"] for row in rows],
            responses=[answers[row] for row in rows],
            finished=experience.finished[rows],
            samples=[items[row]["sample"] for row in rows],
            prompt_ids=[items[row]["input_ids"] for row in rows],
            response_ids=[experience.response_ids[row][experience.response_mask[row]] for row in rows],
        )
        return self.rewards.score(batch)

    def _fill_log_probs(
        self, target: np.ndarray, model: Pipeline, experience: Experience, temperature: float
    ) -> None:
        def log_probs(*inputs: Any) -> paddle.Tensor:
            return response_log_probs(*inputs, temperature)[0]

        self._fill(target, model, experience, log_probs)

    def _fill(
        self, target: np.ndarray, model: Pipeline, experience: Experience, measure: Callable[..., paddle.Tensor]
    ) -> None:
        """Write what the model says about every answer token into ``target`` [N, T], a few rows at a time.

        Args: measure: (model, hidden, packed, response_mask) -> float32 [B, T'].
        """
        lengths = experience.attention_mask.sum(-1)
        shares = own_micro_batches(range(len(experience)), lengths.__getitem__, self.batch_size)

        def micro_batch(rows: list[int]) -> MicroBatch:
            part = experience.take(np.asarray(rows))
            packed, mask = pack_experience(part)

            def finish(hidden: paddle.Tensor) -> tuple[None, np.ndarray]:
                return None, measure(model.model, hidden, packed, mask).numpy()

            return MicroBatch(packed.input_ids, packed.attention_mask, finish)

        measured = model.forward([micro_batch(rows) for rows in shares])
        for rows, values in chain(*gather_objects(list(zip(shares, measured, strict=True)))):
            target[rows, : values.shape[1]] = values


def pack_experience(part: Experience) -> tuple[Packed, paddle.Tensor]:
    """Prompts and answers without padding between them, the answers' tokens being targets, and their mask [B, T]."""
    ids, attention_mask, mask = as_tensors(part.input_ids, part.attention_mask, part.response_mask)
    return pack_responses(ids, attention_mask, mask), mask


def as_tensors(*arrays: np.ndarray) -> tuple[paddle.Tensor, ...]:
    """Tensors on the current device of NumPy arrays."""
    return tuple(paddle.to_tensor(array) for array in arrays)


def response_values(
    critic: paddle.nn.Layer, hidden: paddle.Tensor, packed: Packed, response_mask: paddle.Tensor
) -> paddle.Tensor:
    """float32 [B, T]: the value of the state *before* each answer token; arguments as ``response_log_probs``."""
    values = before_targets(critic.scores(hidden), packed)
    return paddle.scatter_nd(paddle.nonzero(response_mask), values, response_mask.shape)


def _join(rows: list[int], items: list[dict], rollout: Rollout) -> Experience:
    width = max((len(item["input_ids"]) for item in items), default=1)
    prompt_ids = np.zeros([len(items), width], dtype=np.int64)
    prompt_mask = np.zeros([len(items), width], dtype=bool)
    for i, item in enumerate(items):
        prompt_ids[i, width - len(item["input_ids"]) :] = item["input_ids"]
        prompt_mask[i, width - len(item["input_ids"]) :] = True
    return Experience(
        row=np.asarray(rows, dtype=np.int64),
        prompt_id=np.asarray([item["prompt_id"] for item in items], dtype=np.int64),
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        response_ids=np.where(rollout.response_mask, rollout.response_ids, 0),  # the padding that merge adds
        response_mask=rollout.response_mask,
        finished=rollout.finished,
        log_probs=rollout.log_probs,
        entropy=rollout.entropy,
        ref_log_probs=np.zeros_like(rollout.log_probs),
        values=np.zeros_like(rollout.log_probs),
        scores=np.zeros(len(items), dtype=np.float32),
    )
