"""Ranking losses, score regularisation and score normalisers of the reward model."""

from __future__ import annotations

import json
import math

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.ppo.losses import masked_moments
from alignment.rm import losses

quick = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31)


def f64(x) -> paddle.Tensor:
    return paddle.to_tensor(np.asarray(x, np.float64))


def softplus(x: float) -> float:
    """-log sigmoid(-x)"""
    return math.log1p(math.exp(x))


def make_pairs(seed: int, pairs: int = 4, width: int = 8) -> dict[str, np.ndarray]:
    """Right-padded pairs with a common prompt; the last pair's answers are equal. Padding holds id 0."""
    rng = np.random.default_rng(seed)
    fields = {name: np.zeros((pairs, width)) for name in ("better_scores", "worse_scores", "better_ids", "worse_ids")}
    masks = {name: np.zeros((pairs, width), bool) for name in ("better_mask", "worse_mask")}
    for i in range(pairs):
        prompt = rng.integers(1, 4, rng.integers(1, 4))
        answers = [rng.integers(1, 4, rng.integers(1, width - len(prompt) + 1)) for _ in range(2)]
        if i == pairs - 1:
            answers[1] = answers[0]
        for side, answer in zip(("better", "worse"), answers, strict=True):
            ids = np.concatenate([prompt, answer])
            fields[f"{side}_ids"][i, : len(ids)] = ids
            fields[f"{side}_scores"][i, : len(ids)] = rng.normal(0, 1, len(ids))
            masks[f"{side}_mask"][i, : len(ids)] = True
        if i == pairs - 1:
            fields["worse_scores"][i] = fields["better_scores"][i]
    return fields | masks


def align(pairs: dict[str, np.ndarray], rows=slice(None), gradients: bool = False):
    scores = [f64(pairs[name][rows]) for name in ("better_scores", "worse_scores")]
    for score in scores:
        score.stop_gradient = not gradients
    ids = [paddle.to_tensor(pairs[name][rows].astype(np.int64)) for name in ("better_ids", "worse_ids")]
    masks = [paddle.to_tensor(pairs[name][rows]) for name in ("better_mask", "worse_mask")]
    return losses.align_token_scores(*scores, *ids, *masks), scores


def token_loss_loop(pairs: dict[str, np.ndarray]) -> float:
    """Mean over pairs, one at a time on lists without padding."""
    total = 0.0
    for i in range(len(pairs["better_ids"])):
        better, worse = (list(pairs[f"{s}_ids"][i][pairs[f"{s}_mask"][i]]) for s in ("better", "worse"))
        high, low = (list(pairs[f"{s}_scores"][i][pairs[f"{s}_mask"][i]]) for s in ("better", "worse"))
        length = max(len(better), len(worse))
        start = next((t for t in range(length) if better[t : t + 1] != worse[t : t + 1]), None)
        if start is None:
            total += math.log(2)
            continue
        gaps = [high[min(t, len(high) - 1)] - low[min(t, len(low) - 1)] for t in range(start, length)]
        total += np.mean([softplus(-gap) for gap in gaps])
    return total / len(pairs["better_ids"])


RANKING = losses.Objective(0.5, 0.3, 4)


def is_true(x) -> paddle.Tensor:
    return paddle.to_tensor(np.asarray(x, bool))


class TestPairs:
    def test_all_ordered_pairs_of_an_item_and_none_of_ties(self):
        # item 0: 2 > 1, 2 > 1; item 1: 0.5 > 0, and nothing between the items; item 2: tied
        item, scores = np.array([0, 0, 0, 1, 1, 2, 2]), np.array([1.0, 2.0, 1.0, 0.0, 0.5, 3.0, 3.0])
        better, worse = losses.compared_pairs(item, scores)
        assert list(zip(better.tolist(), worse.tolist(), strict=True)) == [(1, 0), (1, 2), (4, 3)]

    def test_hand_worked(self):
        # margins ln 3 and -ln 3: sigmoid 3/4 and 1/4, so ln 4/3 and ln 4; as a difference -ln 3 and ln 3
        margins = f64([math.log(3), -math.log(3)])
        expected = [math.log(4 / 3), math.log(4)]
        np.testing.assert_allclose(losses.pair_losses(margins).numpy(), expected)
        difference = losses.pair_losses(margins, is_true([False, True])).numpy()
        np.testing.assert_allclose(difference, [math.log(4 / 3), math.log(3)])

    def test_gradient_is_minus_sigmoid_of_the_negative_margin_or_minus_one(self):
        margins = f64([math.log(3), -800.0, -800.0])
        margins.stop_gradient = False
        each = losses.pair_losses(margins, is_true([False, False, True]))
        each.sum().backward()
        np.testing.assert_allclose(each.numpy()[1:], 800.0)  # linear, not infinite, far on the wrong side
        np.testing.assert_allclose(margins.grad.numpy(), [-0.25, -1.0, -1.0])


