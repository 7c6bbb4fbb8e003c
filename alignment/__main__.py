"""``python -m alignment``: what commands there are, and how each is started."""

from __future__ import annotations

from alignment import __version__
from alignment.runtime.command_line import CommandParser
from alignment.runtime.faults import run_main
from alignment.runtime.steps import CHECKOUT, shorten

GROUPS = {
    "Train": {
        "alignment/sft/run_sft.py": "supervised tuning",
        "alignment/rm/run_reward.py": "reward model, from compared answers",
        "alignment/ppo/run_ppo.py": "online RL: PPO, APA, AWR",
        "alignment/ppo/run_offline.py": "RL on logged answers, ILQL, cloning",
        "alignment/apo/run_update.py": "best-of-n, RRHF, DPO",
        "alignment/apo/run_apo.py": "adversarial rounds: APO",
        "alignment.pipeline": "all stages one after another",
    },
    "Tools": {
        "alignment/apo/run_sample.py": "answers of a policy, in a file",
        "alignment/apo/run_score.py": "scores of answers, in a file",
        "alignment.apo.convert": "golden answers against a policy's",
        "alignment.apo.select": "of scored answers, those to learn from",
        "alignment.ppo.reward_server": "a reward function over HTTP",
        "alignment.export": "a checkpoint, for inference",
    },
    "Look": {
        "alignment.report": "a page about runs: curves, answers",
        "alignment.apo.compare": "games of APO side by side",
        "alignment.parallel.plan": "memory and traffic of a layout",
    },
}
"""{heading: {script, to be run by path, or module: what it does}}"""
LAUNCHES = """\
A script takes a JSON file and overrides, alone or in several processes:
  python alignment/ppo/run_ppo.py config/smollm2/ppo_argument.json --seed 2
  python -u -m paddle.distributed.launch alignment/ppo/run_ppo.py ...
--help lists what a command takes, --print_config prints a script's resolved
arguments, --dry_run rehearses a training script.
Exit status: 0 done, 1 a fault while running, 2 bad input, 75 stopped and saved
(all of them: docs/troubleshooting.md)."""


def main() -> None:
    """Show the commands, or the version."""
    parser = CommandParser(prog="python -m alignment", description="Lists the commands of the toolkit.")
    parser.add_argument("--version", action="version", version=f"paddle-alignment {__version__}")
    parser.parse_args()
    print(list_commands())


def list_commands() -> str:
    """The page."""
    width = max(len(_launch(command)) for commands in GROUPS.values() for command in commands)
    lines = []
    for heading, commands in GROUPS.items():
        lines.append(f"{heading}:")
        lines += [f"  {_launch(command):<{width}}  {what}" for command, what in commands.items()]
        lines.append("")
    return "\n".join([*lines, LAUNCHES])


def _launch(command: str) -> str:
    return f"python {shorten(CHECKOUT / command)}" if command.endswith(".py") else f"python -m {command}"


if __name__ == "__main__":
    run_main(main)
