"""Whole PPO iterations of this toolkit, built from arguments as run_ppo.py builds them.

    python -m benchmarks.contenders.ppo_ours CHANNEL ARGUMENTS.json

ARGUMENTS.json holds run_ppo.py's arguments. The reward model that they name is written first: the actor's weights
under a score head drawn by the seed. The value model starts from the same directory.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from alignment.ppo.arguments import GROUPS
from alignment.ppo.build import build_trainer
from alignment.ppo.models.loading import resolve_model_directory
from alignment.ppo.models.saving import save_model
from alignment.ppo.models.tokenizer import load_tokenizer
from alignment.ppo.models.value import load_value
from alignment.ppo.trainer import PPOTrainer
from alignment.runtime.arguments import parse
from alignment.runtime.faults import run_main
from benchmarks.contenders.serving import serve, versions_of


def write_score_model(model_name: str, directory: Path, seed: int) -> None:
    """A reward model of the actor's size in ``directory``: its weights, and a new head."""
    save_model(load_value(model_name, "reward", seed=seed), load_tokenizer(model_name), directory)


class Ours:
    """Iterations of a PPOTrainer, by their number from 1."""

    def __init__(self, trainer: PPOTrainer) -> None:
        self.trainer = trainer

    def prompts(self, iteration: int) -> dict:
        """Token ids of the prompts that this iteration answers."""
        chosen = self.trainer.schedule(iteration - 1)
        return {"prompts": [self.trainer.prompts[int(index)]["input_ids"].tolist() for index in chosen]}

    def iterate(self, iteration: int) -> dict:
        """One iteration: its seconds, those of its phases, and what makes it comparable."""
        started = time.perf_counter()
        metrics = self.trainer.iterate(iteration)
        seconds = time.perf_counter() - started
        phases = {name.partition("/")[2]: value for name, value in metrics.items() if name.startswith("timing_s/")}
        return {"seconds": seconds, "phases": phases, **self._describe(metrics)}

    def _describe(self, metrics: dict[str, Any]) -> dict[str, float]:
        args = self.trainer.args
        answers = args.per_device_prompt_batch_size * args.num_return_sequences
        return {
            "new_tokens": round(metrics["rollout/length_mean"] * answers),
            "optimizer_steps": int(metrics["policy/optimizer_steps"]),
            "score": metrics["objective/scores"],
        }


def main() -> None:
    """Write the score model, load, say hello, answer."""
    arguments = parse([sys.argv[2]], GROUPS)
    model_args, _, args = arguments
    write_score_model(model_args.actor_model_name_or_path, Path(model_args.reward_model_name_or_path), args.seed)
    trainer = build_trainer(*arguments)
    trainable = [engine.model for engine in (trainer.learner.actor, trainer.learner.critic)]
    ours = Ours(trainer)
    serve(
        {"prompts": ours.prompts, "iterate": ours.iterate},
        versions=versions_of("paddlepaddle", "paddlenlp"),
        directory=str(resolve_model_directory(model_args.actor_model_name_or_path).resolve()),
        eos_token_id=trainer.models.tokenizer.eos_token_id,
        trained_parameters=[_count_trained(model) for model in trainable],
    )


def _count_trained(model: Any) -> int:
    return sum(int(value.size) for value in model.parameters() if not value.stop_gradient)


if __name__ == "__main__":
    run_main(main)
