"""Learning from experience: update_iters passes over its minibatches, one optimizer step of actor and critic each.

The actor goes through all of them, then the critic: neither needs the other meanwhile, and so each is on the device
once an iteration (alignment.ppo.offload).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import paddle

from alignment.parallel.collectives import gather_objects
from alignment.parallel.pipeline import MicroBatch
from alignment.parallel.topology import topology
from alignment.ppo import losses
from alignment.ppo.collect import as_tensors, pack_experience, response_values
from alignment.ppo.experience import Experience, Targets
from alignment.ppo.losses import PolicyStats
from alignment.ppo.models.policy import Packed, response_log_probs
from alignment.ppo.self_check import check_log_probs
from alignment.sft.loss import count_labels, supervised_micro_batch
from alignment.training.batches import BatchSchedule, idle_rounds, own_micro_batches
from alignment.training.engine import TrainingEngine

Sums = Counter[str]
# Final hidden states [B, L, H] -> loss, sums over its tokens, largest |log ratio|.
Objective = Callable[[paddle.Tensor], tuple[paddle.Tensor, dict[str, float], float]]


class Learner:
    """Owns actor and critic. Every process is given the same experience and targets, and works on its share.

    Args:
        args: PPO's TrainingArguments.
        actor, critic: engines of the policy and the value model; critic None: it is a head on the policy.
        ptx_set: data.SupervisedDataset for the language-model term (args.ptx_coeff), or None. Each optimizer step
            takes as many of its texts as it takes answers.
    """

    def __init__(
        self, args: Any, actor: TrainingEngine, critic: TrainingEngine | None, ptx_set: Any | None = None
    ) -> None:
        self.args, self.actor, self.critic, self.ptx_set = args, actor, critic, ptx_set
        own = args.per_device_train_batch_size * args.gradient_accumulation_steps
        self.minibatch_size = own * topology().data_size
        if ptx_set is not None:
            self.ptx_schedule = BatchSchedule(len(ptx_set), self.minibatch_size, args.data_seed)
            self.collate_texts = ptx_set.get_collator()

    def update(
        self, experience: Experience, targets: Targets, iteration: int, tolerance: float = float("inf")
    ) -> dict[str, float]:
        """All optimizer steps of an iteration; returns their metrics, averaged over tokens or steps as named.

        Steps that TrainingEngine.step leaves out count in no average.

        Args: tolerance: largest difference allowed between the log-probabilities of sampling and those of training,
            both before the first step; the ratio is then 1.
        Raises: RunError over ``tolerance``, with nothing learnt, or before a step that is not finite.
        """
        sums, start, minibatches = Counter(), {}, []
        with self.actor.learning():
            for number, rows in enumerate(self._minibatches(len(experience), iteration)):
                step_sums, largest = self._accumulate(self.actor, self._policy_micro_batch, experience, targets, rows)
                if number == 0:
                    start = _describe_start(step_sums, largest)
                    if tolerance < math.inf:
                        check_log_probs(largest, tolerance)
                elif self.args.target_kl and step_sums["approxkl"] / step_sums["tokens"] > self.args.target_kl:
                    break
                if self.ptx_set is not None:
                    step_sums["ptx"] = self._learn_texts(steps_per_iteration(self.args) * (iteration - 1) + number)
                loss = step_sums["policy"] + step_sums["value"] + step_sums["ptx"]
                sums.update(_taken(self.actor.step(loss), step_sums, "actor_norm", {"steps": 1.0}))
                minibatches.append(rows)
        if self.critic is not None:
            sums.update(self._update_critic(experience, targets, minibatches))
        return _describe(sums) | start | self._rates() | self.actor.guard.count(int(sums["skipped"]))

    def leave_out(self, answers: int) -> dict[str, float]:
        """Go over an iteration's steps without learning; returns the metrics of that."""
        steps = self.args.update_iters * math.ceil(answers / self.minibatch_size)
        engines = [engine for engine in (self.actor, self.critic) if engine is not None]
        for engine in engines * steps:
            engine.advance_schedule()
        return self._rates() | self.actor.guard.count(len(engines) * steps)

    def _update_critic(self, experience: Experience, targets: Targets, minibatches: list[np.ndarray]) -> Sums:
        sums: Sums = Counter()
        with self.critic.learning():
            for rows in minibatches:
                step_sums, _ = self._accumulate(self.critic, self._value_micro_batch, experience, targets, rows)
                done = self.critic.step(step_sums["value"])
                sums.update(_taken(done, step_sums, "critic_norm", {"critic_steps": 1.0}))
        return sums

    def _minibatches(self, count: int, iteration: int) -> Iterator[np.ndarray]:
        """Rows of each optimizer step; every pass shuffles the whole batch, by the seed alone."""
        for epoch in range(self.args.update_iters):
            order = np.random.default_rng([self.args.seed, iteration, epoch]).permutation(count)
            yield from (order[start : start + self.minibatch_size] for start in range(0, count, self.minibatch_size))

    def _accumulate(
        self,
        engine: TrainingEngine,
        micro_batch: Callable[[Experience, Targets, float], MicroBatch],
        experience: Experience,
        targets: Targets,
        rows: np.ndarray,
    ) -> tuple[Sums, float]:
        """Gradients of one minibatch; returns sums over all processes and the largest |log ratio| on any."""
        lengths, tokens = experience.attention_mask.sum(-1), float(experience.lengths[rows].sum())
        size = self.args.per_device_train_batch_size
        parts = []
        for micro in own_micro_batches(rows.tolist(), lengths.__getitem__, size):
            part = experience.take(np.asarray(micro))
            parts.append((part, targets.take(np.asarray(micro), part.response_ids.shape[1])))
        micro_batches = [
            micro_batch(part, goals, tokens)._replace(samples=part.prompt_id.tolist()) for part, goals in parts
        ]
        own = engine.accumulate(micro_batches, idle_rounds(len(rows), size))
        sums, differences = zip(*chain(*gather_objects(own)), strict=True)
        return add_up(sums), float(np.max(differences))

    def _policy_micro_batch(self, part: Experience, targets: Targets, tokens: float) -> MicroBatch:
        """The policy's loss, and the value loss too where the critic is a head on the policy."""
        packed, mask = pack_experience(part)
        objectives = [(1.0, self._policy_objective(part, targets, packed, mask, tokens))]
        if self.critic is None:
            value = _value_objective(self.args, self.actor.model, part, targets, packed, mask, tokens)
            objectives.append((self.args.value_loss_coeff, value))
        return MicroBatch(packed.input_ids, packed.attention_mask, partial(_weigh, objectives))

    def _policy_objective(
        self, part: Experience, targets: Targets, packed: Packed, mask: paddle.Tensor, tokens: float
    ) -> Objective:
        args, model = self.args, self.actor.model
        old, anchor, advantages = as_tensors(part.log_probs, part.ref_log_probs, targets.advantages)

        def objective(hidden: paddle.Tensor) -> tuple[paddle.Tensor, dict[str, float], float]:
            """Loss less entropy bonus, sums over the tokens, largest |log ratio|, from hidden states [B, L, H]."""
            new, entropy = response_log_probs(
                model, hidden, packed, mask, args.temperature, train_entropy=args.entropy_coeff > 0
            )
            loss, stats = policy_loss(args, new, old, anchor, advantages, mask, tokens)
            mean_entropy = losses.masked_mean(entropy, mask, tokens)
            sums = {name: float(value) for name, value in stats._asdict().items()}
            sums |= {"policy": float(loss), "entropy": float(mean_entropy)}
            difference = paddle.where(mask, (new.detach() - old).abs(), paddle.zeros_like(old)).max()
            return loss - args.entropy_coeff * mean_entropy, sums, float(difference)

        return objective

    def _value_micro_batch(self, part: Experience, targets: Targets, tokens: float) -> MicroBatch:
        packed, mask = pack_experience(part)
        value = _value_objective(self.args, self.critic.model, part, targets, packed, mask, tokens)
        return MicroBatch(packed.input_ids, packed.attention_mask, partial(_weigh, [(1.0, value)]))

    def _learn_texts(self, number: int) -> float:
        """Mix the language-model term into the actor's step ``number`` of the run; returns its mean over the batch."""
        items = {index: self.ptx_set[index] for index in self.ptx_schedule(number).tolist()}
        denominator, size = count_labels(items.values()), self.args.per_device_train_batch_size
        micro_batches = []
        for part in own_micro_batches(list(items), lambda index: len(items[index]["input_ids"]), size):
            batch = self.collate_texts([items[index] for index in part])
            micro = supervised_micro_batch(self.actor.model, batch, denominator, self.args.ptx_coeff)
            micro_batches.append(micro._replace(samples=[f"{index} of ptx_datasets" for index in part]))
        reports = self.actor.accumulate(micro_batches, idle_rounds(len(items), size))
        return sum(loss for loss, _ in chain(*gather_objects(reports)))

    def _rates(self) -> dict[str, float]:
        rates = {"lr": self.actor.learning_rate}
        return rates if self.critic is None else rates | {"critic/lr": self.critic.learning_rate}


