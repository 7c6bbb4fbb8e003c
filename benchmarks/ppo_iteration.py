"""Seconds of a whole PPO iteration (rollout, scoring, update) on a CPU, against TRL's PPOTrainer.

    python -m benchmarks.ppo_iteration --json ppo_iteration.json

Equal in both: policy and reference (same weights), value and reward model (the same weights under the same score
head), fp32, the prompts of each iteration, answers of exactly --new-tokens tokens sampled at temperature 1, all layers
of policy and value model trained, one pass over the answers in --minibatches minibatches of one forward pass and one
Adam step each, no recomputation, threads, score and KL in the reward, GAE, whitened advantages.

Not equal, for each trains in its own way. TRL pads prompts on the left and carries the padding through every pass,
ours packs what it needs. TRL lets EOS be a token like others, ours forbids it before an answer's last token. TRL has
one optimizer over policy and value model and does not clip gradients, ours has one for each and clips. Each draws its
own random numbers.

A pair is an iteration of ours, then one of TRL's; the first iterations of both are not counted. Loading, saving and
writing metrics are not timed, computing metrics is. vs_trl is the median of the pairs' ratios of seconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path

from alignment.runtime.faults import RunError, UsageError, run_main
from benchmarks.machine import core_count, describe_machine, versions_of
from benchmarks.options import build_parser, find_peer_python, own_python, positive
from benchmarks.paired import Contender, alternate, median_ratio
from benchmarks.ppo_report import draw, show
from benchmarks.results import run

SEED, LEARNING_RATE, KL_COEFF, EPOCHS, LONGEST_PROMPT = 1, 1e-6, 0.05, 1, 96
COMPARED = ("trained_parameters", "new_tokens", "optimizer_steps")


def main() -> None:
    """Measure, show, write."""
    run(parse_options(), measure, show, draw)


def parse_options() -> argparse.Namespace:
    """The command line. Raises: UsageError."""
    parser = build_parser("benchmarks.ppo_iteration", __doc__.splitlines()[0])
    parser.add_argument("--batch", type=positive, default=16, help="prompts, and answers, of an iteration")
    parser.add_argument("--new-tokens", type=positive, default=32, help="tokens of each answer")
    parser.add_argument("--minibatches", type=positive, default=2, help="optimizer steps of an iteration")
    parser.add_argument("--pad-token", default="<|endoftext|>", help="TRL's padding; must not be EOS")
    options = parser.parse_args()
    if options.batch % options.minibatches:
        raise UsageError(f"--minibatches {options.minibatches}: must divide --batch, {options.batch}")
    options.peer_python = find_peer_python(options.peer_python)
    return options


def measure(options: argparse.Namespace, stack: ExitStack) -> dict:
    """Everything that is shown and written."""
    machine = describe_machine()
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ppo-iteration-")))
    ours, trl = start(options, stack, folder)
    machine["packages"] = versions_of("numpy") | ours.hello["versions"]
    names = ("batch", "new_tokens", "minibatches")
    result = {
        "benchmark": "ppo_iteration",
        "engine": options.engine,
        "machine": machine,
        "setting": {name: getattr(options, name) for name in names} | {"epochs": EPOCHS},
        "trained_parameters": ours.hello["trained_parameters"],
    }
    print("first iterations, not counted", flush=True)
    first = ours.ask("iterate", iteration=1)
    if trl is None:
        return result | {"ours": summarize([ours.ask("iterate", iteration=2 + i) for i in range(options.pairs)])}
    machine["packages"] |= trl.hello["versions"]
    check_equal(ours.hello | first, trl.hello | ask_trl(ours, trl, 1))
    pairs = alternate(
        lambda number: ours.ask("iterate", iteration=2 + number),
        lambda number: ask_trl(ours, trl, 2 + number),
        options.pairs,
    )
    parts = {name: summarize([pair[key] for pair in pairs]) for name, key in (("ours", "ours"), ("trl", "peer"))}
    return result | {"vs_trl": median_ratio(pairs), **parts, "pairs": pairs}


def ask_trl(ours: Contender, trl: Contender, iteration: int) -> dict:
    """TRL's iteration on the prompts of ours with that number."""
    return trl.ask("iterate", prompts=ours.ask("prompts", iteration=iteration)["prompts"])


def summarize(runs: list[dict]) -> dict:
    """Median seconds of an iteration and of each of its phases."""
    phases = {name: statistics.median(run["phases"][name] for run in runs) for name in runs[0]["phases"]}
    return {"seconds": statistics.median(run["seconds"] for run in runs), "phases": phases, "runs": runs}


def check_equal(ours: dict, trl: dict) -> None:
    """Raises RunError if one of them trains other parameters, samples fewer tokens or makes fewer steps."""
    for name in COMPARED:
        if ours[name] != trl[name]:
            raise RunError(f"not the same work: {name} is {ours[name]} of ours, {trl[name]} of TRL's")


def start(options: argparse.Namespace, stack: ExitStack, folder: Path) -> tuple[Contender, Contender | None]:
    """Ours, then TRL if its environment is there; they end with ``stack``."""
    arguments = folder / "arguments.json"
    arguments.write_text(json.dumps(own_arguments(options, folder)))
    module = "benchmarks.contenders.ppo_"
    ours = stack.enter_context(Contender("ours", f"{module}ours", own_python(), [str(arguments)], plain=False))
    if options.peer_python is None:
        return ours, None
    settings = folder / "settings.json"
    settings.write_text(json.dumps(trl_settings(options, folder, ours.hello["directory"])))
    return ours, stack.enter_context(Contender("TRL", f"{module}trl", options.peer_python, [str(settings)]))


def own_arguments(options: argparse.Namespace, folder: Path) -> dict:
    """Arguments of run_ppo.py."""
    return {
        "actor_model_name_or_path": options.model,
        "reward_model_name_or_path": str(folder / "score"),
        "train_datasets": "hh-excerpt/train",
        "output_dir": str(folder / "ours"),
        "max_length": LONGEST_PROMPT,
        "min_new_tokens": options.new_tokens,
        "max_new_tokens": options.new_tokens,
        "per_device_prompt_batch_size": options.batch,
        "per_device_train_batch_size": options.batch // options.minibatches,
        "per_device_eval_batch_size": options.batch,
        "update_iters": EPOCHS,
        "kl_coeff": KL_COEFF,
        "normalize_advantage": True,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_steps": 1 + options.pairs,
        "save_strategy": "no",
        "use_fusemt": options.engine == "fused",
        "device": "cpu",
        "disable_tqdm": True,
        "seed": SEED,
    }


def trl_settings(options: argparse.Namespace, folder: Path, directory: str) -> dict:
    """What benchmarks.contenders.ppo_trl needs; directory: of the policy's weights."""
    return {
        "directory": directory,
        "score_directory": str(folder / "score"),
        "output_dir": str(folder / "trl"),
        "batch": options.batch,
        "new_tokens": options.new_tokens,
        "minibatches": options.minibatches,
        "epochs": EPOCHS,
        "kl_coeff": KL_COEFF,
        "learning_rate": LEARNING_RATE,
        "seed": SEED,
        "threads": core_count(),
        "pad_token": options.pad_token,
    }


if __name__ == "__main__":
    run_main(main)
