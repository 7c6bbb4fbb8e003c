"""Scores of the data set's own answers: which answer, asked once, as the reward sources see it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from alignment.ppo.reference_answers import ReferenceScores, better_answer
from alignment.ppo.rewards import WeightedRewards
from alignment.ppo.rewards.base import RewardSource, check_rewards
from alignment.runtime.faults import RunError, UsageError

BOTH = {"answer": "first one", "other_answer": "second"}


class Letters:
    """A tokenizer of characters."""

    eos_token_id = 0

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [ord(letter) for letter in text]}


class Judge(RewardSource):
    """Length of the answer's text plus that of its tokens / 100; remembers what it was asked."""

    name = "judge"

    def __init__(self):
        self.asked = []

    def __call__(self, batch):
        self.asked += batch.responses
        assert batch.finished.all()
        return np.asarray(
            [len(text) + len(ids) / 100 for text, ids in zip(batch.responses, batch.response_ids, strict=True)],
            np.float32,
        )


def make_item(prompt_id, **sample):
    return {"prompt_id": prompt_id, "prompt": "p", "input_ids": np.asarray([1, 2]), "sample": {"input": "p", **sample}}


def test_the_better_answer():
    assert better_answer(BOTH) == better_answer(BOTH | {"better": True}) == "first one"
    assert better_answer(BOTH | {"better": False}) == "second"
    assert better_answer({"input": "x"}) is None


def test_each_answer_is_asked_for_once_and_ends():
    judge = Judge()
    scores = ReferenceScores(WeightedRewards([judge], [2.0]), Letters())
    items = [make_item(5, answer="four"), make_item(7, **BOTH, better=False), make_item(5, answer="four")]
    np.testing.assert_allclose(scores(items), [2 * 4.05, 2 * 6.07, 2 * 4.05], rtol=1e-6)
    np.testing.assert_allclose(scores(items[1:]), [2 * 6.07, 2 * 4.05], rtol=1e-6)
    assert sorted(judge.asked) == ["four", "second"]


def test_an_answer_without_a_finite_score_is_named():
    class Broken(Judge):
        def __call__(self, batch):
            return check_rewards([math.nan if text == "bad" else 1.0 for text in batch.responses], len(batch), "f")

    scores = ReferenceScores(WeightedRewards([Broken()]), Letters())
    message = r"the reward \(rewards/judge\) is not finite \(nan\): rank 0, sample 7 \(the data's answer\); look at"
    with pytest.raises(RunError, match=message):
        scores([make_item(5, answer="good"), make_item(7, answer="bad")])


def test_a_prompt_without_answer_is_refused():
    scores = ReferenceScores(WeightedRewards([Judge()]), Letters())
    scores.check([make_item(1, answer="a")])
    with pytest.raises(UsageError, match='"score_centering": "reference" needs an "answer".* prompt 3 has none'):
        scores.check([make_item(1, answer="a"), make_item(3)])
