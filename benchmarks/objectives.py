"""Objectives compared as APA's paper does: reward of a held-out judge and KL to the initial policy, over seeds.

    python -m benchmarks.objectives --json objectives.json [--setting FILE] [--folder DIRECTORY]

Trains a reward model and a judge on parts of the preference data that have no pair in common. Then every objective
gets a search of the same size on one seed of its own; the value whose last evaluation has the largest *trained* reward
is chosen, so that the judge chooses nothing; and with it a run for each of the other seeds. All runs have the same
number of episodes, prompts and evaluations, and are the stages' own commands. A single value needs no search.

The setting is a JSON object: "reward_model" (arguments of run_reward.py), "judge" (what it changes of them), "stage"
("ppo", or "offline" for learning from logged answers; default: "ppo"), "policy" (arguments of its script that all
share), "objectives" ({name: {"fixed": arguments, "search": [arguments, ...]}}), "search_seed" and "seeds". The folder
(default: FILE's name without .json) keeps every run; the same command again goes on where an interrupted one stopped,
and a finished run is not run again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

from alignment.ppo.judge import KEY as JUDGE
from alignment.ppo.load import REWARD
from alignment.runtime.arguments import read_json_object
from alignment.runtime.faults import UsageError, run_main
from benchmarks.launches import Launch
from benchmarks.machine import describe_machine, versions_of
from benchmarks.objectives_curves import METRICS, curves_of, summarize
from benchmarks.objectives_report import draw, show
from benchmarks.options import Parser, json_path
from benchmarks.paired import CHECKOUT
from benchmarks.results import save

KEYS = ("reward_model", "judge", "policy", "objectives", "search_seed", "seeds")
STAGES = ("ppo", "offline")


def main() -> None:
    """Run what is not done yet, show, write."""
    options = parse_options()
    folder = options.folder or options.json.with_suffix("")
    result = Comparison(read_setting(options.setting), folder.resolve()).run()
    show(result)
    save(result, options.json, draw)


def parse_options() -> argparse.Namespace:
    """The command line. Raises: UsageError."""
    parser = Parser(prog="python -m benchmarks.objectives", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=json_path, metavar="FILE", required=True, help="write results and plot here")
    parser.add_argument("--folder", type=Path, help="of all runs; default: FILE without .json")
    default = CHECKOUT / "benchmarks/objectives.json"
    parser.add_argument("--setting", default=str(default), help="what to compare; default: benchmarks/objectives.json")
    return parser.parse_args()


def read_setting(file: str) -> dict:
    """Raises UsageError for a file without what the comparison needs, or searches of different sizes."""
    setting = {"stage": "ppo"} | read_json_object(file)
    if set(setting) != {*KEYS, "stage"}:
        raise UsageError(f"{file}: needs the keys {', '.join(KEYS)}, may have \"stage\", and no other")
    if setting["stage"] not in STAGES:
        raise UsageError(f'{file}: "stage": {setting["stage"]!r} is not one of {", ".join(STAGES)}')
    sizes = {name: len(objective["search"]) for name, objective in setting["objectives"].items()}
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        raise UsageError(f"{file}: every objective must get a search of the same size, not {sizes}")
    if setting["search_seed"] in setting["seeds"] or not setting["seeds"]:
        raise UsageError(f'{file}: "seeds" must be some that "search_seed", {setting["search_seed"]}, is not among')
    return setting


class Comparison:
    """All launches of a setting, by name, and what they say.

    Args: setting: as ``read_setting`` gives it; folder: of all launches.
    """

    def __init__(self, setting: dict, folder: Path) -> None:
        self.setting, self.folder = setting, folder
        self.reward_model = Launch("rm", folder / "reward_model", setting["reward_model"], keep=True)
        self.judge = Launch("rm", folder / "judge", setting["reward_model"] | setting["judge"], keep=True)
        policy, self.stage = setting["policy"], setting["stage"]
        self.unit, self.per_step = "steps", 1
        if self.stage == "ppo":
            self.unit = "episodes"
            self.per_step = policy["per_device_prompt_batch_size"] * policy.get("num_return_sequences", 1)
        self.started, self.seconds = time.perf_counter(), []

    def run(self) -> dict:
        """Launch what is missing; returns everything that is shown and written."""
        machine = describe_machine() | {"packages": versions_of("paddlepaddle", "paddlenlp", "numpy")}
        for launch in (self.reward_model, self.judge, *self._all_policies()):
            launch.check()
        for launch in (self.reward_model, self.judge):
            self._do(launch)
        found = {name: self._search(name) for name in self.setting["objectives"]}
        for name, one in found.items():
            launches = [self._policy(name, one["best"], seed) for seed in self.setting["seeds"]]
            one["runs"] = [self._do(launch) for launch in launches]
        summary = summarize({name: one["runs"] for name, one in found.items()})
        for name, one in found.items():
            one["final"] = summary["objectives"][name]
        scorers = {"reward_model": self.reward_model, "judge": self.judge}
        return {
            "benchmark": "objectives",
            "machine": machine,
            "setting": self.setting,
            "unit": self.unit,
            "length": next(iter(found.values()))["runs"][0]["time"][-1],
            **{name: {"accuracy": one.evaluations()[-1]["eval/accuracy"]} for name, one in scorers.items()},
            "equal_kl": summary["equal_kl"],
            "objectives": found,
        }

    def _search(self, name: str) -> dict:
        """Every value of an objective on the search's seed, and the best."""
        tried, search = [], self.setting["objectives"][name]["search"]
        if len(search) == 1:
            return {"search": [], "best": search[0]}
        for values in search:
            curves = self._do(self._policy(name, values, self.setting["search_seed"]))
            tried.append({"values": values, **{metric: curves[metric][-1] for metric in METRICS}})
        return {"search": tried, "best": max(tried, key=lambda one: one["reward"])["values"]}

    def _policy(self, name: str, values: dict, seed: int) -> Launch:
        arguments = self.setting["policy"] | self.setting["objectives"][name]["fixed"] | values
        scorers = {REWARD: str(self.reward_model.folder), JUDGE: str(self.judge.folder)}
        label = "-".join([name, *(f"{key}={value}" for key, value in values.items()), f"seed={seed}"])
        return Launch(self.stage, self.folder / label, arguments | scorers | {"seed": seed})

    def _all_policies(self) -> Iterator[Launch]:
        """One for each value of each objective; other seeds have the same arguments otherwise."""
        for name, objective in self.setting["objectives"].items():
            search = objective["search"]
            for values in search:
                seed = self.setting["search_seed"] if len(search) > 1 else self.setting["seeds"][0]
                yield self._policy(name, values, seed)

    def _do(self, launch: Launch) -> dict:
        """Run a launch unless it is finished; returns the curves of a policy."""
        launch.check()
        if launch.is_finished:
            print(f"already done: {launch.folder.name}", flush=True)
        else:
            print(f"{launch.folder.name} (log: {launch.folder}/log.txt)", flush=True)
            self.seconds.append(launch.run())
            print(f"  {self.seconds[-1]:.0f} s, {self._progress()}", flush=True)
        return {} if launch.stage == "rm" else curves_of(launch.evaluations(), self.per_step)

    def _progress(self) -> str:
        """How much is left, by the mean of what ran."""
        setting = self.setting
        searches = (len(one["search"]) for one in setting["objectives"].values())
        size = sum((tried if tried > 1 else 0) + len(setting["seeds"]) for tried in searches) + 2
        done = sum(1 for _ in self.folder.glob("*/finished.json"))
        left = (size - done) * sum(self.seconds) / len(self.seconds)
        return f"{done} of {size} runs, about {left / 60:.0f} minutes left"


if __name__ == "__main__":
    run_main(main)
