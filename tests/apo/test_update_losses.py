"""RRHF, DPO, IPO: hand-worked values, an independent NumPy loop, finite differences, any split of a batch."""

from __future__ import annotations

import math

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.apo import update_losses as losses
from alignment.rm.losses import compared_pairs

quick = settings(max_examples=25)
seeds = st.integers(0, 2**31)


def f64(x) -> paddle.Tensor:
    return paddle.to_tensor(np.asarray(x, np.float64))


def make_items(seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(log-probabilities, scores) of 1 to 5 items with 1 to 5 answers; scores tie often."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 6, rng.integers(1, 6))
    return [(rng.normal(-2, 1, n), rng.integers(0, 3, n).astype(np.float64)) for n in counts]


def stack(items):
    """What a batch of these items has: log-probabilities, item, scores."""
    owner = np.repeat(np.arange(len(items)), [len(scores) for _, scores in items])
    return *(np.concatenate(column) for column in zip(*items, strict=True)), owner


def rrhf(items, coefficient, denominator):
    log_probs, scores, owner = stack(items)
    x = f64(log_probs)
    x.stop_gradient = False
    ranking = losses.ranking_loss(x, compared_pairs(owner, scores), denominator)
    loss = ranking + coefficient * losses.best_answer_loss(x, losses.find_best(owner, scores), denominator)
    loss.backward()
    return loss.item(), x.grad.numpy()


def rrhf_loop(items, coefficient):
    """Mean over items, one answer at a time."""
    total = 0.0
    for log_probs, scores in items:
        for i in range(len(scores)):
            for j in range(len(scores)):
                if scores[i] < scores[j]:
                    total += max(0.0, log_probs[i] - log_probs[j])
        total -= coefficient * log_probs[list(scores).index(max(scores))]
    return total / len(items)


def pair_loss(kind, margins, beta, denominator, smoothing=0.0):
    h = f64(margins)
    h.stop_gradient = False
    if kind == "ipo":
        loss = losses.ipo_loss(h, beta, denominator)
    else:
        loss = losses.dpo_loss(h, beta, denominator, smoothing)
    loss.backward()
    return loss.item(), h.grad.numpy()


def pair_loop(kind, margins, beta, smoothing):
    total = 0.0
    for h in margins:
        if kind == "ipo":
            total += (h - 1 / (2 * beta)) ** 2
        else:
            p = 1 / (1 + math.exp(-beta * h))
            total -= (1 - smoothing) * math.log(p) + smoothing * math.log(1 - p)
    return total / len(margins)


def assert_slopes(function, x, gradient, step=1e-6):
    for place in np.ndindex(x.shape):
        moved = [x.copy(), x.copy()]
        moved[0][place] += step
        moved[1][place] -= step
        slope = (function(moved[0]) - function(moved[1])) / (2 * step)
        assert gradient[place] == pytest.approx(slope, abs=1e-6)


def test_pairs_and_best_of_ragged_items():
    item, scores = np.array([0, 0, 0, 1, 2, 2]), np.array([1.0, 3.0, 3.0, 9.0, 5.0, 4.0])
    pairs = compared_pairs(item, scores)
    assert list(zip(pairs.better, pairs.worse, strict=True)) == [(1, 0), (2, 0), (4, 5)]
    assert losses.find_best(item, scores).tolist() == [1, 3, 4]  # of a tie the first


def test_rrhf_by_hand():
    # item 1: scores 0 < 1 < 2, p -1, -2, -1.5: the worst beats both, by 1 and 0.5; item 2: one answer, p -3
    items = [(np.array([-1.0, -2.0, -1.5]), np.array([0.0, 1.0, 2.0])), (np.array([-3.0]), np.array([7.0]))]
    assert rrhf(items, 0.0, 2)[0] == pytest.approx((1 + 0.5) / 2)
    loss, gradient = rrhf(items, 0.1, 2)
    assert loss == pytest.approx((1 + 0.5) / 2 + 0.1 * (1.5 + 3) / 2)
    np.testing.assert_allclose(gradient, [1.0, -0.5, -0.5 - 0.05, -0.05])


def test_dpo_by_hand():
    # beta 0.5, margins 2 ln 3 and 0: sigmoid 3/4 and 1/2
    margins = [2 * math.log(3), 0.0]
    loss, gradient = pair_loss("sigmoid", margins, 0.5, 2)
    assert loss == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)
    np.testing.assert_allclose(gradient, [-0.5 * 0.25 / 2, -0.5 * 0.5 / 2])
    smooth = pair_loss("sigmoid", margins, 0.5, 2, smoothing=0.2)[0]
    assert smooth == pytest.approx((0.8 * math.log(4 / 3) + 0.2 * math.log(4) + math.log(2)) / 2)


