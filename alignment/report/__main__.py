"""python -m alignment.report OUTPUT_DIR [OUTPUT_DIR ...] [--output FILE]"""

from __future__ import annotations

from collections.abc import Sequence

from alignment.report.render import write_page, write_report
from alignment.runtime.command_line import CommandParser
from alignment.runtime.faults import run_main


def main(arguments: Sequence[str] | None = None) -> None:
    """Write what the command line asks for and print where it is. Raises: UsageError."""
    parser = CommandParser(
        prog="python -m alignment.report",
        description="Write a page about a run or a pipeline (report.html and report.md, into it), or one page that "
        "compares several (comparison.html, into the directory that they share).",
    )
    parser.add_argument("output_dir", nargs="+", help="output_dir of a run, or the parent of sft/, rm/, ppo/")
    parser.add_argument("--output", metavar="FILE", help="write one page here, and nothing else")
    options = parser.parse_args(arguments)
    if len(options.output_dir) == 1 and options.output is None:
        print(write_report(options.output_dir[0]))
    else:
        print(write_page(options.output_dir, options.output))


if __name__ == "__main__":
    run_main(main)
