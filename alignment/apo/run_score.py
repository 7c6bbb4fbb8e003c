"""Rewards of answers: ``python run_score.py config.json [--key value ...]``, also under paddle.distributed.launch."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # run by path: `import alignment` and `import data` mean this checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from alignment.apo.resumable import STOPPED
from alignment.apo.score import score
from alignment.apo.tool_arguments import ScoreArguments
from alignment.parallel.collectives import barrier
from alignment.runtime.arguments import parse
from alignment.runtime.faults import run_main
from alignment.runtime.termination import stoppable


def main() -> None:
    """Do what the command line describes."""
    (args,) = parse(sys.argv[1:], [ScoreArguments])
    with stoppable(STOPPED):
        score(args)
    barrier()  # a process that leaves first would make the others report a lost connection


if __name__ == "__main__":
    run_main(main)
