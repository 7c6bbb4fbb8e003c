"""What an evaluation says about the policy's answers to held-out prompts: metrics, and the rows of samples.jsonl."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from alignment.ppo.collect import Collected
from alignment.ppo.estimate import describe_rollout, mean_and_sem, sequence_kl
from alignment.ppo.judge import WinRate
from alignment.runtime.console import show_samples
from alignment.runtime.metrics import is_main_process, told_faults
from alignment.training.setup import SAMPLES_FILE

EVALUATION = 0  # iteration number that draws the answers of every evaluation: differences are the policy's, not luck's


def describe_answers(
    collected: Collected, prompts: Sequence[dict], win_rate: WinRate | None = None
) -> tuple[dict[str, float], list[dict]]:
    """Metrics of one answer each to ``prompts`` and, one a prompt, the rows of samples.jsonl (without their step).

    Args: win_rate: measures the judge's scores, where there is a judge.
    """
    experience = collected.experience
    reward, reward_sem = mean_and_sem(experience.scores)
    kl, kl_sem = mean_and_sem(sequence_kl(experience))
    described = describe_rollout(experience)
    metrics = {
        "eval/reward_mean": reward,
        "eval/reward_sem": reward_sem,
        "eval/kl_mean": kl,
        "eval/kl_sem": kl_sem,
        "eval/length_mean": described["rollout/length_mean"],
        "eval/truncated_rate": described["rollout/truncated_rate"],
        **{f"eval/{name}": float(values.mean()) for name, values in collected.components.items()},
    }
    if win_rate is not None:
        metrics |= win_rate.measure(experience, collected.judged)
    rows = [
        {
            "prompt_id": int(experience.prompt_id[i]),
            "prompt": prompts[experience.row[i]]["prompt"],
            "answer": answer,
            "reward": float(experience.scores[i]),
            "length": int(experience.lengths[i]),
            "finished": bool(experience.finished[i]),
            **({} if collected.judged is None else {"judge": float(collected.judged[i])}),
        }
        for i, answer in enumerate(collected.answers)
    ]
    return metrics, rows


def record_samples(output_dir: Path, step: int, rows: Sequence[dict]) -> None:
    """Append the rows to samples.jsonl and show some of them."""
    if is_main_process():
        lines = [json.dumps({"step": step, **row}, ensure_ascii=False) + "\n" for row in rows]
        path = output_dir / SAMPLES_FILE
        with told_faults(path), path.open("a", encoding="utf-8") as file:
            file.writelines(lines)
    show_samples(f"held-out answers after iteration {step}", rows)