class TestComparisonLoss:
    def test_hand_worked(self):
        # human ln 4/3 and ln 2, APO's ln 4 and ln 4/3 (ranking) or ln 3 and -ln 3 (difference, whose mean is 0)
        margins, is_apo = f64([math.log(3), 0.0, -math.log(3), math.log(3)]), is_true([0, 0, 1, 1])
        human, apo = math.log(4 / 3) + math.log(2), math.log(4) + math.log(4 / 3)
        ranking = losses.comparison_loss(losses.pair_losses(margins), is_apo, 4, RANKING)
        assert ranking.item() == pytest.approx((0.5 * human + 0.3 / 4 * apo) / 4)
        difference = losses.comparison_loss(losses.pair_losses(margins, is_apo), is_apo, 4, RANKING)
        assert difference.item() == pytest.approx(0.5 * human / 4)

    def test_a_golden_prompt_weighs_apo_loss_coeff_whatever_stands_beside_it(self):
        # The authors' 0.1 / 4: four samples of one prompt and one, or three, of people's pairs, all with loss 1
        for human in (1, 3):
            is_apo = is_true([0] * human + [1] * 4)
            each = f64([1.0] * (human + 4))
            each.stop_gradient = False
            losses.comparison_loss(each, is_apo, human + 4, losses.Objective(1.0, 0.1, 4)).backward()
            weights = each.grad.numpy() * (human + 4)
            np.testing.assert_allclose(weights, [1.0] * human + [0.025] * 4)

    def test_a_step_without_pairs_loses_nothing(self):
        assert losses.comparison_loss(f64([]), is_true([]), 0, RANKING).item() == 0

    @quick
    @given(seeds, st.sampled_from(losses.APO_LOSS_TYPES), st.integers(1, 6))
    def test_equals_numpy_with_its_slopes_however_items_are_split(self, seed, kind, batches):
        rng = np.random.default_rng(seed)
        item = np.repeat(np.arange(6), rng.integers(2, 6, 6))  # 2 to 5 answers each
        scores, is_apo = rng.integers(0, 3, len(item)).astype(float), rng.random(6) < 0.5
        z = rng.normal(0, 2, len(item))
        objective = losses.Objective(rng.uniform(0, 2), rng.uniform(0, 2), int(rng.integers(1, 5)), kind)
        expected = apo_loss_loop(z, item, scores, is_apo, objective)
        pairs = count_pairs_loop(item, scores)
        parts = np.array_split(rng.permutation(6), batches)
        total, slopes = 0.0, np.zeros(len(z))
        for part in parts:
            rows = np.flatnonzero(np.isin(item, part))
            value, slope = run_comparison(z[rows], item[rows], scores[rows], is_apo, pairs, objective)
            total, slopes[rows] = total + value, slope
        assert total == pytest.approx(expected, rel=1e-9, abs=1e-12)
        for row in range(0, len(z), 5):
            step = np.eye(len(z))[row] * 1e-5
            ends = [apo_loss_loop(z + sign * step, item, scores, is_apo, objective) for sign in (1, -1)]
            assert slopes[row] == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4, abs=1e-8)


