"""``python -m alignment.pipeline``: SFT -> reward model -> online RL -> exported policy -> report, one after another.

Every stage is the command that a user would type, and is printed as such. A stage that is finished is not run again,
so an interrupted pipeline goes on where it stopped.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from alignment.runtime.faults import run_main

CHECKOUT = Path(__file__).resolve().parents[1]
STAMP = "finished"


def main() -> None:
    """Run the pipeline that the command line describes; ends the process with the status of a stage that fails."""
    parser = argparse.ArgumentParser(prog="python -m alignment.pipeline", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="directory below config/ with the argument files")
    parser.add_argument("--objective", default="ppo", choices=("ppo", "apa", "awr"), help="how the policy learns")
    parser.add_argument("--output_dir", default="runs/quickstart", help="a directory for each stage is made in it")
    parser.add_argument("--seed", default="1", help="of every stage")
    options = parser.parse_args()
    config, output = CHECKOUT / "config" / options.model, Path(options.output_dir)
    shared = ["--seed", options.seed, "--overwrite_output_dir", "true"]

    def stage(name: str, script: str, argument_file: str, *more: str) -> None:
        files = [CHECKOUT / "alignment" / script, config / argument_file]
        run_once(output / name, [*map(_shorten, files), "--output_dir", str(output / name), *more, *shared])

    stage("sft", "sft/run_sft.py", "sft_argument.json")
    start = ["--actor_model_name_or_path", str(output / "sft"), "--reward_model_name_or_path", str(output / "rm")]
    stage("rm", "rm/run_reward.py", "rm_argument.json", "--model_name_or_path", str(output / "sft"))
    stage(options.objective, "ppo/run_ppo.py", f"{options.objective}_argument.json", *start)
    policy, exported = output / options.objective / "policy", output / "exported"
    run_once(exported, ["-m", "alignment.export", str(policy), str(exported)])
    run(["-m", "alignment.report", str(output)])


def run_once(directory: Path, command: Sequence[str]) -> None:
    """Run ``python <command>`` unless it has already filled ``directory``."""
    stamp, line = directory / STAMP, shlex.join(command)
    if stamp.exists() and stamp.read_text(encoding="utf-8") == line:
        print(f"already there: {directory}", flush=True)
        return
    run(command)
    stamp.write_text(line, encoding="utf-8")


def run(command: Sequence[str]) -> None:
    """Run ``python <command>`` in the user's directory; a failure has said why, so only its status is passed on."""
    print(f"\n$ python {shlex.join(command)}", flush=True)
    status = subprocess.run([sys.executable, *command]).returncode
    if status:
        sys.exit(status)


def _shorten(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


if __name__ == "__main__":
    run_main(main)
