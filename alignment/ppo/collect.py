"""Collecting experience: the policy answers, the other three models and the reward sources judge."""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
import paddle

from alignment.parallel.collectives import gather_objects
from alignment.parallel.pipeline import MicroBatch, Pipeline
from alignment.parallel.topology import topology
from alignment.ppo.experience import Experience, merge
from alignment.ppo.models.policy import Packed, before_targets, pack_responses, response_log_probs
from alignment.ppo.reference_answers import ReferenceScores
from alignment.ppo.reshard import Sampler
from alignment.ppo.rewards import RewardBatch, WeightedRewards
from alignment.ppo.rewards.divided import score_divided, score_finite
from alignment.ppo.rollout.balance import ExpectedLengths, share_out
from alignment.ppo.rollout.protocol import Draw, Rollout, SamplingParameters
from alignment.runtime.timing import PhaseTimer
from alignment.training.batches import own_micro_batches


@dataclass(frozen=True)
class Collected:
    """The experience of all processes, in one order, with what only people and metrics want to know.

    answers: N decoded answers; components: {"rewards/<source>": float32 [N]}, unweighted.
    statistics: metrics of the rollout that the experience does not tell.
    drawn_by: int64 [N], the rank that drew each answer.
    reference_scores: float32 [N], scores of the data set's own answers to the same prompts; None if not asked for.
    judged: float32 [N], the judge's scores; only of an evaluation, and only with a judge.
    """

    experience: Experience
    answers: list[str]
    components: dict[str, np.ndarray]
    statistics: dict[str, float]
    drawn_by: np.ndarray
    reference_scores: np.ndarray | None = None
    judged: np.ndarray | None = None


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
        judge: scores what ``evaluate`` draws, and nothing else; None: no judge.
    """

    sampler: Sampler
    actor: Pipeline
    reference: Pipeline
    critic: Pipeline
    rewards: WeightedRewards
    tokenizer: object
    batch_size: int
    timer: PhaseTimer
    reference_scores: ReferenceScores | None = None
    judge: WeightedRewards | None = None
    expected: ExpectedLengths = field(default_factory=ExpectedLengths)

    def collect(
        self,
        prompts: Sequence[dict],
        samples_per_prompt: int,
        seed: int,
        iteration: int,
        sampling: SamplingParameters,
        trust_engine: bool = True,
    ) -> Collected:
        """Answer each prompt ``samples_per_prompt`` times, keep those that ``sampling.keep`` says, measure everything.

        What is measured need not be finite (alignment.ppo.nonfinite).

        Args:
            prompts: items of a PromptOnlyDataset, the same global list on every process.
            seed, iteration: decide, with prompt id and sample number, every random choice.
            trust_engine: take the engine's log-probabilities; False has the actor's own forward pass compute them,
                for in 16 bits two ways of computing them differ too much for a ratio.
        """
        collected = self._answer(prompts, samples_per_prompt, seed, iteration, sampling, keep_nonfinite=True)
        self.expected.update(collected.experience.prompt_id, collected.experience.lengths)
        experience, temperature = collected.experience, sampling.temperature or 1.0
        with self.timer("score"):
            if self.reference_scores is not None:
                items = [prompts[row // (sampling.keep or samples_per_prompt)] for row in experience.row]
                collected = replace(collected, reference_scores=self.reference_scores(items))
            self._fill_log_probs(experience.ref_log_probs, self.reference, experience, temperature)
            if not trust_engine:
                self._fill_log_probs(experience.log_probs, self.actor, experience, temperature)
            self._fill(experience.values, self.critic, experience, response_values)
        return collected

    def evaluate(self, prompts: Sequence[dict], seed: int, iteration: int, sampling: SamplingParameters) -> Collected:
        """As ``collect``, one answer a prompt and without values, which stay 0: nothing is learnt from these.

        Raises: RunError for a reward that is not finite.
        """
        collected = self._answer(prompts, 1, seed, iteration, sampling)
        experience, temperature = collected.experience, sampling.temperature or 1.0
        self._fill_log_probs(experience.ref_log_probs, self.reference, experience, temperature)
        if self.judge is None:
            return collected
        items = [prompts[row] for row in experience.row]
        return replace(collected, judged=self._score(self.judge, items, collected.answers, experience)[0])

    def _answer(
        self,
        prompts: Sequence[dict],
        samples_per_prompt: int,
        seed: int,
        iteration: int,
        sampling: SamplingParameters,
        keep_nonfinite: bool = False,
    ) -> Collected:
        """All answers with their rewards; log-probabilities of the reference and values are still 0."""
        with self.timer("reshard"):
            self.sampler.refresh()
        with self.timer("rollout"):
            asked = self._own(prompts, samples_per_prompt, sampling)
            draws = [Draw(seed, iteration, int(prompts[i]["prompt_id"]), k) for i, k in asked]
            rollout = self.sampler.answer([prompts[i]["input_ids"] for i, _ in asked], draws, sampling)
            kept = sampling.keep or samples_per_prompt
            numbered = _number(asked, rollout.kept, renumber=sampling.keep is not None)
            rows = [prompt * kept + number for prompt, number in numbered]
            own = _join([prompts[asked[i][0]] for i in np.flatnonzero(rollout.kept)], rows, rollout)
            everything = self.sampler.gather((own, rollout.drawn_tokens, topology().rank))
            parts, drawn, ranks = zip(*everything, strict=True)
        experience = merge(parts)
        rank_of = {row: rank for part, rank in zip(parts, ranks, strict=True) for row in part.row.tolist()}
        drawn_by = np.asarray([rank_of[row] for row in experience.row.tolist()])
        with self.timer("score"):
            answers = [self._decode(experience, row) for row in range(len(experience))]
            items = [prompts[row // kept] for row in experience.row]
            experience.scores[:], components = self._score(self.rewards, items, answers, experience, keep_nonfinite)
        statistics = {"rollout/drawn_tokens": float(sum(drawn)), "rollout/tokens": float(experience.lengths.sum())}
        return Collected(experience, answers, components, statistics, drawn_by)

    def _own(
        self, prompts: Sequence[dict], samples_per_prompt: int, sampling: SamplingParameters
    ) -> list[tuple[int, int]]:
        """(prompt, sample) of the answers that this process draws: all of a prompt, which is then read once.

        Fewer prompts than processes are divided by samples, unless answers to a prompt must be compared.
        """
        index, count = self.sampler.part
        costs = [
            len(item["input_ids"]) + samples_per_prompt * self.expected.of(int(item["prompt_id"])) for item in prompts
        ]
        if len(prompts) >= count or sampling.keep is not None or sampling.token_budget is not None:
            return [(i, k) for i in share_out(costs, index, count) for k in range(samples_per_prompt)]
        rows = [(i, k) for i in range(len(prompts)) for k in range(samples_per_prompt)]
        return [rows[row] for row in share_out([costs[i] for i, _ in rows], index, count)]

    def _decode(self, experience: Experience, row: int) -> str:
        ids = experience.response_ids[row][experience.response_mask[row]].tolist()
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _score(
        self,
        rewards: WeightedRewards,
        items: list[dict],
        answers: list[str],
        experience: Experience,
        keep_nonfinite: bool = False,
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """As ``score_divided`` or, but for ``keep_nonfinite``, ``score_finite`` of all answers."""
        batch = RewardBatch(
            prompts=[item["prompt"] for item in items],
            responses=answers,
            finished=experience.finished,
            samples=[item["sample"] for item in items],
            prompt_ids=[item["input_ids"] for item in items],
            response_ids=[
                ids[mask] for ids, mask in zip(experience.response_ids, experience.response_mask, strict=True)
            ],
        )
        if keep_nonfinite:
            return score_divided(rewards, batch)
        return score_finite(rewards, batch, [f"{number} (held out)" for number in experience.prompt_id])

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


def _number(asked: list[tuple[int, int]], kept: np.ndarray, renumber: bool) -> Iterator[tuple[int, int]]:
    """(prompt, number among its answers) of the kept ones, closing the gaps if ``renumber``."""
    seen: Counter[int] = Counter()
    for i in np.flatnonzero(kept):
        prompt, sample = asked[i]
        yield prompt, seen[prompt] if renumber else sample
        seen[prompt] += 1


def _join(items: list[dict], rows: list[int], rollout: Rollout) -> Experience:
    """The kept answers of a rollout; items: their prompts, rows: their places in the global batch."""
    chosen = np.flatnonzero(rollout.kept)
    width = max((len(item["input_ids"]) for item in items), default=1)
    prompt_ids = np.zeros([len(items), width], dtype=np.int64)
    prompt_mask = np.zeros([len(items), width], dtype=bool)
    for i, item in enumerate(items):
        prompt_ids[i, width - len(item["input_ids"]) :] = item["input_ids"]
        prompt_mask[i, width - len(item["input_ids"]) :] = True
    mask = rollout.response_mask[chosen]
    return Experience(
        row=np.asarray(rows, dtype=np.int64),
        prompt_id=np.asarray([item["prompt_id"] for item in items], dtype=np.int64),
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        response_ids=np.where(mask, rollout.response_ids[chosen], 0),  # the padding that merge adds
        response_mask=mask,
        finished=rollout.finished[chosen],
        log_probs=rollout.log_probs[chosen],
        entropy=rollout.entropy[chosen],
        ref_log_probs=np.zeros(mask.shape, np.float32),
        values=np.zeros(mask.shape, np.float32),
        scores=np.zeros(len(items), dtype=np.float32),
    )