def run_comparison(z, item, scores, is_apo, pairs, objective) -> tuple[float, np.ndarray]:
    """The loss of some items' answers, and its gradient."""
    leaf = f64(z)
    leaf.stop_gradient = False
    better, worse = losses.compared_pairs(item, scores)
    if not len(better):
        return 0.0, np.zeros(len(z))
    apo = is_true(is_apo[item[better]])
    margins = leaf[paddle.to_tensor(better)] - leaf[paddle.to_tensor(worse)]
    each = losses.pair_losses(margins, apo if objective.apo_loss_type == "diff" else None)
    loss = losses.comparison_loss(each, apo, pairs, objective)
    loss.backward()
    return loss.item(), leaf.grad.numpy()


def count_pairs_loop(item, scores) -> int:
    return sum(item[i] == item[j] and scores[i] != scores[j] for i in range(len(item)) for j in range(i))


def apo_loss_loop(z, item, scores, is_apo, objective) -> float:
    """The formula, pair by pair; the sign of the score difference says which way."""
    sums = [0.0, 0.0]
    for i in range(len(z)):
        for j in range(i):
            if item[i] != item[j] or scores[i] == scores[j]:
                continue
            margin = (z[i] - z[j]) * np.sign(scores[i] - scores[j])
            diff = is_apo[item[i]] and objective.apo_loss_type == "diff"
            sums[int(is_apo[item[i]])] += -margin if diff else np.logaddexp(0, -margin)
    weights = (objective.rm_kl_coeff, objective.apo_loss_coeff / objective.apo_sample_num)
    return np.dot(weights, sums) / max(count_pairs_loop(item, scores), 1)


class TestTokenRanking:
    # prompt 7, answers "8 9 2" and "8 3": they part at position 2; the worse one ends there, the better one at 3.
    PAIR = {
        "better_ids": np.array([[7, 8, 9, 2, 0]]),
        "worse_ids": np.array([[7, 8, 3, 0, 0]]),
        "better_mask": np.array([[1, 1, 1, 1, 0]], bool),
        "worse_mask": np.array([[1, 1, 1, 0, 0]], bool),
        "better_scores": np.array([[5.0, 5.0, 1.0, 2.0, 9.0]]),
        "worse_scores": np.array([[5.0, 5.0, 0.5, 9.0, 9.0]]),
    }

    def test_hand_worked(self):
        # gaps 1 - 0.5 and 2 - 0.5: the ended answer keeps its last score; its padding scores 9 are never read
        scores, leaves = align(self.PAIR, gradients=True)
        assert scores.compared.tolist() == [[False, False, True, True, False]]
        loss = losses.token_pair_losses(scores).mean()
        loss.backward()
        assert loss.item() == pytest.approx((softplus(-0.5) + softplus(-1.5)) / 2)
        assert losses.token_pair_losses(scores, is_true([True])).tolist() == [-1.0]  # (-0.5 - 1.5) / 2
        slopes = [1 / (1 + math.exp(gap)) / 2 for gap in (0.5, 1.5)]
        np.testing.assert_allclose(leaves[0].grad.numpy(), [[0, 0, -slopes[0], -slopes[1], 0]])
        np.testing.assert_allclose(leaves[1].grad.numpy(), [[0, 0, sum(slopes), 0, 0]])

    def test_an_answer_that_begins_another_parts_where_it_ends(self):
        pair = self.PAIR | {"worse_ids": np.array([[7, 8, 9, 0, 0]])}
        scores, _ = align(pair)
        assert scores.compared.tolist() == [[False, False, False, True, False]]

    def test_equal_answers_give_log_two_and_no_gradient(self):
        same = self.PAIR | {f"worse_{field}": self.PAIR[f"better_{field}"] for field in ("ids", "mask", "scores")}
        scores, leaves = align(same, gradients=True)
        loss = losses.token_pair_losses(scores).sum()
        loss.backward()
        assert loss.item() == pytest.approx(math.log(2)) == losses.pair_losses(f64(0.0)).item()
        assert all((leaf.grad.numpy() == 0).all() for leaf in leaves)

    @quick
    @given(seed=seeds)
    def test_equals_the_loop(self, seed):
        pairs = make_pairs(seed)
        found = losses.token_pair_losses(align(pairs)[0]).mean().item()
        assert found == pytest.approx(token_loss_loop(pairs), rel=1e-9)

    @quick
    @given(seed=seeds, garbage=st.sampled_from([math.nan, math.inf, -1e30]))
    def test_padding_never_counts(self, seed, garbage):
        pairs = make_pairs(seed)
        spoilt = dict(pairs)
        for side, junk_id in (("better", 3), ("worse", 2)):
            mask = pairs[f"{side}_mask"]
            spoilt[f"{side}_scores"] = np.where(mask, pairs[f"{side}_scores"], garbage)
            spoilt[f"{side}_ids"] = np.where(mask, pairs[f"{side}_ids"], junk_id)
        results = []
        for case in (pairs, spoilt):
            scores, leaves = align(case, gradients=True)
            loss = losses.token_pair_losses(scores).sum()
            loss = loss + losses.score_regularization(scores.better, scores.worse, scores.compared)
            loss.backward()
            results.append((loss.item(), *(leaf.grad.numpy() for leaf in leaves)))
        for clean, dirty in zip(*results, strict=True):
            np.testing.assert_array_equal(clean, dirty)


