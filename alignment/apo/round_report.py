"""What came of a game, round by round: rounds.json with all numbers, rounds.md with the table, and plots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alignment.apo.files import read_items
from alignment.apo.game import Game
from alignment.apo.round_metrics import Answers, Interval, Mean, by_source, common, mean_score, win_rate
from alignment.apo.round_plots import draw_game
from alignment.apo.schemas import Samples, Scores
from alignment.apo.selection import read_scores
from alignment.rm.plots import NUMBERS
from alignment.runtime.files import write_text
from alignment.runtime.metrics import METRICS_FILE

REPORT = "rounds.json"
ERRORS = ("ece", "ace", "mce")
SETTINGS = ("adversarial", "policy_update", "reward_restart", "policy_restart", "num_return_sequences", "seed")
_HEADS = ("round", "test score", "gain", "win rate", "words")
COLUMNS = {  # heading: what stands below it
    "round": "how many the policy has behind it",
    "test score": "the testing reward model's mean score of the policy's answers to the held-out prompts, ± standard "
    "error over prompts",
    "gain": "difference to the start, prompt by prompt, ± standard error",
    "win rate": "how often the testing reward model prefers the answer to the start's, ties half, with 95 % interval",
    "words": "mean length of these answers",
    "RM accuracy, ECE": "the round's reward model on held-out pairs by people, ± standard error over pairs",
    "golden over sample": "how often it prefers the held-out good answer to that of the policy it was trained against",
    "golden, sample, chosen, rejected": "means of its scores of those answers, and of people's pairs",
    "new": "of the answers of the policy that it trained",
}


def write_report(game: Game, last: int) -> str:
    """Write the report on the rounds up to ``last``; returns its table as Markdown."""
    start = read_judged(game.directory(0), "test_scores.jsonl")
    rows = [describe_round(game, number, start) for number in range(last + 1)]
    numbers: dict[str, Any] = {"settings": {name: getattr(game.args, name) for name in SETTINGS}, "rounds": rows}
    models = {f"round {number}": Path(game.reward_model(number)) for number in range(1, last + 1)}
    if game.args.testing_reward_model_name_or_path is None:
        models = {"testing": Path(game.testing_reward_model)} | models
        numbers["testing_reward_model"] = describe_reward_model(models["testing"])
    table = render_table(rows)
    legend = "\n".join(f"- {name}: {meaning}." for name, meaning in COLUMNS.items())
    write_text(game.output / REPORT, json.dumps(numbers, indent=2) + "\n")
    write_text(game.output / "rounds.md", f"# {title(numbers)}\n\n{table}{_describe_test(numbers)}\n{legend}\n")
    draw_game(game.output, numbers, {name: read_calibration(directory) for name, directory in models.items()})
    return table


def describe_round(game: Game, number: int, start: Answers) -> dict[str, Any]:
    """The numbers of a round, plain JSON. Args: start: judged answers of the initial policy."""
    here = game.directory(number)
    both = common(read_judged(here, "test_scores.jsonl"), start)
    row: dict[str, Any] = {"round": number, **describe_answers(*both)}
    if len(parts := by_source(*both)) > 1:
        row["by_source"] = {source: describe_answers(*part) for source, part in parts.items()}
    if number:
        row["reward_model"] = describe_reward_model(here / "rm")
        row["rm_score"] = mean_score(read_judged(here, "rm_scores.jsonl").scores)._asdict()
    return row


def describe_answers(answers: Answers, start: Answers) -> dict[str, Any]:
    """What a policy's answers are worth, by themselves and beside the initial policy's to the same prompts."""
    return {
        "prompts": len(answers.query_ids),
        "test_score": mean_score(answers.scores)._asdict(),
        "gain": mean_score(answers.scores - start.scores)._asdict(),
        "win_rate": win_rate(answers, start)._asdict(),
        "words": float(np.mean([len(text.split()) for texts in answers.texts for text in texts])),
    }


def read_judged(directory: Path, scores_file: str) -> Answers:
    """The policy's answers in a round's directory, with the scores of a file beside them."""
    scores, _ = read_scores(read_items(directory / scores_file, Scores))
    items = [entry.item for entry in read_items(directory / "answers.jsonl", Samples)]
    items = [item for item in items if item.query_id in scores]  # what was too long to be scored is left out
    values = [[scores[item.query_id][key] for key in item.answers] for item in items]
    texts = [list(item.answers.values()) for item in items]
    return Answers([item.query_id for item in items], texts, np.array(values, np.float64))


def describe_reward_model(directory: Path) -> dict[str, Any]:
    """What a reward model's own last evaluation says, on people's pairs where it has also others."""
    lines = (directory / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    metrics = [row for line in lines if "eval/accuracy" in (row := json.loads(line))][-1]
    calibration = read_calibration(directory)
    errors = calibration["reliability"]["both_orders"]
    by_role = calibration["scores"].items()
    scores = {role: {name: values[name] for name in ("count", "mean", "std")} for role, values in by_role}
    return {
        "accuracy": metrics.get("eval/human/accuracy", metrics["eval/accuracy"]),
        **{name: errors[name] for name in ERRORS},
        "standard_errors": calibration["standard_errors"],
        "golden_over_sample": metrics.get("eval/apo/accuracy"),
        "scores": scores,
    }


def read_calibration(directory: Path) -> dict[str, Any]:
    """The numbers that alignment.rm.plots wrote, where scores were calibrated as the saved model gives them."""
    numbers = json.loads((directory / NUMBERS).read_text(encoding="utf-8"))
    if (temperature := numbers["temperature"]) is not None:
        numbers["reliability"]["both_orders"] = numbers["reliability"]["calibrated"]
        for values in numbers["scores"].values():
            values |= {name: (np.array(values[name]) / temperature).tolist() for name in ("mean", "std", "edges")}
    return numbers


def title(numbers: dict[str, Any]) -> str:
    """A game in a few words."""
    settings = numbers["settings"]
    kind = "adversarial" if settings["adversarial"] else "without adversarial pairs"
    return f"{settings['policy_update'].upper()}, {kind}, seed {settings['seed']}"


def render_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, a line a round; below, where the prompts are of several data sets, a line for each in the last one."""
    rm = ["RM accuracy", "ECE", "golden over sample", "golden", "sample", "chosen", "rejected", "new"]
    table = _table([*_HEADS, *rm], [[str(row["round"]), *_answer_cells(row), *_reward_cells(row)] for row in rows])
    parts = rows[-1].get("by_source", {}).items()
    if not parts:
        return table
    by_source = _table(["data set, last round", *_HEADS[1:]], [[name, *_answer_cells(part)] for name, part in parts])
    return f"{table}\n{by_source}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---:"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _answer_cells(row: dict[str, Any]) -> list[str]:
    values = Mean(**row["test_score"]), Mean(**row["gain"]), Interval(**row["win_rate"])
    return [*map(show, values), f"{row['words']:.1f}"]


