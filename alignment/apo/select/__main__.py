"""``python -m alignment.apo.select``: of scored samples, what a policy learns from."""

# A package without __init__.py: a file alignment/apo/select.py would be taken for Python's own module "select" by
# whatever is started in that folder, Paddle's launcher for one.

from __future__ import annotations

from pathlib import Path

from alignment.apo.files import describe_counts, read_items, write_items
from alignment.apo.schemas import Samples, Scores
from alignment.apo.selection import MODES, read_scores, select
from alignment.runtime.command_line import CommandParser
from alignment.runtime.faults import run_main

DESCRIPTION = "Writes, of scored samples, what a policy learns from."


def main() -> None:
    """Select from what the command line names; one line says what came of it."""
    parser = CommandParser(prog="python -m alignment.apo.select", description=DESCRIPTION)
    parser.add_argument("--samples", required=True, help="file of a policy's answers")
    parser.add_argument("--scores", required=True, help="file of their scores")
    parser.add_argument("--output", required=True, help="file to write: .json or .jsonl")
    parser.add_argument(
        "--mode",
        choices=MODES,
        default=MODES[0],
        help="best: samples with the best answer as target; pairs: comparisons of the best with the worst answer; "
        "ranking: samples with all answers, best first (default: %(default)s)",
    )
    parser.add_argument(
        "--min_margin", type=float, default=0.0, help="least difference of score between the best and the worst answer"
    )
    parser.add_argument("--keep_duplicates", action="store_true", help="equal answers to a query count each")
    options = parser.parse_args()
    samples = read_items(options.samples, Samples)
    scores, replaced = read_scores(read_items(options.scores, Scores))
    chosen, counts = select(samples, scores, options.mode, options.min_margin, options.keep_duplicates)
    if replaced:
        print(f"warning: {options.scores}: {replaced} scores replaced by later ones of the same answer")
    write_items(Path(options.output), (item.to_json() for item in chosen))
    print(f"{options.output}: {len(chosen)} of {len(samples)} items ({describe_counts(counts)})")


if __name__ == "__main__":
    run_main(main)
