"""Options and environments that the comparisons share."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

from alignment.runtime.faults import UsageError
from benchmarks.paired import CHECKOUT

PEER_VARIABLE = "ALIGNMENT_PEER_PYTHON"
PEER_DEFAULT = CHECKOUT / ".venv-peers/bin/python"
HOW_TO = (
    f"python3 -m venv {PEER_DEFAULT.parent.parent.name} && "
    f"{PEER_DEFAULT.relative_to(CHECKOUT)} -m pip install -r benchmarks/peers/requirements.txt"
)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as the stages do."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"command line: {message}")


def build_parser(module: str, description: str) -> Parser:
    """A parser with the options of every comparison."""
    parser = Parser(prog=f"python -m {module}", description=description)
    parser.add_argument("--engine", choices=("fused", "eager"), default="fused", help="our rollout engine")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="default model or a directory")
    parser.add_argument("--pairs", type=positive, default=5, help="paired runs; the median of their ratios is shown")
    parser.add_argument("--json", type=json_path, metavar="FILE", help="write everything here, and a plot beside it")
    parser.add_argument(
        "--peer-python", metavar="PATH", help=f"interpreter of the peers' environment; default: ${PEER_VARIABLE}"
    )
    return parser


def positive(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def whole(text: str) -> int:
    """A whole number from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def json_path(text: str) -> Path:
    """A path that ends in .json in a directory that is there: better refused now than after an hour."""
    path = Path(text)
    if path.suffix != ".json" or not path.resolve().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} must end in .json and lie in a directory that exists")
    return path


def find_peer_python(given: str | None) -> str | None:
    """The peers' interpreter: as given, of the environment variable, or .venv-peers; None if there is none.

    Raises: UsageError if the one that option or variable names is not there.
    """
    for source, name in (("--peer-python", given), (PEER_VARIABLE, os.environ.get(PEER_VARIABLE))):
        if name:
            path = Path(name).absolute()  # not resolved: an environment's python is a link that must stay one
            if not os.access(path, os.X_OK) or path.is_dir():
                raise UsageError(f"{source}: {name} is not a Python interpreter; make one: {HOW_TO}")
            return str(path)
    if PEER_DEFAULT.exists():
        return str(PEER_DEFAULT)
    print(f"notice: no environment with torch, transformers and trl, only ours is measured; make one: {HOW_TO}")
    return None


def own_python() -> str:
    """This interpreter."""
    return sys.executable
