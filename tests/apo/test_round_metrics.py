"""Mean scores, win rates and their intervals against hand-worked values."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from alignment.apo.round_metrics import Answers, by_source, common, mean_score, wilson_interval, win_rate
from alignment.apo.round_report import describe_answers, read_calibration
from alignment.rm.metrics import calibration_curve, calibration_errors, standard_errors
from alignment.rm.plots import write_pictures


def test_mean_score_counts_prompts_not_answers():
    mean, error = mean_score(np.array([[1.0, 3.0], [4.0, 4.0], [6.0, 6.0]]))
    assert mean == pytest.approx(4)
    assert error == pytest.approx(2 / np.sqrt(3))  # of 2, 4, 6: deviation 2
    assert mean_score(np.array([[5.0]])) == (5, 0)


def test_win_rate_counts_ties_half_and_answers_of_a_prompt_as_one():
    answers = Answers(["a", "b", "c"], [["x", "y"], ["same ", "u"], ["p", "q"]], np.array([[2, 0], [9, 1], [1, 1.0]]))
    others = Answers(["a", "b", "c"], [["k", "l"], ["same", "v"], ["r", "s"]], np.array([[1, 1], [0, 2], [1, 0.0]]))
    found = win_rate(answers, others)  # a: win, loss; b: equal texts, loss; c: equal scores, win
    assert found.mean == pytest.approx((0.5 + 0.25 + 0.75) / 3)
    assert found.mean + win_rate(others, answers).mean == 1
    assert win_rate(answers, answers).mean == 0.5


@pytest.mark.parametrize(("wins", "count"), [(0, 5), (5, 10), (63, 80), (7, 7)])
def test_wilson_interval_is_scipys(wins, count):
    expected = binomtest(wins, count).proportion_ci(0.95, "wilson")
    assert wilson_interval(wins / count, count) == pytest.approx((wins / count, *expected), abs=1e-12)


def test_wilson_interval_by_hand():
    # z = 1.959964: (0.5 + z^2 / 20) / (1 + z^2 / 10) = 0.5; z / 1.3841459 * sqrt(0.025 + 0.0096036) = 0.263407
    assert wilson_interval(0.5, 10) == pytest.approx((0.5, 0.236593, 0.763407), abs=1e-5)


def test_each_data_set_has_numbers_of_its_own():
    names = ["hh/helpful/0", "hh/harmless/3", "hh/helpful/12"]
    answers = Answers(names, [["a"], ["b"], ["c"]], np.array([[1.0], [2], [6]]))
    others = answers._replace(scores=np.array([[0.0], [5], [5]]))
    parts = by_source(answers, others)
    assert list(parts) == ["hh/helpful", "hh/harmless"]
    one, other = parts["hh/helpful"]
    assert one.query_ids == other.query_ids == ["hh/helpful/0", "hh/helpful/12"]
    assert describe_answers(one, other)["test_score"]["mean"] == 3.5
    assert describe_answers(*parts["hh/harmless"]) == {
        "prompts": 1, "test_score": {"mean": 2, "standard_error": 0}, "gain": {"mean": -3, "standard_error": 0},
        "win_rate": win_rate(*parts["hh/harmless"])._asdict(), "words": 1.0,
    }  # fmt: skip


def test_scores_of_a_calibrated_model_are_those_of_the_saved_one(tmp_path):
    better, worse = np.array([3.0, 1.0, -2.0, 4.0]), np.array([0.0, 2.0, -3.0, 0.5])
    rows = {
        "better": better, "worse": worse, "is_apo": np.zeros(4, bool), "worse_first": np.array([0, 1, 0, 1], bool),
        "score": np.concatenate([better, worse]), "role": np.repeat([0, 1], 4),
    }  # fmt: skip
    write_pictures(rows, tmp_path, temperature=2.0)
    numbers = read_calibration(tmp_path)
    assert numbers["scores"]["chosen"]["mean"] == pytest.approx(better.mean() / 2)
    assert numbers["scores"]["rejected"]["edges"][0] == pytest.approx(-1.5)
    halved = calibration_errors(calibration_curve((better - worse) / 2, np.ones(4)))
    assert numbers["reliability"]["both_orders"]["ece"] == pytest.approx(halved["ece"])
    assert numbers["standard_errors"] == standard_errors((better - worse) / 2)
    write_pictures(rows, tmp_path)
    assert read_calibration(tmp_path)["scores"]["chosen"]["mean"] == pytest.approx(better.mean())


def test_common_prompts_stand_in_one_order():
    one = Answers(["b", "a", "x"], [["1"], ["2"], ["3"]], np.array([[1.0], [2], [3]]))
    other = Answers(["a", "y", "b"], [["4"], ["5"], ["6"]], np.array([[4.0], [5], [6]]))
    one, other = common(one, other)
    assert one.query_ids == other.query_ids == ["a", "b"]
    assert (one.texts, other.texts) == ([["2"], ["1"]], [["4"], ["6"]])
    assert one.scores.tolist() == [[2], [1]] and other.scores.tolist() == [[4], [6]]
