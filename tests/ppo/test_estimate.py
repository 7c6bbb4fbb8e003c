"""Rewards, advantages, returns and every metric against plain loops in float64, with NaN at all padding."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.ppo.controllers import AdaptiveKLController, FixedKLController, ScoreScaler
from alignment.ppo.estimate import describe_rollout, estimate, mean_and_sem, sequence_kl, whiten_advantages
from alignment.ppo.experience import Experience
from tests.ppo.experiences import make_experience

DEFAULTS = {
    "clip_range_score": 50.0,
    "missing_eos_penalty": 0.0,
    "normalize_advantage": False,
    "whitening_scope": "batch",
    "kl_estimator": "k1",
    "gamma": 1.0,
    "gae_lambda": 0.95,
}
KL = {"k1": lambda d: d, "k2": lambda d: d * d / 2, "k3": lambda d: math.exp(-d) - 1 + d}
PROMPTS, ANSWERS = [2, 1, 3, 3, 1], [4, 1, 6, 2, 3]


def make(seed=0, prompts=PROMPTS, answers=ANSWERS, garbage=math.nan) -> Experience:
    return make_experience(seed, prompts, answers, garbage)


def make_args(**changes) -> SimpleNamespace:
    return SimpleNamespace(**DEFAULTS | changes)


def run(experience, args, coefficient=0.1, scaler=None):
    return estimate(experience, args, FixedKLController(coefficient), scaler or ScoreScaler("none"))


def expected_of(experience: Experience, args, coefficient: float, shift=0.0, scale=1.0):
    """advantages and returns [[...] per row], metrics; scores are shaped as (score - shift) / scale."""
    advantages, returns, values, sums = [], [], [], []
    for i, length in enumerate(experience.lengths):
        score = float(experience.scores[i]) - (0 if experience.finished[i] else args.missing_eos_penalty)
        clipped = min(max((score - shift) / scale, -args.clip_range_score), args.clip_range_score)
        difference = [float(experience.log_probs[i, t]) - float(experience.ref_log_probs[i, t]) for t in range(length)]
        kl = [KL[args.kl_estimator](d) for d in difference]
        value = [float(experience.values[i, t]) for t in range(length)] + [0.0]
        advantage = [0.0] * (length + 1)
        for t in reversed(range(length)):
            reward = -coefficient * kl[t] + (clipped if t == length - 1 else 0.0)
            delta = reward + args.gamma * value[t + 1] - value[t]
            advantage[t] = delta + args.gamma * args.gae_lambda * advantage[t + 1]
        advantages.append(advantage[:-1])
        returns.append([a + v for a, v in zip(advantage[:-1], value[:-1], strict=True)])
        values.append(value[:-1])
        entropy = sum(float(x) for x in experience.entropy[i, :length])
        sums.append((sum(difference), -coefficient * sum(kl), score, clipped, entropy))
    kl, non_score, score, clipped, entropy = np.mean(sums, axis=0)
    flat_returns, flat_values = np.concatenate(returns), np.concatenate(values)
    spread = flat_returns.var(ddof=1) if len(flat_returns) > 1 else 0.0
    metrics = {
        "objective/kl": kl,
        "objective/kl_coeff": coefficient,
        "objective/entropy": entropy,
        "objective/non_score_reward": non_score,
        "objective/scores": score,
        "objective/rlhf_reward": clipped + non_score,
        "critic/vf_explained_var": 1 - (flat_returns - flat_values).var(ddof=1) / spread if spread else 0.0,
        "val/num_eos_tokens": sum(experience.finished),
        "rollout/reward_mean": experience.scores.astype(np.float64).mean(),
        "rollout/reward_std": experience.scores.astype(np.float64).std(ddof=1) if len(experience) > 1 else 0.0,
        "rollout/length_mean": np.mean(experience.lengths),
        "rollout/truncated_rate": np.mean([not done for done in experience.finished]),
        "rollout/repetition_rate": np.mean(
            [repeated(ids[:length]) for ids, length in zip(experience.response_ids, experience.lengths, strict=True)]
        ),
    }
    if args.normalize_advantage:
        everything = np.concatenate(advantages)
        spread = everything.var(ddof=1) if len(everything) > 1 else 0.0
        advantages = [(np.array(row) - everything.mean()) / math.sqrt(spread + 1e-8) for row in advantages]
    return advantages, returns, metrics


def repeated(ids):
    """Share of four tokens in a row that came before."""
    found = [tuple(ids[start : start + 4]) for start in range(len(ids) - 3)]
    return np.mean([gram in found[:place] for place, gram in enumerate(found)]) if found else 0.0


def assert_matches(experience, actual, expected, atol=1e-4):
    targets, metrics = actual
    advantages, returns, expected_metrics = expected
    for array, rows in ((targets.advantages, advantages), (targets.returns, returns)):
        assert array.dtype == np.float32 and array.shape == experience.response_mask.shape
        assert (array[~experience.response_mask] == 0).all()
        np.testing.assert_allclose(array[experience.response_mask], np.concatenate(rows), atol=atol)
    assert metrics.keys() == expected_metrics.keys()
    assert all(type(value) is float for value in metrics.values())
    for name, value in expected_metrics.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(0, 2**31),
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 6)), min_size=1, max_size=6),
    st.builds(
        make_args,
        clip_range_score=st.sampled_from([1.5, 50.0]),
        missing_eos_penalty=st.sampled_from([0.0, 2.0]),
        normalize_advantage=st.booleans(),
        kl_estimator=st.sampled_from(sorted(KL)),
        gamma=st.sampled_from([1.0, 0.9]),
        gae_lambda=st.sampled_from([0.0, 0.95, 1.0]),
    ),
    st.sampled_from([0.0, 0.1, 1.0]),
)
def test_everything_equals_plain_loops(seed, lengths, args, coefficient):
    experience = make(seed, *map(list, zip(*lengths, strict=True)))
    assert_matches(experience, run(experience, args, coefficient), expected_of(experience, args, coefficient))


def test_by_hand():
    """Two answers; score 2 with k1 differences 1, -1, and score -9 clipped to -3, 1 off for the missing end."""
    mask = np.array([[True, True], [True, False]])
    experience = Experience(
        row=np.arange(2),
        prompt_id=np.zeros(2, int),
        prompt_ids=np.ones([2, 1], int),
        prompt_mask=np.ones([2, 1], bool),
        response_ids=np.ones([2, 2], int),
        response_mask=mask,
        finished=np.array([True, False]),
        log_probs=np.array([[-1.0, -2.0], [-1.0, 7.0]], np.float32),
        entropy=np.array([[0.5, 0.25], [1.0, 7.0]], np.float32),
        ref_log_probs=np.array([[-2.0, -1.0], [-1.0, 9.0]], np.float32),
        values=np.array([[1.0, 0.5], [-2.0, 7.0]], np.float32),
        scores=np.array([2.0, -9.0], np.float32),
    )
    args = make_args(clip_range_score=3.0, missing_eos_penalty=1.0, gamma=0.5, gae_lambda=0.5)
    targets, metrics = run(experience, args, coefficient=0.5)
    # rewards [-0.5, 2 + 0.5], [-3]; deltas [-0.5 + 0.25 - 1, 2.5 - 0.5], [-3 + 2]; A_0 = -1.25 + 0.25 * 2
    np.testing.assert_allclose(targets.advantages, [[-0.75, 2.0], [-1.0, 0.0]])
    np.testing.assert_allclose(targets.returns, [[0.25, 2.5], [-3.0, 0.0]])
    assert metrics["objective/kl"] == 0.0 and metrics["objective/entropy"] == 0.875
    assert metrics["objective/scores"] == -4.0 and metrics["objective/rlhf_reward"] == -0.5
    assert metrics["rollout/reward_mean"] == -3.5 and metrics["rollout/truncated_rate"] == 0.5


@pytest.mark.parametrize("scaling", ["normalize", "running"])
def test_scores_are_scaled_by_all_seen_so_far_this_batch_included(scaling):
    args, scaler = make_args(missing_eos_penalty=0.5), ScoreScaler(scaling)
    seen = []
    for seed in range(3):
        experience = make(seed)
        seen.extend(experience.scores.astype(np.float64) - 0.5 * ~experience.finished)
        shift = np.mean(seen) if scaling == "normalize" else 0.0
        expected = expected_of(experience, args, 0.1, shift, np.std(seen, ddof=1))
        assert_matches(experience, run(experience, args, 0.1, scaler), expected)


def test_scaled_scores_are_clipped_after_scaling():
    args = make_args(clip_range_score=0.7)
    experience = make(3)
    scores = experience.scores.astype(np.float64)
    expected = expected_of(experience, args, 0.1, scores.mean(), scores.std(ddof=1))
    assert_matches(experience, run(experience, args, scaler=ScoreScaler("normalize")), expected)


def test_reference_scores_are_taken_off_before_everything_else():
    experience, reference = make(4), np.linspace(-2, 1, 5).astype(np.float32)
    args, scaler = make_args(missing_eos_penalty=0.5), ScoreScaler("fixed", 2.0)
    targets, metrics = estimate(experience, args, FixedKLController(0.1), scaler, reference)
    assert metrics.pop("objective/reference_scores") == pytest.approx(-0.5)
    centred = replace(experience, scores=experience.scores - reference)
    expected = expected_of(centred, args, 0.1, 0.0, 2.0)
    for name in ("rollout/reward_mean", "rollout/reward_std"):  # what the sources gave
        expected[2][name] = describe_rollout(experience)[name]
    assert_matches(experience, (targets, metrics), expected)


def test_whitening_over_each_share(monkeypatch):
    """Two shares, dealt by length as minibatches are: answers 1, 4, 2 and 3, 0 of lengths 1, 3, 6 and 2, 4."""
    monkeypatch.setattr("alignment.ppo.estimate.topology", lambda: SimpleNamespace(data_size=2))
    experience = make(6)
    mask = paddle.to_tensor(experience.response_mask)
    advantages = np.random.default_rng(0).normal(3, 2, experience.response_mask.shape).astype(np.float32)
    advantages[~experience.response_mask] = math.nan
    found = whiten_advantages(paddle.to_tensor(advantages), mask, "rank").numpy()
    for rows in ([1, 4, 2], [3, 0]):
        valid = experience.response_mask[rows]
        own = advantages[rows][valid].astype(np.float64)
        np.testing.assert_allclose(found[rows][valid], (own - own.mean()) / own.std(ddof=1), atol=1e-5)
        assert (found[rows][~valid] == 0).all()
    whole = whiten_advantages(paddle.to_tensor(advantages), mask, "batch").numpy()
    assert abs(whole - found).max() > 0.01


def test_the_coefficient_is_used_then_updated():
    experience, controller = make(), AdaptiveKLController(0.3, target=0.5, horizon=100.0)
    expected = expected_of(experience, make_args(), 0.3)
    assert_matches(experience, estimate(experience, make_args(), controller, ScoreScaler("none")), expected)
    error = min(max(expected[2]["objective/kl"] / 0.5 - 1, -0.2), 0.2)
    assert controller.coefficient == pytest.approx(0.3 * (1 + error * 5 / 100))
    assert controller.coefficient != 0.3


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", sorted(KL))
def test_padding_never_counts(normalize, kind):
    args, scaling = make_args(normalize_advantage=normalize, kl_estimator=kind), "normalize" if normalize else "none"
    everywhere = (0.0, 1e30, math.inf, math.nan)
    results = [run(make(1, garbage=garbage), args, scaler=ScoreScaler(scaling)) for garbage in everywhere]
    for targets, metrics in results[1:]:
        np.testing.assert_array_equal(targets.advantages, results[0][0].advantages)
        np.testing.assert_array_equal(targets.returns, results[0][0].returns)
        assert metrics == results[0][1]
    wide = make(1, [*PROMPTS, 9], [*ANSWERS, 12])  # more padding, cut off again
    np.testing.assert_allclose(sequence_kl(wide)[:5], sequence_kl(wide.take(np.arange(5))), rtol=1e-5)


def test_sequence_kl_is_k1_summed():
    experience = make(2)
    expected = [
        sum(float(experience.log_probs[i, t]) - float(experience.ref_log_probs[i, t]) for t in range(n))
        for i, n in enumerate(ANSWERS)
    ]
    np.testing.assert_allclose(sequence_kl(experience), expected, rtol=1e-5, atol=1e-5)


def test_mean_and_standard_error():
    assert mean_and_sem(np.array([1.0, 2.0, 4.0, 5.0])) == (3.0, pytest.approx(math.sqrt(10 / 3 / 4)))
    assert mean_and_sem(np.array([7.0])) == (7.0, 0.0)


def test_one_answer_has_no_spread():
    assert describe_rollout(make(1, [2], [3]))["rollout/reward_std"] == 0.0
