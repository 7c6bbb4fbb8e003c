"""The grammar of a command line: argparse with the house's faults and a help that fits its terminal."""

from __future__ import annotations

import argparse
import difflib
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from alignment.runtime.faults import UsageError

LEAST_WIDTH, MOST_WIDTH = 60, 110


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser that names the nearest option or choice for a wrong one.

    Options cannot be abbreviated. A fault is a UsageError, so one line and exit status 2.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, "formatter_class": HelpFormatter, **settings})

    def error(self, message: str) -> None:
        """Raise UsageError: argparse's message."""
        raise UsageError(f"command line: {message}")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        """See ArgumentParser.parse_args."""
        words = sys.argv[1:] if args is None else list(args)
        for option in (word.partition("=")[0] for word in words if word.startswith("--")):
            if option not in self._option_string_actions:
                near = did_you_mean(option, self._option_string_actions, "--help lists them")
                self.error(f"{option}: unknown option{near}")
        parsed, rest = self.parse_known_args(words, namespace)
        if rest:
            self.error(f"unexpected {rest[0]!r}")
        return parsed

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            allowed = ", ".join(map(str, action.choices))
            near = did_you_mean(str(value), map(str, action.choices))
            raise argparse.ArgumentError(action, f"{value!r} is not allowed; it must be one of {allowed}{near}")


class HelpFormatter(argparse.HelpFormatter):
    """As wide as the terminal, within what reads well; what an option does stands below its name."""

    def __init__(self, prog: str) -> None:
        width = min(max(shutil.get_terminal_size().columns, LEAST_WIDTH), MOST_WIDTH) - 2
        super().__init__(prog, max_help_position=6, width=width)


def did_you_mean(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """The end of a message about an unknown word: the nearest of the known ones, or else ``otherwise``."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f' (did you mean "{near[0]}"?)' if near else otherwise and f"; {otherwise}"
