"""The game between reward model and policy, round after round: ``python run_apo.py config.json [--key value ...]``.

Every step is a command of its own, and is printed as such. An interrupted game goes on where it was.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

if __name__ == "__main__":  # run by path: `import alignment` and `import data` mean this checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from alignment.apo.game import Game
from alignment.apo.round_arguments import RoundArguments
from alignment.apo.round_checks import check_queries, check_steps, rehearse_training
from alignment.apo.round_report import write_report
from alignment.runtime.argument_fields import hide_secrets
from alignment.runtime.arguments import parse
from alignment.runtime.faults import run_main
from alignment.runtime.files import write_text
from alignment.runtime.steps import StepRunner, knows
from alignment.runtime.termination import stoppable

RECORD = "steps.json"


def main() -> None:
    """Play the game that the command line describes; a failing step ends it with that step's exit status."""
    (args,) = parse(sys.argv[1:], [RoundArguments])
    game = Game(args)
    rounds = game.steps()
    steps = [step for part in rounds for step in part]
    if args.dry_run:
        rehearse(game)
        return
    record = game.output / RECORD
    if not knows(record, steps):
        check_steps(steps, args)
        check_queries(args)
    runner, started = StepRunner(record, steps, args.overwrite_output_dir), time.perf_counter()
    write_text(game.output / "game.json", json.dumps(hide_secrets(asdict(args)), indent=2) + "\n")
    with stoppable("SIGTERM between two steps; to go on, run the same command again"):
        for number, part in enumerate(rounds):
            for step in part:
                runner.run(step)
            print(f"\n{write_report(game, number)}", flush=True)
    print(f"policy  {game.policy(args.rounds)}\nreport  {game.output / 'rounds.md'}")
    print(f"all of it took {(time.perf_counter() - started) / 60:.1f} minutes")


def rehearse(game: Game) -> None:
    """Check all arguments, show the commands, dry-run what can be."""
    steps = [step for part in game.steps() for step in part]
    check_steps(steps, game.args)
    for step in steps:
        print(f"$ python {step.command}")
    rehearse_training(steps, game.args)
    print("dry run: passed")


if __name__ == "__main__":
    run_main(main)