def _value_objective(
    args: Any,
    model: paddle.nn.Layer,
    part: Experience,
    targets: Targets,
    packed: Packed,
    mask: paddle.Tensor,
    tokens: float,
) -> Objective:
    """model: has ``scores``, final hidden states -> values."""
    old, returns = as_tensors(part.values, targets.returns)

    def objective(hidden: paddle.Tensor) -> tuple[paddle.Tensor, dict[str, float], float]:
        """Value loss and sums over the tokens, from hidden states [B, L, H]."""
        values = response_values(model, hidden, packed, mask)
        loss, stats = losses.value_loss(values, old, returns, mask, args.clip_range_value, tokens)
        return loss, {"value": float(loss), "value_clipped": float(stats.clipped)}, 0.0

    return objective


def _weigh(
    objectives: list[tuple[float, Objective]], hidden: paddle.Tensor
) -> tuple[paddle.Tensor, tuple[Sums, float]]:
    """The weighted sum of losses on the same hidden states, and as report all sums and the largest difference."""
    total, sums, largest = 0.0, Counter(), 0.0
    for weight, objective in objectives:
        loss, own, difference = objective(hidden)
        total, largest = total + weight * loss, max(largest, difference)
        sums.update(own)
    return total, (sums, largest)


def add_up(reports: Iterable[Sums]) -> Sums:
    """One Counter of them all; values may be negative, which ``+`` of Counters would drop."""
    total: Sums = Counter()
    for sums in reports:
        total.update(sums)
    return total


