"""What every reward source promises: one finite float per response, or a fault that says what went wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from alignment.parallel.collectives import from_head
from alignment.parallel.topology import topology
from alignment.runtime.faults import RunError, UsageError


@dataclass(frozen=True)
class RewardBatch:
    """N sampled responses to score.

    prompts: N rendered prompts, as the actor read them.
    responses: N decoded responses, special tokens dropped.
    finished: bool [N], True where the response ended with EOS.
    samples: N dicts, the data set's own sample (RawSample) behind each prompt.
    prompt_ids: N int64 [L], unpadded; None where only the text is known (behind a reward server).
    response_ids: N int64 [T], unpadded, EOS included where it was produced; None like prompt_ids.
    """

    prompts: list[str]
    responses: list[str]
    finished: np.ndarray
    samples: list[dict[str, Any]]
    prompt_ids: list[np.ndarray] | None = None
    response_ids: list[np.ndarray] | None = None

    def __post_init__(self) -> None:
        counts = {len(column) for column in vars(self).values() if column is not None}
        if len(counts) != 1:
            lengths = {name: len(column) for name, column in vars(self).items() if column is not None}
            raise ValueError(f"RewardBatch: columns of different length: {lengths}")

    def __len__(self) -> int:
        return len(self.responses)

    def take(self, rows: Sequence[int]) -> RewardBatch:
        """The given responses."""
        columns = {name: column for name, column in vars(self).items() if name != "finished"}
        lists = {name: column and [column[row] for row in rows] for name, column in columns.items()}
        return RewardBatch(finished=self.finished[list(rows)], **lists)


class NonFiniteReward(RunError):
    """Some rewards are not finite float32.

    Attributes: values: all of them, float32 [N], those that are too large for float32 as infinities.
    """

    def __init__(self, message: str, values: np.ndarray) -> None:
        super().__init__(message)
        self.values = values


class RewardSource(Protocol):
    """Scores responses. `name` is short and appears in metrics as rewards/<name>.

    is_divided: several processes score one batch together, so that all of them must be asked.
    """

    name: str
    is_divided: bool = False

    def check(self) -> None:
        """Raise RunError now if the source cannot work; called once, before training. Nothing to do by default."""

    def sit_out(self) -> None:
        """Called in place of scoring where this process has no response but others have. Nothing to do by default."""

    def __call__(self, batch: RewardBatch) -> np.ndarray:
        """Return float32 [N], all finite; raise RunError otherwise."""
        ...


def check_rewards(values: Any, count: int, who: str) -> np.ndarray:
    """Turn what a user's function or server returned into float32 [count].

    values: a list, tuple, or anything with `tolist` (NumPy, Paddle, torch, pandas) of `count` numbers.
    Raises RunError, naming `who`, for any other type or a wrong length, NonFiniteReward for a value that is not a
    finite float32.
    """
    kind = type(values).__name__
    rows = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(rows, (list, tuple)):
        raise RunError(f"{who} returned {kind}, not a sequence of {count} numbers")
    if len(rows) != count:
        raise RunError(f"{who} returned {len(rows)} rewards for {count} responses")
    numbers = [_as_number(row, index, who) for index, row in enumerate(rows)]
    with np.errstate(over="ignore"):
        rewards = np.array(numbers, dtype=np.float32)
    bad = np.flatnonzero(~np.isfinite(rewards))
    if bad.size:
        problem = f"{who} returned {numbers[bad[0]]} for response {bad[0]}, which is not a finite float32"
        raise NonFiniteReward(problem, rewards)
    return rewards


def _as_number(value: Any, index: int, who: str) -> float:
    if hasattr(value, "tolist"):  # a list of NumPy scalars or 0-d tensors
        value = value.tolist()
    if not isinstance(value, (bool, int, float)):
        raise RunError(f"{who} returned {value!r:.80} for response {index}, which is not a number")
    try:
        return float(value)
    except OverflowError:  # an int of more than 308 digits
        return math.inf


def _ask(source: RewardSource, batch: RewardBatch, keep: bool) -> np.ndarray:
    """A model is run by all its processes together; anything else is asked once for those with the same responses."""
    if source.is_divided:
        return _kept(lambda: source(batch), keep)
    return from_head(_kept(lambda: source(batch), keep) if topology().is_head else None)


def _kept(rewards: Callable[[], np.ndarray], keep: bool) -> np.ndarray:
    """The rewards; with ``keep`` also where some are not finite."""
    try:
        return rewards()
    except NonFiniteReward as fault:
        if not keep:
            raise
        return fault.values


class WeightedRewards(RewardSource):
    """sum_i weights[i] * sources[i]; every component is kept, unweighted, for the metrics."""

    def __init__(self, sources: Sequence[RewardSource], weights: Sequence[float] | None = None) -> None:
        """weights: one finite number per source, by default 1.0 each. Raises UsageError when they do not match."""
        weights = [1.0] * len(sources) if weights is None else list(weights)
        if not sources:
            raise UsageError("no reward source: name a reward model, a reward function or a reward server")
        if len(weights) != len(sources) or not all(math.isfinite(weight) for weight in weights):
            names = [source.name for source in sources]
            raise UsageError(f"reward weights {weights}: one finite number is needed for each of {names}")
        self.name = "weighted_sum"
        self.weights = weights
        self.sources: dict[str, RewardSource] = {}
        for source in sources:
            key, number = source.name, 2
            while key in self.sources:  # two functions may share a name: length, length_2
                key, number = f"{source.name}_{number}", number + 1
            self.sources[key] = source

    def check(self) -> None:
        for source in self.sources.values():
            source.check()

    def sit_out(self) -> None:
        for source in self.sources.values():
            source.sit_out()

    def score(self, batch: RewardBatch, keep_nonfinite: bool = False) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return the weighted sum, float32 [N], and {"rewards/<name>": float32 [N]} unweighted.

        The components come per response, not as means, so that the trainer can average them over all ranks.
        Raises RunError when a source fails or, but for ``keep_nonfinite``, a reward or the sum is not finite.
        """
        components = {f"rewards/{name}": _ask(source, batch, keep_nonfinite) for name, source in self.sources.items()}
        total = sum(w * part.astype(np.float64) for w, part in zip(self.weights, components.values(), strict=True))
        checked = _kept(lambda: check_rewards(total, len(batch), "the weighted sum of rewards"), keep_nonfinite)
        return checked, components

    def __call__(self, batch: RewardBatch) -> np.ndarray:
        return self.score(batch)[0]
