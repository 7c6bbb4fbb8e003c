"""Collecting experience: the policy answers, the other three models and the reward sources judge."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import paddle

from alignment.parallel.data_parallel import gather_objects, rank, world_size
from alignment.ppo.experience import Experience, merge
from alignment.ppo.models.policy import pack, position_ids_of, response_log_probs, response_targets
from alignment.ppo.rewards import RewardBatch, WeightedRewards
from alignment.ppo.rollout.protocol import Draw, Rollout, RolloutEngine, SamplingParameters
from alignment.runtime.timing import PhaseTimer


@dataclass(frozen=True)
class Collected:
    """The experience of all ranks, in one order, with what only people and metrics want to know.

    answers: N decoded answers; components: {"rewards/<source>": float32 [N]}, unweighted.
    """

    experience: Experience
    answers: list[str]
    components: dict[str, np.ndarray]


@dataclass(frozen=True)
class Collector:
    """Turns prompts into experience: every rank works on its share, and all end with the whole.

    Args:
        engine: answers prompts with the current policy.
        actor: the model of that policy.
        reference: the frozen initial policy.
        critic: value model, in its current state.
        rewards: the reward sources.
        tokenizer: decodes answers for the reward sources.
        batch_size: rows of one scoring forward pass.
        timer: told of the phases "rollout" and "score".
    """

    engine: RolloutEngine
    actor: paddle.nn.Layer
    reference: paddle.nn.Layer
    critic: paddle.nn.Layer
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
            prompts: items of a PromptOnlyDataset, the same global list on every rank.
            seed, iteration: decide, with prompt id and sample number, every random choice.
            trust_engine: take the engine's log-probabilities; False has the actor's own forward pass compute them,
                for in 16 bits two ways of computing them differ too much for a ratio.
        """
        experience, answers, components = self._answer(prompts, samples_per_prompt, seed, iteration, sampling)
        temperature = sampling.temperature or 1.0
        with self.timer("score"):
            self._fill_log_probs(experience.ref_log_probs, self.reference, experience, temperature)
            if not trust_engine:
                self._fill_log_probs(experience.log_probs, self.actor, experience, temperature)
            self._fill_values(experience)
            return _merge(gather_objects((experience, answers, components)))

    def evaluate(self, prompts: Sequence[dict], seed: int, iteration: int, sampling: SamplingParameters) -> Collected:
        """As ``collect``, one answer a prompt and without values, which stay 0: nothing is learnt from these."""
        experience, answers, components = self._answer(prompts, 1, seed, iteration, sampling)
        self._fill_log_probs(experience.ref_log_probs, self.reference, experience, sampling.temperature or 1.0)
        return _merge(gather_objects((experience, answers, components)))

    def _answer(
        self, prompts: Sequence[dict], samples_per_prompt: int, seed: int, iteration: int, sampling: SamplingParameters
    ) -> tuple[Experience, list[str], dict[str, np.ndarray]]:
        """This rank's share: answers and their rewards."""
        n = samples_per_prompt
        asked = [(i * n + k, k, item) for i, item in enumerate(prompts) for k in range(n)]
        own = sorted(asked, key=lambda entry: len(entry[2]["input_ids"]))[rank() :: world_size()]
        rows, items = [row for row, _, _ in own], [item for _, _, item in own]
        draws = [Draw(seed, iteration, int(item["prompt_id"]), k) for _, k, item in own]
        self.actor.eval()
        with self.timer("rollout"):
            rollout = self.engine.generate([item["input_ids"] for item in items], draws, sampling)
        with self.timer("score"):
            answers = [self._decode(rollout, i) for i in range(len(items))]
            scores, components = self._reward(items, rollout, answers)
        return _join(rows, items, rollout, scores), answers, components

    def _decode(self, rollout: Rollout, i: int) -> str:
        ids = rollout.response_ids[i][rollout.response_mask[i]].tolist()
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _reward(self, items: list[dict], rollout: Rollout, answers: list[str]):
        if not items:  # fewer prompts than ranks
            return np.zeros([0], dtype=np.float32), {}
        batch = RewardBatch(
            prompts=[item["prompt"] for item in items],
            responses=answers,
            finished=rollout.finished,
            samples=[item["sample"] for item in items],
            prompt_ids=[item["input_ids"] for item in items],
            response_ids=[ids[mask] for ids, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)],
        )
        return self.rewards.score(batch)

    @paddle.no_grad()
    def _fill_log_probs(
        self, target: np.ndarray, model: paddle.nn.Layer, experience: Experience, temperature: float
    ) -> None:
        """Write the model's log-probabilities of the answers into ``target`` [N, T], a few rows at a time."""
        for rows, part in self._batches(experience):
            ids, mask, response_mask = as_tensors(part.input_ids, part.attention_mask, part.response_mask)
            log_probs, _ = response_log_probs(model, ids, mask, response_mask, temperature)
            target[rows, : log_probs.shape[1]] = log_probs.numpy()

    @paddle.no_grad()
    def _fill_values(self, experience: Experience) -> None:
        self.critic.eval()
        for rows, part in self._batches(experience):
            ids, mask, response_mask = as_tensors(part.input_ids, part.attention_mask, part.response_mask)
            values = response_values(self.critic, ids, mask, response_mask)
            experience.values[rows, : values.shape[1]] = values.numpy()

    def _batches(self, experience: Experience) -> Iterator[tuple[np.ndarray, Experience]]:
        order = np.argsort(experience.attention_mask.sum(-1), kind="stable")  # like lengths together: little padding
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            yield rows, experience.take(rows)


def as_tensors(*arrays: np.ndarray) -> tuple[paddle.Tensor, ...]:
    """Tensors on the current device of NumPy arrays."""
    return tuple(paddle.to_tensor(array) for array in arrays)


def response_values(
    critic: paddle.nn.Layer, input_ids: paddle.Tensor, attention_mask: paddle.Tensor, response_mask: paddle.Tensor
) -> paddle.Tensor:
    """float32 [B, T]: the value of the state *before* each answer token; arguments as ``response_log_probs``."""
    targets = response_targets(input_ids, response_mask)
    input_ids, attention_mask, targets = pack(input_ids, attention_mask, targets)
    values = critic(input_ids, attention_mask, position_ids_of(attention_mask))[:, :-1]
    wanted = paddle.nonzero(targets[:, 1:].flatten()).squeeze(-1)
    return paddle.scatter_nd(
        paddle.nonzero(response_mask), paddle.gather(values.flatten(), wanted), response_mask.shape
    )


def _join(rows: list[int], items: list[dict], rollout: Rollout, scores: np.ndarray) -> Experience:
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
        scores=scores,
    )


def _merge(parts: list[tuple[Experience, list[str], dict[str, np.ndarray]]]) -> Collected:
    order = np.argsort(np.concatenate([experience.row for experience, _, _ in parts]), kind="stable")
    answers = [answer for _, part, _ in parts for answer in part]
    names = next(components for experience, _, components in parts if len(experience))
    components = {name: np.concatenate([c[name] for _, _, c in parts if name in c])[order] for name in names}
    return Collected(merge([experience for experience, _, _ in parts]), [answers[i] for i in order], components)
