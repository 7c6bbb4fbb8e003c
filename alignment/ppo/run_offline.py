"""Learning from logged answers: ``python run_offline.py config.json [--key value ...]``, also under
paddle.distributed.launch."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # run by path: `import alignment` and `import data` mean this checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from alignment.ppo.offline.arguments import GROUPS
from alignment.ppo.offline.build import build_trainer
from alignment.ppo.offline.trainer import PARTS
from alignment.runtime.faults import run_main
from alignment.training.command import run_command


def main() -> None:
    """Run the stage that the command line describes."""
    run_command("offline", sys.argv[1:], GROUPS, build_trainer, PARTS)


if __name__ == "__main__":
    run_main(main)
