"""``python -m alignment.pipeline``: SFT -> reward model -> online RL -> exported policy -> report, one after another.

Every step is the command that a user would type, and is printed as such. Steps that are finished are not run again,
so an interrupted pipeline goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from alignment.runtime.faults import run_main

CHECKOUT = Path(__file__).resolve().parents[1]
RECORD = "pipeline.json"  # {step: its command}, of those that are finished


def main() -> None:
    """Run the pipeline that the command line describes; a failing step ends it with that step's exit status."""
    parser = argparse.ArgumentParser(prog="python -m alignment.pipeline", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="directory below config/ with the argument files")
    parser.add_argument("--objective", default="ppo", choices=("ppo", "apa", "awr"), help="how the policy learns")
    parser.add_argument("--output_dir", default="runs/quickstart", help="a directory for each step is made in it")
    parser.add_argument("--seed", default="1", help="of every stage")
    options = parser.parse_args()
    output, started = Path(options.output_dir), time.perf_counter()
    finished, done, changed = _read_record(output / RECORD), {}, False
    for name, command in plan(options, output).items():
        changed = changed or finished.get(name) != command  # a step rests on those before it
        if changed:
            _write_record(output / RECORD, done)
            if name == "exported":
                shutil.rmtree(output / name, ignore_errors=True)
            run(command)
        else:
            print(f"already done: {name}", flush=True)
        done[name] = command
    _write_record(output / RECORD, done)
    print(f"\npolicy  {output / 'exported'}\nreport  {output / 'report.html'}")
    print(f"all of it took {(time.perf_counter() - started) / 60:.1f} minutes")


def plan(options: argparse.Namespace, output: Path) -> dict[str, str]:
    """{step: what follows ``python`` on its command line}, in order."""
    rl, config = options.objective, CHECKOUT / "config" / options.model

    def stage(name: str, script: str, *more: str) -> str:
        files = [str(_shorten(path)) for path in (CHECKOUT / "alignment" / script, config / f"{name}_argument.json")]
        shared = ["--output_dir", str(output / name), "--seed", options.seed, "--overwrite_output_dir", "true"]
        return shlex.join([*files, *more, *shared])

    start = ["--actor_model_name_or_path", str(output / "sft"), "--reward_model_name_or_path", str(output / "rm")]
    return {
        "sft": stage("sft", "sft/run_sft.py"),
        "rm": stage("rm", "rm/run_reward.py", "--model_name_or_path", str(output / "sft")),
        rl: stage(rl, "ppo/run_ppo.py", *start),
        "exported": shlex.join(["-m", "alignment.export", str(output / rl / "policy"), str(output / "exported")]),
        "report": shlex.join(["-m", "alignment.report", str(output)]),
    }


def run(command: str) -> None:
    """Run ``python <command>`` where the user stands; a failure has said why, so only its status is passed on."""
    print(f"\n$ python {command}", flush=True)
    status = subprocess.run([sys.executable, *shlex.split(command)]).returncode
    if status:
        sys.exit(status)


def _read_record(path: Path) -> dict[str, str]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _write_record(path: Path, done: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(done, indent=2) + "\n", encoding="utf-8")


def _shorten(path: Path) -> Path:
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


if __name__ == "__main__":
    run_main(main)
