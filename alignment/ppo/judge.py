"""Evaluation by a judge: a reward model that nothing is trained on compares the policy with the one it started as."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from alignment.ppo.estimate import mean_and_sem
from alignment.ppo.experience import Experience
from alignment.rm.metrics import preferences
from alignment.runtime.faults import UsageError

KEY = "judge_model_name_or_path"


class WinRate:
    """Measures evaluations against the first, whose answers are the initial policy's.

    Args: model: the judge, as the user calls it.
    """

    def __init__(self, model: str) -> None:
        self.model = model
        self.initial: dict[str, Any] | None = None

    def measure(self, experience: Experience, scores: np.ndarray) -> dict[str, float]:
        """Metrics of an evaluation; the first one ever becomes the measure of all.

        Args: experience: an answer to each held-out prompt; scores: float32 [N], the judge's.
        """
        answers = [
            ids[mask].tolist() for ids, mask in zip(experience.response_ids, experience.response_mask, strict=True)
        ]
        if self.initial is None:
            self.initial = {"prompt_id": experience.prompt_id.tolist(), "answer": answers, "score": scores.tolist()}
        same = np.array([one == other for one, other in zip(answers, self.initial["answer"], strict=True)])
        reward, reward_sem = mean_and_sem(scores)
        wins, wins_sem = mean_and_sem(preferences(scores, np.array(self.initial["score"], np.float32), same))
        return {
            "eval/judge_reward_mean": reward,
            "eval/judge_reward_sem": reward_sem,
            "eval/win_rate": wins,
            "eval/win_rate_sem": wins_sem,
        }

    def state_dict(self) -> dict[str, Any]:
        """For trainer_state.json; a float32 survives it bit by bit."""
        return {"model": self.model, "initial": self.initial}

    def load_state_dict(self, state: dict[str, Any] | None, prompt_ids: list[int], checkpoint: Path) -> None:
        """Raises UsageError if ``checkpoint`` does not know how this judge scores the initial policy's answers.

        Args: state: what ``state_dict`` gave, or None of a run without a judge; prompt_ids: of this run's evaluation.
        """
        if state is None or state["initial"] is None:
            problem = "has no answers of the initial policy, for its run had no judge"
        elif state["model"] != self.model:
            problem = f"was judged by {state['model']}"
        elif state["initial"]["prompt_id"] != prompt_ids:
            problem = "was evaluated on other prompts"
        else:
            self.initial = state["initial"]
            return
        raise UsageError(f'"{KEY}": {self.model} cannot go on from {checkpoint}, which {problem}')
