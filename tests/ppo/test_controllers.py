"""KL controllers, running moments and score scaling: published numbers, merging, resuming."""

from __future__ import annotations

import json
import math

import numpy as np
import paddle
import pytest

from alignment.ppo.controllers import AdaptiveKLController, FixedKLController, RunningMoments, ScoreScaler
from alignment.ppo.losses import masked_moments


def moments(values) -> paddle.Tensor:
    return masked_moments(paddle.to_tensor(np.asarray(values, np.float64)))


def through_json(state):
    return json.loads(json.dumps(state))


class TestKlControllers:
    def test_adaptive_conformance_number(self):
        # error = clip(12 / 6 - 1) = 0.2; 0.1 (1 + 0.2 * 256 / 10000) = 0.100512
        controller = AdaptiveKLController(0.1, target=6.0, horizon=10000.0)
        controller.update(12.0, 256)
        assert controller.coefficient == pytest.approx(0.100512, abs=1e-12)

    @pytest.mark.parametrize(
        ("kl", "factor"), [(6.0, 1.0), (6.6, 1.01), (5.4, 0.99), (1e9, 1.02), (0.0, 0.98), (-50.0, 0.98)]
    )
    def test_adaptive_error_is_clipped_at_a_fifth(self, kl, factor):
        controller = AdaptiveKLController(1.0, target=6.0, horizon=1000.0)
        controller.update(kl, 100)
        assert controller.coefficient == pytest.approx(factor)

    @pytest.mark.parametrize("kl", [math.nan, math.inf])
    def test_adaptive_refuses_what_it_could_not_forget(self, kl):
        controller = AdaptiveKLController(0.1, target=6.0)
        with pytest.raises(ValueError, match="needs a finite number"):
            controller.update(kl, 1)
        assert controller.coefficient == 0.1

    def test_fixed_stays(self):
        controller = FixedKLController(0.05)
        controller.update(1e9, 256)
        assert controller.coefficient == 0.05

    def test_resume_is_exact(self):
        first = AdaptiveKLController(0.1, target=3.0)
        for kl in (7.0, 0.3, 2.9):
            first.update(kl, 7)
        second = AdaptiveKLController(0.1, target=3.0)
        second.load_state_dict(through_json(first.state_dict()))
        for controller in (first, second):
            controller.update(5.0, 7)
        assert second.coefficient == first.coefficient != 0.1

    def test_wrong_state_is_refused_and_nothing_changes(self):
        controller = FixedKLController(0.05)
        with pytest.raises(ValueError, match=r"FixedKLController state has \['value'\], expected \['coefficient'\]"):
            controller.load_state_dict({"value": 1.0})
        assert controller.coefficient == 0.05


class TestRunningMoments:
    def test_merging_equals_everything_at_once(self):
        values = np.random.default_rng(0).normal(3, 2, 50)
        running = RunningMoments()
        for part in np.split(values, [1, 1, 4, 30]):  # one value, none, three, ...
            running.update(moments(part))
        assert running.count == 50
        assert running.mean == pytest.approx(values.mean(), rel=1e-12)
        assert running.variance == pytest.approx(values.var(ddof=1), rel=1e-12)

    def test_hand_worked(self):
        # 1, 2 then 6: mean 3, squared deviations 4 + 1 + 9 = 14, over 2 gives 7
        running = RunningMoments()
        running.update(moments([1, 2]))
        assert (running.mean, running.variance) == (1.5, 0.5)
        running.update(moments([6]))
        assert (running.mean, running.variance) == pytest.approx((3.0, 7.0))

    def test_sums_over_ranks_equal_one_rank(self):
        one, two = RunningMoments(), RunningMoments()
        one.update(moments([1.0, 2.0, 4.0, 8.0]))
        two.update(moments([1.0, 2.0]) + moments([4.0, 8.0]))
        assert one.state_dict() == two.state_dict()

    def test_unknown_spread_leaves_scores_alone(self):
        running = RunningMoments()
        running.update(moments([5.0]))
        assert running.std == 1.0
        assert running.normalize(paddle.to_tensor([5.0])).tolist() == [5.0]

    def test_state_is_json(self):
        first, second = RunningMoments(), RunningMoments()
        first.update(moments([0.1, 0.2, 0.7]))
        second.load_state_dict(through_json(first.state_dict()))
        assert second.state_dict() == first.state_dict()


class TestScoreScaler:
    BATCHES = ([2.0, 4.0], [6.0, 8.0])

    # after the first batch mean 3, std sqrt 2; after both mean 5, std sqrt(20 / 3)
    @pytest.mark.parametrize(
        ("scaling", "first", "second"),
        [
            ("normalize", [-1 / math.sqrt(2), 1 / math.sqrt(2)], [1 / math.sqrt(20 / 3), 3 / math.sqrt(20 / 3)]),
            ("running", [math.sqrt(2), 2 * math.sqrt(2)], [6 / math.sqrt(20 / 3), 8 / math.sqrt(20 / 3)]),
            ("first", [math.sqrt(2), 2 * math.sqrt(2)], [3 * math.sqrt(2), 4 * math.sqrt(2)]),
        ],
    )
    def test_two_batches(self, scaling, first, second):
        scaler = ScoreScaler(scaling)
        for scores, expected in zip(self.BATCHES, (first, second), strict=True):
            np.testing.assert_allclose(scaler.scale(paddle.to_tensor(scores)).numpy(), expected, rtol=1e-6)

    def test_with_the_moments_of_all_ranks(self):
        scores = paddle.to_tensor([1.0, 2.0, 3.0, 10.0])
        halves = scores[:2], scores[2:]
        together = masked_moments(halves[0]) + masked_moments(halves[1])
        split = [ScoreScaler().scale(half, together).numpy() for half in halves]
        np.testing.assert_array_equal(np.concatenate(split), ScoreScaler().scale(scores).numpy())

    @pytest.mark.parametrize("scaling", ["normalize", "running", "first"])
    def test_resume_is_exact(self, scaling):
        first, second = ScoreScaler(scaling), ScoreScaler(scaling)
        first.scale(paddle.to_tensor(self.BATCHES[0]))
        second.load_state_dict(through_json(first.state_dict()))
        following = paddle.to_tensor(self.BATCHES[1])
        assert first.scale(following).tolist() == second.scale(following).tolist()
        assert first.state_dict() == second.state_dict()

    def test_unknown_scaling(self):
        with pytest.raises(ValueError, match="'zscore': allowed are none, normalize, running, first, fixed"):
            ScoreScaler("zscore")

    @pytest.mark.parametrize(("scaling", "std", "expected"), [("none", None, [2, 4]), ("fixed", 4.0, [0.5, 1.0])])
    def test_without_moments(self, scaling, std, expected):
        scaler = ScoreScaler(scaling, std)
        assert scaler.scale(paddle.to_tensor(self.BATCHES[0])).tolist() == expected
        assert scaler.running.count == 0

    def test_fixed_needs_a_deviation(self):
        with pytest.raises(ValueError, match="'fixed' needs std"):
            ScoreScaler("fixed")
