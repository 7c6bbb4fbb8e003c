"""The losses of policy and critic on some logged answers, as micro-batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import numpy as np
import paddle

from alignment.parallel.collectives import gather_objects
from alignment.parallel.pipeline import MicroBatch
from alignment.ppo import losses
from alignment.ppo.collect import as_tensors, pack_experience, response_values
from alignment.ppo.experience import Experience, Targets
from alignment.ppo.learner import Sums, add_up, policy_loss
from alignment.ppo.models.policy import response_log_probs
from alignment.training.batches import own_micro_batches

# (some answers, their targets, actions of the whole optimizer step) -> a micro-batch whose report is Sums
Objective = Callable[[Experience, Targets, float], MicroBatch]


def policy_micro_batch(
    args: Any, model: paddle.nn.Layer, part: Experience, targets: Targets, tokens: float
) -> MicroBatch:
    """args.policy_loss; its stats compare with the initial policy, which is the anchor too."""
    packed, mask = pack_experience(part)
    initial, advantages = as_tensors(part.ref_log_probs, targets.advantages)

    def finish(hidden: paddle.Tensor) -> tuple[paddle.Tensor, Sums]:
        """The objective from final hidden states [B, L, H], and sums over its tokens."""
        new, entropy = response_log_probs(model, hidden, packed, mask, args.temperature)
        loss, stats = policy_loss(args, new, initial, initial, advantages, mask, tokens)
        sums = {name: float(value) for name, value in stats._asdict().items()}
        return loss, Counter(sums | {"policy": float(loss), "entropy": float(losses.masked_sum(entropy, mask))})

    return MicroBatch(packed.input_ids, packed.attention_mask, finish)


def value_micro_batch(
    args: Any, model: paddle.nn.Layer, part: Experience, targets: Targets, tokens: float
) -> MicroBatch:
    """Squared error of the critic ``model`` against the returns."""
    packed, mask = pack_experience(part)
    old, returns = as_tensors(part.values, targets.returns)

    def finish(hidden: paddle.Tensor) -> tuple[paddle.Tensor, Sums]:
        values = response_values(model, hidden, packed, mask)
        loss, _ = losses.value_loss(values, old, returns, mask, args.clip_range_value, tokens)
        return loss, Counter({"value": float(loss)})

    return MicroBatch(packed.input_ids, packed.attention_mask, finish)


def micro_batches(
    objective: Objective, experience: Experience, targets: Targets, rows: np.ndarray, size: int
) -> list[MicroBatch]:
    """This process's share of the given rows, ``size`` of them in each."""
    lengths = experience.attention_mask[rows].sum(-1)
    length_of, tokens = dict(zip(rows.tolist(), lengths.tolist(), strict=True)), experience.lengths[rows].sum()
    result = []
    for share in own_micro_batches(rows.tolist(), length_of.__getitem__, size):
        part = experience.take(np.asarray(share))
        micro = objective(part, targets.take(np.asarray(share), part.response_ids.shape[1]), float(tokens))
        result.append(micro._replace(samples=part.prompt_id.tolist()))
    return result


def sum_up(reports: Iterable[Sums]) -> Sums:
    """The sum of the reports of all processes."""
    return add_up(chain(*gather_objects(list(reports))))
