"""State that PPO carries from iteration to iteration: the KL coefficient and the running moments of scores.

Plain Python floats, updated with numbers that are the same on every rank, so the state is the same in every layout.
Every class has ``state_dict() -> dict`` (JSON-serialisable) and ``load_state_dict(state)``, exact to the last bit.
"""

from __future__ import annotations

import math

from paddle import Tensor

from alignment.ppo.losses import VARIANCE_EPSILON, masked_moments, mean_variance

SCORE_SCALINGS = ("none", "normalize", "running", "first", "fixed")


class _State:
    """state_dict and load_state_dict over the attributes named in STATE."""

    STATE: tuple[str, ...]

    def state_dict(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in self.STATE}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Raises ValueError, and changes nothing, where the names differ from those of state_dict()."""
        if set(state) != set(self.STATE):
            raise ValueError(f"{type(self).__name__} state has {sorted(state)}, expected {sorted(self.STATE)}")
        for name in self.STATE:
            setattr(self, name, state[name])


class FixedKLController(_State):
    """``coefficient`` stays what it is."""

    STATE = ("coefficient",)

    def __init__(self, kl_coeff: float):
        self.coefficient = kl_coeff

    def update(self, kl: float, answers: int) -> None:
        """Does nothing; the arguments are AdaptiveKLController's."""


class AdaptiveKLController(_State):
    """Steers the KL towards a target (Ziegler et al., arXiv:1909.08593, section 2.2).

    coefficient *= 1 + clip(kl / target - 1, -0.2, 0.2) * answers / horizon. Target and horizon are arguments of the
    run, not state: a resumed run may change them.
    """

    STATE = ("coefficient",)

    def __init__(self, kl_coeff: float, target: float, horizon: float = 10000.0):
        """target: nats per answer, > 0; horizon: in answers, > 0."""
        self.coefficient = kl_coeff
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, answers: int) -> None:
        """kl: mean over answers of the KL summed over tokens, of all ranks; answers: how many it is the mean of.

        Raises ValueError for a kl that is not finite: it would stay in the coefficient for ever.
        """
        if not math.isfinite(kl):
            raise ValueError(f"KL to the reference is {kl}: the adaptive KL controller needs a finite number")
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        self.coefficient *= 1.0 + error * answers / self.horizon


class RunningMoments(_State):
    """Mean and unbiased variance of everything seen, merged batch by batch (Chan et al., 1979)."""

    STATE = ("count", "mean", "variance")

    def __init__(self):
        self.count = 0.0
        self.mean = 0.0
        self.variance = 0.0

    def update(self, moments: Tensor) -> None:
        """moments: losses.masked_moments of the new values, added over all ranks. No values: no change."""
        count = float(moments[0])
        if count == 0:
            return
        mean, variance = mean_variance(moments)
        total, shift = self.count + count, mean - self.mean
        squares = self.variance * max(self.count - 1, 0.0) + variance * (count - 1)
        squares += shift * shift * self.count * count / total
        self.mean += shift * count / total
        self.variance = squares / (total - 1) if total > 1 else 0.0
        self.count = total

    @property
    def std(self) -> float:
        """Standard deviation; 1 while it is unknown or 0, so that dividing by it is harmless."""
        return math.sqrt(self.variance) or 1.0

    def normalize(self, x: Tensor) -> Tensor:
        """(x - mean) / sqrt(variance + 1e-8); x as it is while the variance is unknown or 0."""
        return (x - self.mean) / math.sqrt(self.variance + VARIANCE_EPSILON) if self.variance > 0 else x


class ScoreScaler(_State):
    """Puts scores on one scale before they become rewards.

    none       leave them
    normalize  subtract the running mean, divide by the running standard deviation
    running    divide by the running standard deviation only: the zero of the scores keeps its meaning
    first      divide by the standard deviation of the first batch, for the whole run
    fixed      divide by ``std``
    """

    STATE = ("moments",)

    def __init__(self, scaling: str = "normalize", std: float | None = None):
        """Raises ValueError for another scaling, or for "fixed" without ``std``."""
        if scaling not in SCORE_SCALINGS:
            raise ValueError(f"score scaling {scaling!r}: allowed are {', '.join(SCORE_SCALINGS)}")
        if scaling == "fixed" and std is None:
            raise ValueError("score scaling 'fixed' needs std")
        self.scaling, self.std = scaling, std
        self.running = RunningMoments()

    def scale(self, scores: Tensor, moments: Tensor | None = None) -> Tensor:
        """Takes in a batch of scores [B], then returns it scaled.

        moments: losses.masked_moments of the scores of all ranks; default: those of ``scores``.
        """
        if self.scaling in ("none", "fixed"):
            return scores / (self.std or 1.0)
        if self.scaling != "first" or self.running.count == 0:
            self.running.update(masked_moments(scores) if moments is None else moments)
        return self.running.normalize(scores) if self.scaling == "normalize" else scores / self.running.std

    @property
    def moments(self) -> dict[str, float]:
        """RunningMoments' state."""
        return self.running.state_dict()

    @moments.setter
    def moments(self, state: dict[str, float]) -> None:
        self.running.load_state_dict(state)