class TestRegularization:
    def test_end_scores(self):
        # pairs (1, -2) and (3, 0): (1 + 4 + 9 + 0) / 2 = 7
        assert losses.score_regularization(f64([1, 3]), f64([-2, 0])).item() == 7.0
        assert losses.score_regularization(f64([1, 3]), f64([-2, 0]), denominator=4).item() == 3.5

    def test_token_scores_are_averaged_over_the_compared_positions(self):
        # positions 2 and 3: better 1, 2, worse 0.5, 0.5 -> (1 + 0.25 + 4 + 0.25) / 2 = 2.75
        scores, _ = align(TestTokenRanking.PAIR)
        assert losses.score_regularization(scores.better, scores.worse, scores.compared).item() == 2.75


class TestNormalizers:
    def test_momentum_is_the_weight_of_the_new_batch(self):
        # batch moments (2, 2) then (11, 2): 0.9 * 11 + 0.1 * 2 = 10.1. The original's code does the opposite: 2.9.
        average = losses.ExponentialMovingAverage(momentum=0.9)
        average.update(masked_moments(f64([1.0, 3.0])))
        assert (average.mean, average.variance) == (2.0, 2.0)
        average.update(masked_moments(f64([10.0, 12.0])))
        assert (average.mean, average.variance) == pytest.approx((10.1, 2.0))

    def test_momentum_one_forgets_and_bad_momentum_is_refused(self):
        average = losses.ExponentialMovingAverage(momentum=1.0)
        for batch in ([1.0, 3.0], [10.0, 14.0]):
            average.update(masked_moments(f64(batch)))
        assert (average.mean, average.variance) == (12.0, 8.0)
        for momentum in (0.0, 1.5, math.nan):
            with pytest.raises(ValueError, match="weight of the new batch"):
                losses.ExponentialMovingAverage(momentum)

    @pytest.mark.parametrize("make", [losses.RunningMeanStd, losses.ExponentialMovingAverage])
    def test_ranks_merge_exactly_and_state_is_json(self, make):
        one, two = make(), make()
        for batch in ([1.0, 2.0, 4.0, 8.0], [0.0, 0.5, 16.0, -1.0]):
            one.update(masked_moments(f64(batch)))
            two.update(masked_moments(f64(batch[:1])) + masked_moments(f64(batch[1:])))
            two.update(masked_moments(f64([])))
        assert one.state_dict() == two.state_dict() and one.count == 8
        three = make()
        three.load_state_dict(json.loads(json.dumps(one.state_dict())))
        x = f64([3.0])
        assert three.normalize(x).item() == one.normalize(x).item()
        assert one.normalize(x).item() == pytest.approx((3.0 - one.mean) / math.sqrt(one.variance), rel=1e-6)

    def test_running_mean_std_counts_every_score_alike(self):
        running = losses.RunningMeanStd()
        for batch in ([1.0], [2.0, 3.0, 6.0]):
            running.update(masked_moments(f64(batch)))
        assert (running.mean, running.variance) == pytest.approx((3.0, 14 / 3))  # (4 + 1 + 0 + 9) / 3
