"""``python -m alignment.pipeline``: SFT -> reward model -> online RL -> exported policy -> report, one after another.

Every step is the command that a user would type, and is printed as such. Steps that are finished are not run again,
so an interrupted pipeline goes on where it stopped; from a step whose arguments have changed it begins anew.
"""

from __future__ import annotations

import argparse
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.runtime.argument_fields import without_secrets
from alignment.runtime.arguments import read_json_object
from alignment.runtime.command_line import CommandParser
from alignment.runtime.faults import run_main
from alignment.runtime.steps import CHECKOUT, Step, StepRunner, TrainingStep, shorten
from alignment.runtime.termination import stoppable

RECORD = "pipeline.json"


@dataclass(frozen=True)
class UserFileStep(TrainingStep):
    """A stage whose arguments are a user's file, which may change between two runs."""

    argument_file: Path = Path()

    def describe(self) -> dict[str, Any]:
        """The command, and what stands in the file but secrets."""
        return super().describe() | without_secrets(read_json_object(self.argument_file))


def main() -> None:
    """Run the pipeline that the command line describes; a failing step ends it with that step's exit status."""
    parser = CommandParser(prog="python -m alignment.pipeline", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="directory below config/ with the argument files")
    parser.add_argument("--objective", default="ppo", choices=("ppo", "apa", "awr"), help="how the policy learns")
    parser.add_argument("--output_dir", default="runs/quickstart", help="a directory for each step is made in it")
    parser.add_argument("--seed", default="1", help="of every stage")
    options = parser.parse_args()
    output, started = Path(options.output_dir), time.perf_counter()
    steps = plan(options, output)
    runner = StepRunner(output / RECORD, steps, replace=True)
    with stoppable("SIGTERM between two steps; to go on, run the same command again"):
        for step in steps:
            runner.run(step)
    print(f"\npolicy  {output / 'exported'}\nreport  {output / 'report.html'}")
    print(f"all of it took {(time.perf_counter() - started) / 60:.1f} minutes")


def plan(options: argparse.Namespace, output: Path) -> list[Step]:
    """The steps, in order; the stages themselves remove what an earlier run left."""
    rl, config = options.objective, CHECKOUT / "config" / options.model

    def stage(name: str, script: str, *more: str) -> Step:
        arguments = config / f"{name}_argument.json"
        files = [str(shorten(path)) for path in (CHECKOUT / "alignment" / script, arguments)]
        shared = ["--output_dir", str(output / name), "--seed", options.seed, "--overwrite_output_dir", "true"]
        return UserFileStep(name, shlex.join([*files, *more, *shared]), argument_file=arguments)

    start = ["--actor_model_name_or_path", str(output / "sft"), "--reward_model_name_or_path", str(output / "rm")]
    policy, exported = output / rl / "policy", output / "exported"
    return [
        stage("sft", "sft/run_sft.py"),
        stage("rm", "rm/run_reward.py", "--model_name_or_path", str(output / "sft")),
        stage(rl, "ppo/run_ppo.py", *start),
        Step("exported", shlex.join(["-m", "alignment.export", str(policy), str(exported)]), exported),
        Step("report", shlex.join(["-m", "alignment.report", str(output)])),
    ]


if __name__ == "__main__":
    run_main(main)
