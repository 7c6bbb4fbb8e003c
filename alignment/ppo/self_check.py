"""What must hold before the first optimizer step, whatever the model: a run that starts wrong ends at once."""

from __future__ import annotations

import numpy as np

from alignment.ppo.experience import Experience
from alignment.runtime.faults import RunError


def check_reference(experience: Experience, tolerance: float) -> None:
    """Raises RunError unless the KL to the reference is 0, as it must be before the first step."""
    mask = experience.response_mask
    difference = float(np.abs(np.where(mask, experience.log_probs - experience.ref_log_probs, 0.0)).max(initial=0.0))
    if not difference <= tolerance:
        raise RunError(
            f"self-check: before the first step the policy's log-probabilities differ from the reference's by "
            f'{difference:.3g}, more than "self_check_tolerance" {tolerance:g}: the two did not start from the same '
            "weights, or the rollout engine is wrong"
        )


def check_log_probs(difference: float, tolerance: float) -> None:
    """Raises RunError if sampling and training give log-probabilities that differ by more than ``tolerance``."""
    if not difference <= tolerance:  # NaN fails too
        raise RunError(
            f"self-check: log-probabilities of sampling and of training differ by {difference:.3g}, more than "
            f'"self_check_tolerance" {tolerance:g}: rollout engine and model disagree on weights, masks, positions or '
            "temperature, or dropout is on"
        )
