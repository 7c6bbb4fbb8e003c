"""Whole PPO iterations of TRL's experimental PPOTrainer, one for each request.

    python -m benchmarks.contenders.ppo_trl CHANNEL SETTINGS.json

The trainer's own loop runs unchanged. It asks for a batch of prompts at the start of every iteration: the loader that
is put in place of its own then waits for the parent's request, and starts the clock; the callback at the end of the
iteration, after the update, stops it and answers.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from benchmarks.contenders.serving import Requests, versions_of
from benchmarks.counting import pad_left

ENDLESS = 1_000_000  # iterations; the parent ends the process


class Clock(TrainerCallback):
    """Iterations by request: yields each request's prompts as a batch, and answers it when the iteration is over."""

    def __init__(self, requests: Requests, pad_token_id: int) -> None:
        self.requests, self.pad, self.steps, self.rollout_seconds = requests, pad_token_id, 0, 0.0

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for request in self.requests:
            ids = torch.from_numpy(pad_left(request["prompts"], self.pad)[0])
            self.steps, self.started = 0, time.perf_counter()
            yield {"input_ids": ids}
        sys.exit()  # the parent hung up

    def watch(self, trainer: PPOTrainer) -> None:
        """Count optimizer steps and tell the rollout's seconds apart."""
        trainer.optimizer.optimizer.register_step_post_hook(self._count)
        generate = ppo_trainer.batch_generation

        def timed(*args: object) -> tuple[torch.Tensor, torch.Tensor]:
            started = time.perf_counter()
            generated = generate(*args)
            self.rollout_seconds = time.perf_counter() - started
            self.new_tokens = generated[1].shape[0] * generated[1].shape[1]
            return generated

        ppo_trainer.batch_generation = timed

    def on_log(self, *_: object, logs: dict[str, float], **__: object) -> None:
        """Remember the mean score."""
        self.score = logs["objective/scores"]

    def on_step_end(self, *_: object, **__: object) -> None:
        """The iteration is over."""
        self.requests.reply(
            seconds=time.perf_counter() - self.started,
            phases={"rollout": self.rollout_seconds},
            new_tokens=self.new_tokens,
            optimizer_steps=self.steps,
            score=self.score,
        )

    def _count(self, *_: object) -> None:
        self.steps += 1


def load_score_model(directory: str, score_directory: str) -> PreTrainedModel:
    """The actor's layers under the head that the toolkit wrote into ``score_directory``."""
    model = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=1, dtype=torch.float32)
    head = load_file(Path(score_directory) / "model.safetensors")["score_head.weight"]
    model.score.weight.data.copy_(head)
    return model


def load_tokenizer(directory: str, pad_token: str) -> PreTrainedTokenizerBase:
    """With a padding token that is not EOS: TRL masks whatever equals it, and chat prompts contain EOS."""
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left", pad_token=pad_token)
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ValueError(f"{directory}: TRL needs a padding token other than EOS, {tokenizer.eos_token!r}")
    return tokenizer


def build_config(settings: dict) -> PPOConfig:
    """TRL's arguments for the settings of benchmarks.ppo_iteration."""
    return PPOConfig(
        output_dir=settings["output_dir"],
        per_device_train_batch_size=settings["batch"],
        # Accumulation over k passes would make k times fewer optimizer steps than minibatches: TRL counts passes only.
        gradient_accumulation_steps=1,
        num_mini_batches=settings["minibatches"],
        num_ppo_epochs=settings["epochs"],
        total_episodes=ENDLESS * settings["batch"],
        response_length=settings["new_tokens"],
        stop_token=None,  # EOS ends nothing: every answer has response_length tokens
        local_rollout_forward_batch_size=settings["batch"],
        temperature=1.0,
        kl_coef=settings["kl_coeff"],
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="constant",
        seed=settings["seed"],
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        num_sample_generations=0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )


def build_trainer(settings: dict, clock: Clock, tokenizer: PreTrainedTokenizerBase) -> PPOTrainer:
    """A trainer that takes its prompts from ``clock``."""
    directory, score = settings["directory"], settings["score_directory"]
    policy, reference = (AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32) for _ in range(2))
    unused = Dataset.from_dict({"input_ids": [[0]] * settings["batch"]})  # only its length is asked for
    trainer = PPOTrainer(
        args=build_config(settings),
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=load_score_model(directory, score),
        value_model=load_score_model(directory, score),
        train_dataset=unused,
        eval_dataset=unused,
        callbacks=[clock],
    )
    trainer.dataloader = clock
    clock.watch(trainer)
    return trainer


def main() -> None:
    """Load, say hello, then one iteration a request."""
    requests = Requests()
    settings = json.loads(Path(sys.argv[2]).read_text())
    torch.set_num_threads(settings["threads"])
    tokenizer = load_tokenizer(settings["directory"], settings["pad_token"])
    clock = Clock(requests, tokenizer.pad_token_id)
    trainer = build_trainer(settings, clock, tokenizer)
    trained = [
        sum(value.numel() for value in model.parameters() if value.requires_grad)
        for model in (trainer.policy_model, trainer.value_model)
    ]
    requests.reply(versions=versions_of("torch", "transformers", "trl"), trained_parameters=trained)
    trainer.train()


if __name__ == "__main__":
    main()
