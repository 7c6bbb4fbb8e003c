"""A policy's answers to queries: ``python run_sample.py config.json [--key value ...]``, also under
paddle.distributed.launch."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # run by path: `import alignment` and `import data` mean this checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from alignment.apo.resumable import STOPPED
from alignment.apo.sample import sample
from alignment.apo.tool_arguments import SampleArguments
from alignment.parallel.collectives import barrier
from alignment.runtime.arguments import parse
from alignment.runtime.faults import run_main
from alignment.runtime.termination import stoppable


def main() -> None:
    """Do what the command line describes."""
    (args,) = parse(sys.argv[1:], [SampleArguments])
    with stoppable(STOPPED):
        sample(args)
    barrier()  # a process that leaves first would make the others report a lost connection


if __name__ == "__main__":
    run_main(main)
