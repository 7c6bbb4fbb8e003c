"""Reward-model metrics: hand-worked numbers and a loop as reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment.rm.metrics import (
    TEMPERATURES,
    calibration_curve,
    calibration_errors,
    fit_temperature,
    negative_log_likelihood,
    preference_accuracy,
    preference_metrics,
    standard_errors,
)

LOG3, LOG19 = math.log(3), math.log(19)  # sigmoid: 3/4 and 19/20


def calibration_loop(margins, outcomes, bins):
    """ECE, ACE, MCE one bin at a time."""
    p = [1 / (1 + math.exp(-m)) for m in margins]
    total, gaps = 0.0, []
    for b in range(bins):
        inside = [k for k, x in enumerate(p) if b / bins <= x < (b + 1) / bins or (b == bins - 1 and x == 1)]
        if inside:
            gap = abs(sum(p[k] for k in inside) - sum(outcomes[k] for k in inside))
            total += gap
            gaps.append(gap / len(inside))
    return total / len(p), sum(gaps) / len(gaps), max(gaps)


def calibration_sorted(margins, outcomes, bins):
    """ECE, ACE, MCE from sorted probabilities cut at the bins' edges."""
    p = 1 / (1 + np.exp(-margins))
    order = np.argsort(p)
    cuts = np.searchsorted(p[order], np.arange(1, bins) / bins, side="left")
    groups = [group for group in np.split(order, cuts) if len(group)]
    gaps = np.array([abs(p[group].mean() - outcomes[group].mean()) for group in groups])
    sizes = np.array([len(group) for group in groups])
    return np.average(gaps, weights=sizes), gaps.mean(), gaps.max()


class TestPreference:
    def test_names_and_numbers(self):
        metrics = preference_metrics([1.0, 2.0, 0.0, 3.0], [0.0, 3.0, 0.0, 1.0])
        assert metrics.keys() == {
            *("accuracy", "margin", "min_reward", "mean_reward", "max_reward", "reward_std", "ece", "ace", "mce")
        }
        assert metrics["accuracy"] == 0.625  # right, wrong, tie, right: (1 + 0 + 0.5 + 1) / 4
        assert metrics["margin"] == 0.5  # (1 - 1 + 0 + 2) / 4
        assert (metrics["min_reward"], metrics["mean_reward"], metrics["max_reward"]) == (0.0, 1.25, 3.0)
        assert metrics["reward_std"] == pytest.approx(np.std([1, 2, 0, 3, 0, 3, 0, 1], ddof=1))

    def test_a_constant_model_is_at_chance(self):
        assert preference_accuracy(np.zeros(7), np.zeros(7)) == 0.5

    def test_not_a_number_is_not_hidden(self):
        assert math.isnan(preference_accuracy([math.nan, 1.0], [0.0, 0.0]))

    def test_no_pairs(self):
        with pytest.raises(ValueError, match="at least one pair"):
            preference_metrics([], [])