def steps_per_iteration(args: Any) -> int:
    """Optimizer steps on a full batch of prompts; a smaller one, and target_kl, may make it fewer."""
    answers = args.per_device_prompt_batch_size * args.num_return_sequences
    minibatch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    return args.update_iters * math.ceil(answers / minibatch)


def policy_loss(
    args: Any,
    new: paddle.Tensor,
    old: paddle.Tensor,
    anchor: paddle.Tensor,
    advantages: paddle.Tensor,
    mask: paddle.Tensor,
    tokens: float,
) -> tuple[paddle.Tensor, PolicyStats]:
    """The objective that args.policy_loss names; tensors [B, T] and ``tokens``, the denominator, as in losses.py."""
    if args.policy_loss == "apa":
        anchor = old if args.apa_anchor == "old" else anchor
        return losses.apa_loss(new, old, anchor, advantages, mask, args.apa_lambda, tokens)
    if args.policy_loss == "awr":
        return losses.awr_loss(new, old, advantages, mask, args.awr_beta, args.awr_weight_clip, tokens)
    if args.policy_loss == "bc":  # behaviour cloning: AWR with weight 1
        return losses.awr_loss(new, old, paddle.zeros_like(advantages), mask, denominator=tokens)
    return losses.ppo_loss(new, old, advantages, mask, args.clip_range_ratio, tokens)


def _taken(done: dict[str, float], sums: Sums, norm: str, count: dict[str, float]) -> Sums:
    """What a step adds to the sums of an iteration: its own with its norm and count, or that it was left out."""
    if done.get("skipped_steps"):
        return Counter(skipped=1)
    return Counter(sums | {norm: done["grad_norm"]} | count)


def _describe_start(sums: Sums, largest: float) -> dict[str, float]:
    """How far training is from sampling before the first step, where both are the same policy."""
    square = (sums["ratio_sq"] - 2 * sums["ratio"]) / sums["tokens"] + 1  # the mean of (ratio - 1)^2
    return {"rollout/probs_diff_max": largest, "val/ratio_start_error": max(square, 0.0)}  # NaN stays NaN


def _describe(sums: Sums) -> dict[str, float]:
    tokens, steps = sums["tokens"], sums["steps"]
    if not steps:
        return {"policy/optimizer_steps": 0.0}
    ratio = sums["ratio"] / tokens
    metrics = {
        "policy/approxkl_avg": sums["approxkl"] / tokens,
        "policy/clipfrac_avg": sums["clipped"] / tokens,
        "policy/entropy_avg": sums["entropy"] / steps,
        "policy/optimizer_steps": steps,
        "loss/policy_avg": sums["policy"] / steps,
        "loss/value_avg": sums["value"] / (sums["critic_steps"] or steps),
        "val/clipfrac_avg": sums["value_clipped"] / tokens,
        "val/ratio": ratio,
        "val/ratio_var": max(sums["ratio_sq"] / tokens - ratio * ratio, 0.0),
        "actor/grad_norm": sums["actor_norm"] / steps,
    }
    if "critic_norm" in sums:
        metrics["critic/grad_norm"] = sums["critic_norm"] / sums["critic_steps"]
    if "ptx" in sums:
        metrics["loss/ptx_avg"] = sums["ptx"] / steps
    if sums["weight_sq"] > 0:  # AWR: how many of the tokens carry the gradient
        metrics["policy/effective_tokens"] = sums["weight"] ** 2 / sums["weight_sq"]
    return metrics