def show(value: Mean | Interval | float | None) -> str:
    """A number in a cell, with what it may be wrong by."""
    if isinstance(value, Interval):
        return f"{value.mean:.3f} [{value.low:.3f}, {value.high:.3f}]"
    if isinstance(value, Mean):
        return f"{value.mean:.3f} ± {value.standard_error:.3f}"
    return "" if value is None else f"{value:.3f}"


def _reward_cells(row: dict[str, Any]) -> list[str]:
    if "reward_model" not in row:
        return [""] * 8
    model = row["reward_model"]
    means = [model["scores"].get(role, {}).get("mean") for role in ("golden", "sample", "chosen", "rejected")]
    values = [model["golden_over_sample"], *means, row["rm_score"]["mean"]]
    return show_preference(model) + [show(value) for value in values]


def show_preference(model: dict[str, Any]) -> list[str]:
    """Accuracy and ECE of a reward model, with their standard errors."""
    return [show(Mean(model[name], model["standard_errors"][name])) for name in ("accuracy", "ece")]


def _describe_test(numbers: dict[str, Any]) -> str:
    if "testing_reward_model" not in numbers:
        return ""
    model = numbers["testing_reward_model"]
    chosen = model["scores"]["chosen"]["mean"]
    accuracy, ece = show_preference(model)
    return (
        f"\nThe testing reward model: accuracy {accuracy}, ECE {ece}; it gives people's "
        f"preferred answers to the held-out prompts {show(chosen)} on average.\n"
    )
