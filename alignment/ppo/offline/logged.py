"""Logged answers: what people or models once answered, as rows (prompt, answer, perhaps a score)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from alignment.ppo.experience import Experience
from alignment.ppo.rewards import RewardBatch
from alignment.runtime.faults import UsageError
from alignment.runtime.files import Files
from data import DataError, RawDataset, RawSample, TokenizedDataset

SCORES = {"answer": "reward", "other_answer": "other_reward"}  # answer's field -> its score's
MEASURED_FILE = "logged.npz"
TOKEN_MEASURES = ("ref_log_probs", "values")


class LoggedDataset(TokenizedDataset):
    """Items ``{"input_ids": int64[P], "prompt": str, "answers": {field: int32[T]}, "scores": {field: float},
    "sample": RawSample}``, one a sample: a prompt with its one or two answers, each with its end-of-text token.

    ``max_length`` limits the prompt with its longer answer, ``max_prompt_len`` the prompt. Equal answers are one. A
    score is NaN where the sample has none. A split keeps the answers to a prompt together.
    """

    NEEDS = ("input", "answer")

    def __init__(self, *args: Any, max_prompt_len: int, max_length: int, **kwargs: Any) -> None:
        self.room = max_length - max_prompt_len  # what a prompt leaves at least
        super().__init__(*args, max_length=max_length, **kwargs)

    def encode(self, sample: RawSample, where: str) -> dict[str, Any] | None:
        """See TokenizedDataset.encode."""
        self.require(sample, where, *self.NEEDS)
        present = [name for name in SCORES if sample.get(name) is not None]
        answers = {name: self.answer_ids(sample, where, name) for name in present}
        if len(present) == 2 and answers["answer"] == answers["other_answer"]:
            answers.pop("other_answer")
        prompt = self.fit_prompt(sample, where, max(self.room, *map(len, answers.values())))
        if prompt is None:
            return None
        if not prompt[1]:
            raise DataError(f"{where}: the prompt is empty")
        return {
            "input_ids": np.array(prompt[1], dtype=np.int32),
            "prompt": prompt[0],
            "answers": {name: np.array(ids, dtype=np.int32) for name, ids in answers.items()},
            "scores": {name: _read_score(sample, where, SCORES[name]) for name in answers},
        }

    def _store(self, item: dict[str, Any] | None, raw: RawDataset, place: int) -> None:
        if item is not None:
            self._items.append({**item, "sample": (raw, place)})

    def finish(self, item: dict[str, Any]) -> dict[str, Any]:
        raw, place = item["sample"]
        return {**super().finish(item), "sample": raw[place]}


class Samples(RawDataset):
    """The raw samples behind items, for instance those of a split."""

    def __init__(self, items: Sequence[dict]) -> None:
        self.items = items

    def __getitem__(self, index: int) -> RawSample:
        return self.items[index]["sample"]

    def __len__(self) -> int:
        return len(self.items)


def _read_score(sample: RawSample, where: str, field: str) -> float:
    value = sample.get(field)
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{where}: field {field!r} must be a finite number, got {value!r:.60}")
    return float(value)


@dataclass(frozen=True)
class LoggedAnswers:
    """N logged answers, those to a prompt one after the other.

    dataset: the items; origin: of each answer, its item and field; given: float32 [N], the data's own scores, NaN
        where there is none.
    experience: all end with EOS; log_probs, entropy, ref_log_probs, values and scores are 0 until they are measured.
        What sampled the answers is unknown: log_probs and entropy stay 0.
    """

    dataset: LoggedDataset
    origin: list[tuple[int, str]]
    given: np.ndarray
    experience: Experience

    def __len__(self) -> int:
        return len(self.origin)

    def reward_batch(self, rows: np.ndarray) -> RewardBatch:
        """The given rows, ready to be scored."""
        items = [self.dataset[self.origin[row][0]] for row in rows]
        experience = self.experience
        return RewardBatch(
            prompts=[item["prompt"] for item in items],
            responses=[item["sample"][self.origin[row][1]] for row, item in zip(rows, items, strict=True)],
            finished=experience.finished[rows],
            samples=[item["sample"] for item in items],
            prompt_ids=[item["input_ids"] for item in items],
            response_ids=[experience.response_ids[row][experience.response_mask[row]] for row in rows],
        )

    def save_measured(self, files: Files) -> None:
        """Add what was measured to a checkpoint."""
        experience = self.experience
        tokens = {name: getattr(experience, name)[experience.response_mask] for name in TOKEN_MEASURES}
        files.add_arrays(MEASURED_FILE, {"scores": experience.scores, **tokens})

    def load_measured(self, checkpoint: Path) -> None:
        """Take back what was measured. Raises UsageError if the file is missing, damaged or of other answers."""
        experience = self.experience
        try:
            with np.load(checkpoint / MEASURED_FILE, allow_pickle=False) as stored:
                experience.scores[:] = stored["scores"]
                for name in TOKEN_MEASURES:
                    getattr(experience, name)[experience.response_mask] = stored[name]
        except (OSError, ValueError, KeyError, BadZipFile) as fault:
            raise UsageError(f"{checkpoint}: cannot resume from it: {MEASURED_FILE}: {fault}") from fault


def read_answers(dataset: LoggedDataset) -> LoggedAnswers:
    """Every answer of the data set as a row."""
    origin, given, prompts, answers = [], [], [], []
    for place, item in enumerate(dataset):
        for name, ids in item["answers"].items():
            origin.append((place, name))
            given.append(item["scores"][name])
            prompts.append(item["input_ids"])
            answers.append(ids)
    return LoggedAnswers(dataset, origin, np.array(given, np.float32), _stack(origin, prompts, answers))


def _stack(origin: list[tuple[int, str]], prompts: list[np.ndarray], answers: list[np.ndarray]) -> Experience:
    prompt_ids, prompt_mask = _pad([ids[::-1] for ids in prompts])
    response_ids, response_mask = _pad(answers)
    count, unknown = len(origin), np.broadcast_to(np.float32(0), response_mask.shape)
    return Experience(
        row=np.arange(count),
        prompt_id=np.array([place for place, _ in origin]),
        prompt_ids=prompt_ids[:, ::-1],
        prompt_mask=prompt_mask[:, ::-1],
        response_ids=response_ids,
        response_mask=response_mask,
        finished=np.ones(count, dtype=bool),
        log_probs=unknown,
        entropy=unknown,
        ref_log_probs=np.zeros(response_mask.shape, np.float32),
        values=np.zeros(response_mask.shape, np.float32),
        scores=np.zeros(count, dtype=np.float32),
    )


def _pad(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """int64 [N, longest], 0 on the right, and where the real tokens are."""
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(lengths.max())[None, :] < lengths[:, None]
    padded = np.zeros(mask.shape, dtype=np.int64)
    padded[mask] = np.concatenate(rows)
    return padded, mask
