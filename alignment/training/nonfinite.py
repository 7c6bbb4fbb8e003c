"""Numbers that are not finite: whose they are, and whether the run stops or leaves the step out.

Whether a step is bad every process knows from what is summed anyway (the gradient's norm, the loss). Only then the
micro-batches run once more, one by one, to find whose samples are to blame.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import paddle

from alignment.parallel.collectives import gather_objects
from alignment.parallel.pipeline import MicroBatch
from alignment.parallel.topology import topology
from alignment.runtime.console import say
from alignment.runtime.faults import RunError
from alignment.runtime.whereabouts import here

if TYPE_CHECKING:
    from alignment.training.engine import TrainingEngine

MOST_NAMED = 8  # samples of a rank that a message names


class Culprit(NamedTuple):
    """Samples, by their indices in the data set, and the rank that worked on them."""

    rank: int
    samples: tuple[int | str, ...]


@dataclass
class Guard:
    """What becomes of a step that cannot be taken. Every process has one and tells it the same.

    policy: "stop" or "skip"; limit: of steps left out in a row, at which "skip" stops too.
    """

    policy: str = "stop"
    limit: int = 1
    in_a_row: int = 0

    @classmethod
    def from_arguments(cls, args: Any) -> Guard:
        """As a stage's arguments say."""
        return cls(args.nonfinite, args.nonfinite_limit)

    def refuse(self, fault: str) -> None:
        """Count and say a step that is left out. Raises: RunError if the run is to stop."""
        if self.policy == "stop":
            raise RunError(f'{fault}; "nonfinite": "skip" would leave this step out')
        self.in_a_row += 1
        if self.in_a_row >= self.limit:
            raise RunError(f'{fault}; "nonfinite_limit": {self.limit} steps in a row were not possible')
        say(f"skipped: {fault}")

    def accept(self) -> None:
        """A step was taken."""
        self.in_a_row = 0

    def count(self, skipped: int) -> dict[str, float]:
        """The metric that tells of ``skipped`` steps; none where a run never skips."""
        return {"skipped_steps": float(skipped)} if self.policy == "skip" else {}


def tell_fault(quantity: str, value: float, culprits: Iterable[Culprit], advice: str, nobody: str = "") -> str:
    """One line: step, phase, what is not finite, its value, whose samples (else ``nobody``), what to do."""
    return f"{here}: the {quantity} is not finite ({value}): {_name(culprits) or nobody}; {advice}"


def describe_bad_step(engine: TrainingEngine, loss: float, norm: float) -> str:
    """What is wrong with the gradients that ``engine`` has added up. Every process of the job calls it.

    Args: loss: of the whole step, norm: of its gradient; at least one is not finite.
    """
    name, value = ("gradient", norm) if math.isfinite(loss) else ("loss", loss)
    quantity = f"{name} of the {engine.name}"
    spoilt = [name for name in gather_objects(next(_bad_weights(engine), None), "world") if name]
    if spoilt:
        advice = f'go on from a checkpoint with a lower "learning_rate" (now {engine.peak_learning_rate:g})'
        return f"{here}: the {quantity} is not finite ({value}): the weights are not: {spoilt[0]}; {advice}"
    with paddle.enable_grad():
        own = _rerun(engine)
    culprits = [culprit for found in gather_objects(own, "world") for culprit in found]
    advice = f'look at these samples, lower "learning_rate" ({engine.peak_learning_rate:g})'
    nobody = "no single micro-batch alone: their sum is too large for a float"
    return tell_fault(quantity, value, culprits, advice, nobody)


def check_state(engine: TrainingEngine) -> None:
    """Raises RunError, naming the tensor, if trained weights or optimizer tensors of this process are not finite."""
    bad = next(_bad_weights(engine), None)
    if bad is None and engine.optimizer:
        with engine.optimizer_home(False):
            bad = next((tensor.name for tensor in engine.optimizer_tensors() if not _is_finite(tensor)), None)
    if bad is not None:
        raise RunError(
            f"{here}: rank {topology().rank}: {bad} of the {engine.name} is not finite, so no checkpoint was written; "
            f'go on from the one before with a lower "learning_rate" (now {engine.peak_learning_rate:g})'
        )


def _bad_weights(engine: TrainingEngine) -> Iterator[str]:
    """Names of the trained parameters here that are not finite."""
    with engine.shards.home(False):
        yield from (engine.names[p.name] for p in engine.shards.own if not _is_finite(p))


def _rerun(engine: TrainingEngine) -> list[Culprit]:
    """Each micro-batch of the step alone once more: those of this process that are to blame."""
    found = []
    for micro_batches, idle_rounds in list(engine.seen):
        for micro in micro_batches:
            loss, rows, has_finite_gradients = _run_alone(engine, micro)
            if not math.isfinite(loss) or not has_finite_gradients:
                samples = [micro.samples[row] for row in rows] or micro.samples
                found.append(Culprit(topology().rank, tuple(samples)))
        engine.discard()
        engine.accumulate([], idle_rounds)
    engine.discard()
    return found


def _run_alone(engine: TrainingEngine, micro: MicroBatch) -> tuple[float, list[int], bool]:
    """A micro-batch's loss, its rows whose hidden states are not finite, and whether its own gradients are."""
    engine.discard()
    sent: list[bool] = []  # from sharding stage 2 on gradients leave for their owners at once, who sum them
    with engine.shards.looking_at_gradients(lambda flat: sent.append(_is_finite(flat))):
        ((loss, rows),) = engine.accumulate([micro._replace(finish=partial(_examine, micro))])
    kept = (_is_finite(parameter.grad) for parameter in engine.parameters if parameter.grad is not None)
    return loss, rows, all(sent) and all(kept)


def _examine(micro: MicroBatch, hidden: paddle.Tensor) -> tuple[paddle.Tensor, tuple[float, list[int]]]:
    """The loss, and as report its value and the rows whose hidden states [B, L, H] are not finite."""
    loss, _ = micro.finish(hidden)
    if hidden.shape[0] != len(micro.samples):  # a sample may have several rows
        return loss, (float(loss), [])
    return loss, (float(loss), [row for row in range(len(micro.samples)) if not _is_finite(hidden[row])])


def _is_finite(tensor: paddle.Tensor) -> bool:
    if math.isfinite(float(tensor.sum(dtype="float32"))):  # ten times as fast, and enough but for huge numbers
        return True
    return bool(paddle.isfinite(tensor.astype("float32")).all())


def _name(culprits: Iterable[Culprit]) -> str:
    by_rank: dict[int, dict[int | str, None]] = {}
    for culprit in culprits:
        by_rank.setdefault(culprit.rank, {}).update(dict.fromkeys(culprit.samples))
    return "; ".join(f"rank {rank}{_list(list(samples))}" for rank, samples in sorted(by_rank.items()))


def _list(samples: Sequence[int | str]) -> str:
    shown = ", ".join(map(str, samples[:MOST_NAMED]))
    more = f" and {len(samples) - MOST_NAMED} more" if len(samples) > MOST_NAMED else ""
    return f", sample{'s' * (len(samples) > 1)} {shown}{more}" if samples else ""