class TestCalibration:
    def test_hand_worked_one_order(self):
        # p 3/4, 3/4, 19/20 with outcomes 1, 0, 1. Bin 7: |1.5 - 1| = 0.5, mean gap 0.25; bin 9: 0.05.
        # ECE 0.55 / 3, ACE (0.25 + 0.05) / 2, MCE 0.25
        curve = calibration_curve([LOG3, LOG3, LOG19], [1, 0, 1], bins=10, both_orders=False)
        assert curve.count.tolist() == [0, 0, 0, 0, 0, 0, 0, 2, 0, 1]
        errors = calibration_errors(curve)
        assert errors == pytest.approx({"ece": 0.55 / 3, "ace": 0.15, "mce": 0.25})

    def test_both_orders_mirror_the_curve(self):
        curve = calibration_curve([LOG3, LOG3, LOG19], [1, 0, 1], bins=10)
        assert curve.count.tolist() == [1, 0, 2, 0, 0, 0, 0, 2, 0, 1]
        assert calibration_errors(curve) == pytest.approx({"ece": 0.55 / 3, "ace": 0.15, "mce": 0.25})

    @pytest.mark.parametrize("both", [False, True])
    def test_equals_the_loop(self, both):
        rng = np.random.default_rng(0)
        margins, outcomes = rng.normal(0, 2, 300), rng.integers(0, 2, 300)
        errors = calibration_errors(calibration_curve(margins, outcomes, 7, both))
        if both:
            margins, outcomes = np.concatenate([margins, -margins]), np.concatenate([outcomes, 1 - outcomes])
        expected = calibration_loop(margins, outcomes, 7)
        assert tuple(errors.values()) == pytest.approx(expected, rel=1e-9)

    def test_a_calibrated_model_has_no_error_and_a_confident_wrong_one_has_all(self):
        # p = 3/4 and three of four pairs right
        assert calibration_errors(calibration_curve([LOG3] * 4, [1, 1, 1, 0]))["ece"] == pytest.approx(0)
        errors = calibration_errors(calibration_curve([1000.0, 1000.0], [0, 0]))
        assert errors == {"ece": 1.0, "ace": 1.0, "mce": 1.0}

    def test_better_first_with_one_order_would_call_every_hesitation_an_error(self):
        # why preference_metrics looks at both orders: p 3/4, right three times in four, is perfectly calibrated
        margins = [LOG3, LOG3, LOG3, -LOG3]  # better minus worse
        assert calibration_errors(calibration_curve(margins, [1] * 4, both_orders=False))["ece"] > 0.3
        metrics = preference_metrics(margins, [0.0] * 4)
        assert metrics["ece"] == pytest.approx(0, abs=1e-12)

    @given(st.integers(0, 2**31), st.integers(1, 60), st.integers(1, 15), st.floats(0.1, 8))
    def test_equals_the_sorted_one(self, seed, count, bins, spread):
        rng = np.random.default_rng(seed)
        margins, outcomes = rng.normal(0, spread, count), rng.integers(0, 2, count)
        found = tuple(calibration_errors(calibration_curve(margins, outcomes, bins, both_orders=False)).values())
        assert found == pytest.approx(calibration_sorted(margins, outcomes, bins), abs=1e-9)


class TestStandardErrors:
    def test_hand_worked(self):
        # right three times in four: sample deviation 1/2, over sqrt(4)
        errors = standard_errors([LOG3, LOG3, LOG3, -LOG3])
        assert errors["accuracy"] == pytest.approx(0.25)
        constant = standard_errors([LOG19] * 5)  # no resample differs
        assert constant == pytest.approx({"accuracy": 0, "ece": 0}, abs=1e-12)
        assert standard_errors([LOG3]) == {"accuracy": 0, "ece": 0}

    def test_are_the_spread_over_other_pairs_of_the_same_kind(self):
        rng = np.random.default_rng(0)
        drawn = rng.normal(0.5, 1.5, (300, 200))
        accuracies = [preference_accuracy(margins, np.zeros(200)) for margins in drawn]
        eces = [calibration_errors(calibration_curve(margins, np.ones(200)))["ece"] for margins in drawn]
        found = [standard_errors(margins) for margins in drawn[:10]]
        assert np.mean([one["accuracy"] for one in found]) == pytest.approx(np.std(accuracies), rel=0.15)
        assert np.mean([one["ece"] for one in found]) == pytest.approx(np.std(eces), rel=0.15)


class TestTemperature:
    def test_hand_worked(self):
        # right three times in four at margin 2: the best model says 3/4, so 2 / T = ln 3
        margins = np.array([2.0, 2.0, 2.0, -2.0])
        assert fit_temperature(margins) == pytest.approx(2 / LOG3, rel=1e-6)
        assert negative_log_likelihood([LOG3, -LOG3]) == pytest.approx((math.log(4 / 3) + math.log(4)) / 2)

    def test_finds_the_scale_of_overconfident_scores(self):
        rng = np.random.default_rng(0)
        true = rng.normal(0, 1.5, 40_000)
        wins = rng.random(true.size) < 1 / (1 + np.exp(-true))
        margins = 3 * np.where(wins, true, -true)  # scores three times too large
        temperature = fit_temperature(margins)
        assert temperature == pytest.approx(3, rel=0.05)
        before, after = (calibration_errors(calibration_curve(m, np.ones(m.size))) for m in (margins, margins / 3))
        assert before["ece"] > 0.1 and after["ece"] < 0.01

    def test_stays_within_bounds(self):
        assert fit_temperature([1.0, 2.0]) == pytest.approx(TEMPERATURES[0], rel=0.01)
        assert fit_temperature([-1.0, -2.0]) == pytest.approx(TEMPERATURES[1], rel=0.01)
