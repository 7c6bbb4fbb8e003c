"""The steps of a game between reward model and policy (arXiv:2311.08045), each a command of its own."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from alignment.apo.round_arguments import RoundArguments, is_file
from alignment.apo.round_steps import SCRIPTS, FileStep, StageStep, TrainingStep
from alignment.runtime.steps import CHECKOUT, Step, shorten

APO_KEYS = ("apo_loss_coeff", "apo_sample_num", "apo_loss_type", "rm_kl_coeff", "sampling_weights")
APO_LOSS_COEFF = 0.1  # the paper's
EVALUATION, GOLDEN, POLICY = range(3)  # what answers are drawn for


class Game:
    """Where everything of a game is, and the steps that make it.

    Round 0 is the start: directory start/ has the initial policy's answers to the held-out prompts.
    """

    def __init__(self, args: RoundArguments) -> None:
        self.args, self.output = args, Path(args.output_dir)

    # ---- where things are -------------------------------------------------------------------------------------------

    def directory(self, number: int) -> Path:
        """Of a round."""
        return self.output / (f"round-{number}" if number else "start")

    def policy(self, number: int) -> str:
        """The policy after a round."""
        return str(self.directory(number) / "policy") if number else self.args.model_name_or_path

    def reward_model(self, number: int) -> str:
        """The reward model of a round; before the first, what it starts from."""
        return str(self.directory(number) / "rm") if number else self.args.reward_model_base

    @property
    def testing_reward_model(self) -> str:
        """The reward model that nothing is trained on."""
        return self.args.testing_reward_model_name_or_path or str(self.output / "testing_rm")

    # ---- the steps --------------------------------------------------------------------------------------------------

    def steps(self) -> list[list[Step]]:
        """All of them: what comes before the first round, then those of each round."""
        before = [] if self.args.testing_reward_model_name_or_path else [self._testing_reward_model()]
        return [before + self._evaluation(0), *(self._round(number + 1) for number in range(self.args.rounds))]

    def _round(self, number: int) -> list[Step]:
        args, here = self.args, self.directory(number)
        current = self.policy(number - 1)
        steps = []
        if args.adversarial:
            samples, count = here / "golden_samples.jsonl", args.num_return_sequences
            steps.append(self._sample(samples, current, args.golden_datasets, (number, GOLDEN), count))
            steps.append(self._convert(here / "comparisons.json", args.golden_datasets, samples))
        known = self.directory(number - 1) / "answers.jsonl"
        steps.append(self._convert(here / "held_out.json", args.eval_datasets, known))
        steps.append(self._reward_model(number))
        samples, scores = here / "samples.jsonl", here / "scores.jsonl"
        steps.append(
            self._sample(samples, current, args.policy_datasets, (number, POLICY), args.num_return_sequences)
        )
        steps.append(self._score(scores, self.reward_model(number), samples))
        steps.append(self._select(here / "selected.json", samples, scores))
        steps.append(self._policy(number))
        return steps + self._evaluation(number)

    def _evaluation(self, number: int) -> list[Step]:
        """The policy's answers to the held-out prompts, by the same seed in every round, and what they are worth."""
        args, here = self.args, self.directory(number)
        answers, more = here / "answers.jsonl", args.evaluation_arguments
        count = more.get("num_return_sequences", 1)
        steps = [self._sample(answers, self.policy(number), args.eval_datasets, (0, EVALUATION), count, more)]
        steps.append(self._score(here / "test_scores.jsonl", self.testing_reward_model, answers))
        if number:
            steps.append(self._score(here / "rm_scores.jsonl", self.reward_model(number), answers))
        return steps

    def _testing_reward_model(self) -> Step:
        args = self.args
        arguments = _without(args.reward_arguments, APO_KEYS) | _rate(args.reward_learning_rates, 1)
        arguments |= args.testing_reward_arguments
        own = {
            "model_name_or_path": args.reward_model_base,
            "train_datasets": args.testing_reward_datasets,
            "eval_datasets": args.eval_datasets,
        }
        return self._training("reward", self.output / "testing_rm", arguments | own)

    def _reward_model(self, number: int) -> Step:
        args, here = self.args, self.directory(number)
        start = self.reward_model(number - 1) if args.reward_restart == "continue" else args.reward_model_base
        own = {
            "model_name_or_path": start,
            "train_datasets": args.preference_datasets,
            "eval_datasets": f"{args.eval_datasets}, apo:1.0:{here / 'held_out.json'}",
        }
        if args.adversarial:
            own["train_datasets"] += f", apo:1.0:{here / 'comparisons.json'}"
            defaults = {"apo_loss_coeff": APO_LOSS_COEFF, "apo_sample_num": args.num_return_sequences}
            arguments = defaults | args.reward_arguments
        else:
            arguments = _without(args.reward_arguments, APO_KEYS)
        own |= _rate(args.reward_learning_rates, number)
        return self._training("reward", here / "rm", arguments | own)

    def _policy(self, number: int) -> Step:
        args, here = self.args, self.directory(number)
        kind = "apo" if self._mode == "pairs" else "apo-samples"
        own = {
            "policy_update": args.policy_update,
            "model_name_or_path": self.policy(0 if args.policy_restart == "initial" else number - 1),
            "train_datasets": f"{kind}:1.0:{here / 'selected.json'}",
        } | _rate(args.policy_learning_rates, number)
        return self._training("policy", here / "policy", args.policy_arguments | own)

    @property
    def _mode(self) -> str:
        """What the update needs to be selected."""
        every_pair = self.args.policy_arguments.get("dpo_pairs") == "all"
        return {"rjs": "best", "rrhf": "ranking", "dpo": "ranking" if every_pair else "pairs"}[self.args.policy_update]

    # ---- commands ---------------------------------------------------------------------------------------------------

    def _sample(
        self,
        output: Path,
        policy: str,
        prompts: str,
        draw: tuple[int, int],
        count: int,
        more: Mapping[str, Any] | None = None,
    ) -> Step:
        args = self.args
        source = {"input_file" if is_file(prompts) else "datasets": prompts}
        if prompts == args.golden_datasets and args.golden_query_file:
            source["query_file"] = args.golden_query_file
        own = source | {
            "model_name_or_path": policy,
            "num_return_sequences": count,
            "seed": draw_seed(args.seed, *draw),
            "data_seed": args.data_seed,
            "output_file": str(output),
        }
        return self._stage(FileStep, "sample", output, args.sample_arguments | (more or {}) | own)

    def _score(self, output: Path, reward_model: str, answers: Path) -> Step:
        own = {
            "reward_model_name_or_path": reward_model,
            "input_file": str(answers),
            "output_file": str(output),
        }
        return self._stage(FileStep, "score", output, self.args.score_arguments | own)

    def _training(self, stage: str, output: Path, arguments: Mapping[str, Any]) -> Step:
        own = {"output_dir": str(output), "seed": self.args.seed, "data_seed": self.args.data_seed}
        return self._stage(TrainingStep, stage, output, _without(arguments, ("resume_from_checkpoint",)) | own)

    def _stage(self, kind: type[StageStep], stage: str, output: Path, arguments: Mapping[str, Any]) -> Step:
        args, name = self.args, self._name(output)
        shared = {
            "prompt_template": args.prompt_template, "dataset_modules": args.dataset_modules, "device": args.device,
        }  # fmt: skip
        file = self.output / f"{name}_argument.json"
        words = [str(shorten(CHECKOUT / "alignment" / SCRIPTS[stage])), str(file)]
        if args.nproc_per_node > 1:
            logs = ["--log_dir", str(self.output / "log")]
            launcher = ["-u", "-m", "paddle.distributed.launch", "--nproc_per_node", str(args.nproc_per_node)]
            words = [*launcher, *logs, *words]
        return kind(name, shlex.join(words), output, stage, arguments | shared, file)

    def _convert(self, output: Path, golden: str, samples: Path) -> Step:
        words = ["--golden", golden, "--samples", str(samples), "--seed", str(self.args.data_seed)]
        if self.args.dataset_modules:
            words += ["--dataset_modules", ",".join(self.args.dataset_modules)]
        return self._tool("convert", output, words)

    def _select(self, output: Path, samples: Path, scores: Path) -> Step:
        words = ["--samples", str(samples), "--scores", str(scores), "--mode", self._mode]
        return self._tool("select", output, [*words, "--min_margin", str(self.args.min_margin)])

    def _tool(self, tool: str, output: Path, words: list[str]) -> Step:
        command = shlex.join(["-m", f"alignment.apo.{tool}", *words, "--output", str(output)])
        return Step(self._name(output), command, output)

    def _name(self, output: Path) -> str:
        return output.relative_to(self.output).with_suffix("").as_posix()


def draw_seed(seed: int, number: int, purpose: int) -> int:
    """Below 2^32: of the answers that a round draws for a purpose (EVALUATION, GOLDEN, POLICY)."""
    return int(np.random.SeedSequence([seed, number, purpose]).generate_state(1)[0])


def _rate(rates: list[float] | None, number: int) -> dict[str, float]:
    return {"learning_rate": rates[min(number, len(rates)) - 1]} if rates else {}


def _without(values: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}
