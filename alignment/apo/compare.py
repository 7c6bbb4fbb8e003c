"""``python -m alignment.apo.compare GAME GAME ...``: games side by side, such as with and without APO's pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from alignment.apo.round_metrics import Interval, Mean, common, mean_score, win_rate
from alignment.apo.round_plots import draw_rounds
from alignment.apo.round_report import REPORT, read_judged, show, show_preference, title
from alignment.runtime.command_line import CommandParser
from alignment.runtime.faults import UsageError, run_main
from alignment.runtime.files import write_text


def main() -> None:
    """Compare the games that the command line names."""
    parser = CommandParser(prog="python -m alignment.apo.compare", description=__doc__.split(": ", 1)[1])
    parser.add_argument("games", nargs="+", help="output_dir of run_apo.py, two or more; the first is the measure")
    parser.add_argument("--output_dir", default=".", help="where comparison.md and comparison.png are written")
    options = parser.parse_args()
    directories, output = [Path(game) for game in options.games], Path(options.output_dir)
    if len(set(directories)) < 2:
        raise UsageError("name two games or more")
    games = {str(directory): _read(directory) for directory in directories}
    page = render(games)
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "comparison.md", page)
    draw_rounds(output / "comparison.png", {name: numbers["rounds"] for name, numbers in games.items()})
    print(page)


def render(games: dict[str, dict[str, Any]]) -> str:
    """Markdown: the games' rounds, and each game's last policy against the first game's.

    Args: games: contents of rounds.json, by directory.
    Raises: UsageError if not all start with the same policy, prompts and judge.
    """
    heads = ["game", "round", "RM accuracy", "ECE", "golden over sample", "test score", "gain", "win rate"]
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    (first, measure), *others = games.items()
    for name, numbers in games.items():
        if numbers["rounds"][0] != measure["rounds"][0]:
            raise UsageError(f"{name}: starts otherwise than {first}: another policy, testing reward model or prompts")
        for row in numbers["rounds"]:
            cells = [f"{name}: {title(numbers)}", str(row["round"])]
            model = row.get("reward_model")
            cells += [*show_preference(model), show(model["golden_over_sample"])] if model else [""] * 3
            cells += [show(Mean(**row[key])) for key in ("test_score", "gain")] + [show(Interval(**row["win_rate"]))]
            lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    lines += [_against(other, (first, measure)) for other in others]
    return "\n".join(lines) + "\n"


def _against(*games: tuple[str, dict[str, Any]]) -> str:
    (name, _), (first, _) = games
    last = [Path(game) / f"round-{content['rounds'][-1]['round']}" for game, content in games]
    answers, others = common(*(read_judged(directory, "test_scores.jsonl") for directory in last))
    return (
        f"{name} against {first}, after their last rounds: score {show(mean_score(answers.scores - others.scores))}, "
        f"win rate {show(win_rate(answers, others))} ({len(answers.query_ids)} prompts)."
    )


def _read(directory: Path) -> dict[str, Any]:
    path = directory / REPORT
    if not path.is_file():
        raise UsageError(f"{path}: no such file; name the output_dir of a game of one round or more")
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    run_main(main)
