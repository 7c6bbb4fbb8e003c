"""Held-out metrics: which answer has which role, which order a pair has, what is left out of the calibration."""

from __future__ import annotations

import numpy as np
import pytest

from alignment.rm.evaluation import ROLES, calibrate, coins_of, held_out_metrics, one_order_curve, roles_of
from alignment.rm.metrics import fit_temperature, preference_metrics


def make_rows(pairs: int = 400, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    better, worse = rng.normal(0.5, 1, pairs), rng.normal(0, 1, pairs)
    is_apo = rng.random(pairs) < 0.3
    return {
        "better": better,
        "worse": worse,
        "is_apo": is_apo,
        "source": rng.integers(0, 2, pairs),
        "worse_first": rng.random(pairs) < 0.5,
        "score": np.concatenate([better, worse]),
        "role": np.concatenate([2 * is_apo, 2 * is_apo + 1]),
    }


def test_roles():
    batch = {
        "item": np.array([0, 0, 0, 1, 1, 1]),
        "scores": np.array([1.0, 3.0, 3.0, 1.0, 0.0, 0.0], np.float32),
        "is_apo": np.array([False, True]),
    }
    names = [ROLES[role] for role in roles_of(batch)]
    assert names == ["rejected", "chosen", "chosen", "golden", "sample", "sample"]


def test_the_order_of_a_pair_depends_on_its_tokens_alone():
    ids, mask = np.array([[5, 6, 7], [5, 6, 9]]), np.array([[True, True, False], [True, True, True]])
    other = coins_of(np.array([[9, 5, 6, 8]]), np.array([[False, True, True, False]]))
    coins = coins_of(ids, mask)
    assert coins[0] == other[0] != coins[1]
    rng = np.random.default_rng(0)
    pairs = coins_of(rng.integers(0, 9, (4000, 6)), np.ones((4000, 6), bool)).reshape(2, 2000)
    assert abs((pairs[0] < pairs[1]).mean() - 0.5) < 0.04


def test_one_order_counts_each_pair_once():
    rows = make_rows()
    curve = one_order_curve(rows)
    first_wins = ~rows["worse_first"]
    assert curve.count.sum() == 400 and curve.observed.sum() == first_wins.sum()
    first = np.where(first_wins, rows["better"], rows["worse"])
    second = np.where(first_wins, rows["worse"], rows["better"])
    assert curve.predicted.sum() == pytest.approx((1 / (1 + np.exp(second - first))).sum())


def test_sources_of_equal_name_count_together_and_one_is_not_repeated():
    rows = make_rows()
    metrics = held_out_metrics(rows, ["people", "game"])
    own = rows["source"] == 1
    for name, value in preference_metrics(rows["better"][own], rows["worse"][own]).items():
        assert metrics[f"game/{name}"] == value
    assert not any("people" in name for name in held_out_metrics(rows, ["people", "people"]))
    chosen = rows["better"][~rows["is_apo"]]
    assert metrics["chosen/mean_reward"] == pytest.approx(chosen.mean())
    assert metrics["chosen/reward_std"] == pytest.approx(chosen.std())


def test_the_temperature_is_that_of_peoples_pairs():
    rows = make_rows()
    fitted = calibrate(rows)
    margins = (rows["better"] - rows["worse"])[~rows["is_apo"]]
    assert fitted["calibration/temperature"] == fit_temperature(margins)
    people = preference_metrics(rows["better"][~rows["is_apo"]], rows["worse"][~rows["is_apo"]])
    assert fitted["calibration/ece_before"] == pytest.approx(people["ece"])
    assert fitted["calibration/nll_after"] <= fitted["calibration/nll_before"]