def test_dpo_of_the_initial_policy_is_log_2_and_far_margins_stay_finite():
    assert pair_loss("sigmoid", np.zeros(3), 0.1, 3, smoothing=0.3)[0] == pytest.approx(math.log(2))
    loss, gradient = pair_loss("sigmoid", [-1e5], 1.0, 1)
    assert loss == pytest.approx(1e5) and gradient[0] == pytest.approx(-1)


def test_ipo_is_least_at_its_margin_and_conservative_dpo_where_it_believes():
    assert pair_loss("ipo", [1 / (2 * 0.1)], 0.1, 1) == (0.0, [0.0])
    assert pair_loss("ipo", [3.0], 0.1, 1)[0] == pytest.approx(4.0)
    believed = math.log(0.8 / 0.2) / 0.5
    assert pair_loss("sigmoid", [believed], 0.5, 1, smoothing=0.2)[1][0] == pytest.approx(0, abs=1e-12)


@quick
@given(seeds, st.floats(0, 2))
def test_rrhf_against_a_loop_and_slopes(seed, coefficient):
    items = make_items(seed)
    loss, gradient = rrhf(items, coefficient, len(items))
    assert loss == pytest.approx(rrhf_loop(items, coefficient))
    ends = np.cumsum([len(scores) for _, scores in items])[:-1]

    def moved(flat):
        parts = np.split(flat, ends)
        return rrhf_loop([(p, scores) for p, (_, scores) in zip(parts, items, strict=True)], coefficient)

    assert_slopes(moved, stack(items)[0], gradient)


@quick
@given(seeds, st.sampled_from(["sigmoid", "ipo"]), st.floats(0.05, 2), st.floats(0, 0.4))
def test_dpo_and_ipo_against_a_loop_and_slopes(seed, kind, beta, smoothing):
    margins = np.random.default_rng(seed).normal(0, 3, 5)
    loss, gradient = pair_loss(kind, margins, beta, 5, smoothing)
    assert loss == pytest.approx(pair_loop(kind, margins, beta, smoothing))
    assert_slopes(lambda h: pair_loop(kind, h, beta, smoothing), margins, gradient)


@quick
@given(seeds, st.data())
def test_any_split_of_the_items_adds_up(seed, data):
    items = make_items(seed)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(items) - 1)))) if len(items) > 1 else []
    parts = [items[a:b] for a, b in zip([0, *cuts], [*cuts, len(items)], strict=True)]
    whole = rrhf(items, 0.7, len(items))
    found = [rrhf(part, 0.7, len(items)) for part in parts]
    assert sum(loss for loss, _ in found) == pytest.approx(whole[0])
    np.testing.assert_allclose(np.concatenate([gradient for _, gradient in found]), whole[1])

    def margins_of(part):
        log_probs, scores, owner = stack(part)
        pairs = compared_pairs(owner, scores)
        return log_probs[pairs.better] - log_probs[pairs.worse]

    count = len(margins_of(items))
    for kind in ("sigmoid", "ipo"):
        pieces = [pair_loss(kind, margins_of(part), 0.3, count or 1, 0.1)[0] for part in parts]
        assert sum(pieces) == pytest.approx(pair_loss(kind, margins_of(items), 0.3, count or 1, 0.1)[0])
