"""Which answers a report shows: the same prompts at several steps, and of several runs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MOST_STEPS = 4
PROMPTS, MOST_CELLS = 8, 144  # prompts shown; fewer where many runs would make the page large
LONGEST_PROMPT, LONGEST_ANSWER = 800, 1200  # characters


def choose_steps(steps: Iterable[int], most: int) -> list[int]:
    """The first, the last and evenly placed ones between them, in order."""
    known = sorted(set(steps))
    if len(known) <= most:
        return known
    return [known[round(place * (len(known) - 1) / (most - 1))] for place in range(most)]


def answers_at(samples: Iterable[Mapping[str, Any]], step: int) -> dict[Any, Mapping[str, Any]]:
    """{prompt_id: row} of a step, in file order: one answer a prompt, and none that was steered when decoding."""
    found: dict[Any, Mapping[str, Any]] = {}
    for row in samples:
        if row["step"] == step and "decoding" not in row:
            found.setdefault(row["prompt_id"], row)
    return found


def lay_out(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The first prompts, unselected, with the answers of each run from its first step to its last.

    Each: {"prompt", "runs": [{"label", "cells": [row with "answer" cut to its limit, or None]}]}.

    Args: runs: label: rows of samples.jsonl.
    """
    tables = {
        label: [answers_at(rows, step) for step in choose_steps((row["step"] for row in rows), MOST_STEPS)]
        for label, rows in runs.items()
        if rows
    }
    if not tables:
        return []
    size = sum(map(len, tables.values()))
    first = next(iter(tables.values()))[0]
    keys = [key for key in first if any(key in columns[-1] for columns in tables.values())]
    shown = keys[: max(1, min(PROMPTS, MOST_CELLS // size))]
    start, end = _shared_ends([str(first[key]["prompt"]) for key in shown])
    return [
        {
            "prompt": cut_start(str(first[key]["prompt"])[start:].removesuffix(end)),
            "runs": [
                {"label": label, "cells": [_cell(answers.get(key)) for answers in columns]}
                for label, columns in tables.items()
                # prompts are numbered by data set: another data set's prompt of this number is another prompt
                if all(key not in answers or answers[key]["prompt"] == first[key]["prompt"] for answers in columns)
            ],
        }
        for key in shown
    ]


def _shared_ends(prompts: Sequence[str]) -> tuple[int, str]:
    """What a template puts around all prompts: the characters of the first lines, and the markup at the end."""
    if len(prompts) < 2:
        return 0, ""
    start = os.path.commonprefix(prompts).rfind("\n") + 1
    end = os.path.commonprefix([prompt[start:][::-1] for prompt in prompts])[::-1]
    markup = re.search(r"[<\[\n]", end)
    return start, end[markup.start() :] if markup else ""


def cut_start(text: str) -> str:
    """A prompt's end is what is answered."""
    return text if len(text) <= LONGEST_PROMPT else "… " + text[-LONGEST_PROMPT:]


def _cell(row: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if row is None:
        return None
    text = str(row["answer"])
    left = len(text) - LONGEST_ANSWER
    return {**row, "answer": text if left <= 0 else f"{text[:LONGEST_ANSWER]} … ({left} more characters)"}
