"""``python -m alignment.apo.convert``: golden answers over a policy's samples, as comparisons for the reward model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from alignment.apo.files import Placed, describe_counts, index_by_query, read_items, write_items
from alignment.apo.queries import draw_number, load_queries
from alignment.apo.schemas import GOLDEN, Comparison, Golden, Samples
from alignment.runtime.command_line import CommandParser
from alignment.runtime.faults import UsageError, run_main
from data import load_dataset_modules
from data.builtin.apo import SEPARATOR
from data.comparison import APO

DESCRIPTION = "Writes golden answers over a policy's samples, as comparisons to train a reward model on."
NEXT_TURN = "\nHuman"  # where a model that does not stop begins to ask itself


class Converted(NamedTuple):
    """Comparisons, and how many items or answers were treated in a way that one may want to know of, by what it is."""

    comparisons: list[Comparison]
    counts: Counter[str]


def convert(
    golden: list[Placed], samples: list[Placed], sampling: bool = False, seed: int = 0
) -> Converted:
    """Each golden answer over each sample to the same query, or over one drawn by ``seed``; in the samples' order.

    Answers are cut where the next human turn begins. A sample that equals the golden answer is left out; an empty
    one stays, for the golden answer is better than silence.

    Raises: UsageError for different items of one query_id, or if nothing is left.
    """
    by_query, repeated_golden = index_by_query(golden)
    queries, repeated = index_by_query(samples)
    counts = Counter({"repeated items left out": repeated + repeated_golden})
    counts["golden answers without samples"] = len(by_query.keys() - queries.keys())
    comparisons: list[Comparison] = []
    for query_id, entry in queries.items():
        if query_id not in by_query:
            counts["queries without a golden answer"] += 1
            continue
        _check_query(by_query[query_id], entry)
        best = cut(by_query[query_id].item.golden)
        if not best:
            counts["empty golden answers left out"] += 1
            continue
        answers = [cut(answer) for answer in entry.item.answers.values()]
        others = [answer for answer in answers if answer != best]
        counts["samples equal to the golden answer left out"] += len(answers) - len(others)
        if sampling and others:
            others = [others[np.random.default_rng([seed, draw_number(query_id)]).integers(len(others))]]
        counts["empty samples"] += others.count("")
        comparisons += [_compare(entry.item, best, answer) for answer in others]
    if not comparisons:
        raise UsageError(f"no comparison is left: {describe_counts(counts)}")
    return Converted(comparisons, counts)


def cut(answer: str) -> str:
    """An answer up to where the next human turn begins, stripped."""
    return answer.split(NEXT_TURN, 1)[0].strip()


def read_golden(source: str, seed: int) -> list[Placed]:
    """The golden answers of a file, or the better answers of a registered data set.

    Raises: UsageError or DataError if ``source`` is neither, or lacks an answer.
    """
    if Path(source).is_file():
        return read_items(source, Golden)
    if source.endswith((".json", ".jsonl")) and ":" not in source:
        raise UsageError(f"--golden {source}: no such file")
    found = []
    for query in load_queries(source, seed):
        if query.answer is None:
            raise UsageError(f"--golden {source}: {query.where}: field 'answer' is missing")
        found.append(Placed(Golden(query_id=query.query_id, golden=query.answer, query=query.text), query.where))
    return found


def _check_query(golden: Placed, samples: Placed) -> None:
    query = golden.item.query
    if query is not None and query.strip() != samples.item.query.strip():
        raise UsageError(
            f'{samples.where}: field "query": differs from that of the golden answer to this query_id ({golden.where})'
        )


def _compare(item: Samples, best: str, answer: str) -> Comparison:
    text = [f"{item.query}{SEPARATOR}{one}" for one in (best, answer)]
    return Comparison(text=text, scores=[1.0, 0.0], type=APO, query_id=item.query_id)


def main() -> None:
    """Convert what the command line names; one line says what came of it."""
    parser = CommandParser(prog="python -m alignment.apo.convert", description=DESCRIPTION)
    parser.add_argument(
        f"--{GOLDEN}",
        required=True,
        help="file of golden answers, or registered data sets whose better answers stand in for them: "
        "name[:proportion[:path]]",
    )
    parser.add_argument("--samples", required=True, help="file of a policy's answers")
    parser.add_argument("--output", required=True, help="file of comparisons to write: .json or .jsonl")
    parser.add_argument("--sampling", action="store_true", help="one comparison a query, with one of its samples")
    parser.add_argument(
        "--seed", type=int, default=42, help="of that draw, and of what a proportion takes (default: %(default)s)"
    )
    parser.add_argument("--dataset_modules", default="", help="modules or .py files that register data sets")
    options = parser.parse_args()
    load_dataset_modules(options.dataset_modules)
    golden = read_golden(options.golden, options.seed)
    converted = convert(golden, read_items(options.samples, Samples), options.sampling, options.seed)
    write_items(Path(options.output), (comparison.to_json() for comparison in converted.comparisons))
    print(f"{options.output}: {len(converted.comparisons)} comparisons ({describe_counts(converted.counts)})")


if __name__ == "__main__":
    run_main(main)
