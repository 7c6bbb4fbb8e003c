"""The sampler against NumPy: the random stream, each filter as transformers defines it, and the inverse CDF."""

from __future__ import annotations

import math

import numpy as np
import paddle
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from alignment.ppo.rollout.protocol import Draw, SamplingParameters, uniforms
from alignment.ppo.rollout.sampling import (
    choose_tokens,
    keep_top_k,
    keep_top_p,
    penalise_repetition,
    sampling_logits,
)

quick = settings(max_examples=50, deadline=None, derandomize=True)
whole = st.integers(0, 2**63)
draws = st.builds(Draw, whole, whole, whole, whole)
seeds = st.integers(0, 2**31)
LAST_UNIFORM = 1 - 2**-53


def random_logits(seed: int, rows: int = 3, size: int = 11) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, [rows, size]).astype(np.float32)


def softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def f32(x) -> paddle.Tensor:
    return paddle.to_tensor(np.asarray(x, np.float32))


def choose(logits: np.ndarray, uniform, greedy: bool = False) -> np.ndarray:
    return choose_tokens(f32(logits), paddle.to_tensor(np.asarray(uniform, np.float64)), greedy).numpy()


def make_sampling(**changes) -> SamplingParameters:
    return SamplingParameters(**{"max_new_tokens": 8, "eos_token_ids": (2, 5), "pad_token_id": 0, **changes})


class TestUniforms:
    @staticmethod
    def philox(draw: Draw, count: int) -> list[float]:
        """Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") in plain integers."""
        word, numbers = 2**64 - 1, []
        for block in range(1, count // 4 + 2):  # NumPy counts before it computes
            x, key = [block, 0, draw.prompt_id, draw.sample], [draw.seed & word, draw.iteration]
            for _ in range(10):
                first, second = x[0] * 0xD2E7470EE14C6C93, x[2] * 0xCA5A826395121157
                x = [second >> 64 ^ x[1] ^ key[0], second & word, first >> 64 ^ x[3] ^ key[1], first & word]
                key = [key[0] + 0x9E3779B97F4A7C15 & word, key[1] + 0xBB67AE8584CAA73B & word]
            numbers += [(number >> 11) * 2.0**-53 for number in x]
        return numbers[:count]

    @quick
    @given(draws, st.integers(1, 9))
    def test_are_philox_numbers(self, draw, count):
        assert uniforms(draw, count).tolist() == self.philox(draw, count)

    def test_negative_seed(self):
        assert uniforms(Draw(-1, 0, 0, 0), 3).tolist() == self.philox(Draw(-1, 0, 0, 0), 3)

    @quick
    @given(draws, st.integers(0, 20), st.integers(0, 20))
    def test_number_t_depends_on_neither_count_nor_global_state(self, draw, count, more):
        longer = uniforms(draw, count + more)
        np.random.seed(7)
        np.random.random(3)
        np.testing.assert_array_equal(uniforms(draw, count), longer[:count])
        assert ((longer >= 0) & (longer < 1)).all()

    @quick
    @given(draws, draws)
    @example(Draw(1, 2, 3, 4), Draw(2, 2, 3, 4))
    @example(Draw(1, 2, 3, 4), Draw(1, 1, 3, 4))
    @example(Draw(1, 2, 3, 4), Draw(1, 2, 4, 4))
    @example(Draw(1, 2, 3, 4), Draw(1, 2, 3, 3))
    def test_streams_of_two_draws_share_no_number(self, first, second):
        assume(first != second)
        assert not np.intersect1d(uniforms(first, 200), uniforms(second, 200)).size


class TestChooseTokens:
    @quick
    @given(seeds, st.lists(st.floats(0, LAST_UNIFORM), min_size=4, max_size=4))
    @example(1, [0.0, LAST_UNIFORM, 0.5, 0.25])
    def test_is_the_inverse_cdf(self, seed, uniform):
        logits = random_logits(seed, rows=4)
        cdf = softmax(logits).cumsum(-1)
        uniform = np.array(uniform)
        assume((abs(cdf[:, :-1] - uniform[:, None]) > 1e-6).all())  # the float32 softmax may move a border this far
        expected = [next(i for i in range(11) if row[i] > u or i == 10) for row, u in zip(cdf, uniform, strict=True)]
        assert choose(logits, uniform).tolist() == expected

    def test_a_uniform_on_a_border_takes_the_token_above_it(self):
        uniform = [0.0, 0.25, np.nextafter(0.5, 0), 0.5, 0.75, LAST_UNIFORM]
        assert choose(np.zeros([6, 4]), uniform).tolist() == [0, 1, 1, 2, 3, 3]

    def test_an_even_grid_of_uniforms_gives_each_token_its_share(self):
        logits, count = random_logits(3, rows=1), 5000
        tokens = choose(np.tile(logits, [count, 1]), (np.arange(count) + 0.5) / count)
        np.testing.assert_allclose(np.bincount(tokens, minlength=11), softmax(logits)[0] * count, atol=1.1)
        assert (np.diff(tokens) >= 0).all()

    @pytest.mark.parametrize("number", ["seed", "iteration", "prompt_id", "sample"])
    def test_frequencies_over_draws_are_softmax(self, number):
        logits, count = random_logits(4, rows=1, size=6), 3000
        same = {"seed": 5, "iteration": 6, "prompt_id": 7, "sample": 8}
        uniform = [uniforms(Draw(**same | {number: i}), 1)[0] for i in range(count)]
        expected = softmax(logits)[0] * count
        observed = np.bincount(choose(np.tile(logits, [count, 1]), uniform), minlength=6)
        chi_square = ((observed - expected) ** 2 / expected).sum()
        assert chi_square < 20.5  # 99.9 % of chi-square with 5 degrees of freedom; the draws are fixed

    @pytest.mark.parametrize("uniform", [0.0, 1e-300, LAST_UNIFORM])
    @pytest.mark.parametrize("allowed", [[0], [3, 4], [10]])
    def test_an_excluded_token_is_never_drawn(self, uniform, allowed):
        logits = np.full([1, 11], -np.inf)
        logits[0, allowed] = 1.0
        assert choose(logits, [uniform])[0] in allowed

    def test_greedy_is_argmax_whatever_the_uniform(self):
        logits = random_logits(5, rows=4)
        for uniform in (0.0, 0.6, LAST_UNIFORM):
            np.testing.assert_array_equal(choose(logits, [uniform] * 4, greedy=True), logits.argmax(-1))


class TestFilters:
    @quick
    @given(seeds, st.integers(1, 15))
    def test_top_k(self, seed, top_k):
        logits = random_logits(seed)
        ranks = (-logits).argsort(-1).argsort(-1)
        expected = np.where(ranks < top_k, logits, -np.inf)
        np.testing.assert_array_equal(keep_top_k(f32(logits), top_k).numpy(), expected)

    def test_top_k_keeps_ties_with_the_kth(self):
        kept = keep_top_k(f32([[1, 3, 2, 2, 0]]), 2).numpy()
        np.testing.assert_array_equal(kept, [[-math.inf, 3, 2, 2, -math.inf]])

    @quick
    @given(seeds, st.floats(0.01, 0.999))
    def test_top_p(self, seed, top_p):
        """transformers' TopPLogitsWarper: from the least likely on, drop while the mass dropped is <= 1 - top_p."""
        logits = random_logits(seed)
        order = logits.argsort(-1)
        mass = np.take_along_axis(softmax(logits), order, -1).cumsum(-1)
        assume((abs(mass - (1 - top_p)) > 1e-5).all())
        drop = mass <= 1 - top_p
        drop[:, -1] = False
        expected = logits.copy()
        np.put_along_axis(expected, order, np.where(drop, -np.inf, np.take_along_axis(logits, order, -1)), -1)
        np.testing.assert_array_equal(keep_top_p(f32(logits), top_p).numpy(), expected)

    def test_top_p_by_hand(self):
        logits = np.log([[0.5, 0.3, 0.15, 0.05]])
        for top_p, kept in ((1e-6, 1), (0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3), (0.96, 4)):
            assert np.isfinite(keep_top_p(f32(logits), top_p).numpy()).sum() == kept

    def test_top_p_keeps_ties_and_what_another_filter_dropped_stays_dropped(self):
        logits = [[2.0, 2.0, 2.0, -math.inf]]
        np.testing.assert_array_equal(keep_top_p(f32(logits), 0.4).numpy(), logits)
        np.testing.assert_array_equal(keep_top_p(f32(logits), 0.9999999).numpy(), logits)

    @quick
    @given(seeds, st.floats(0.3, 3))
    def test_repetition_penalty(self, seed, penalty):
        """transformers' RepetitionPenaltyLogitsProcessor: divide what is positive, multiply what is negative."""
        logits = random_logits(seed)
        seen = np.random.default_rng(seed).random(logits.shape) < 0.5
        expected = np.where(seen, np.where(logits < 0, logits * penalty, logits / penalty), logits)
        actual = penalise_repetition(f32(logits), paddle.to_tensor(seen), penalty).numpy()
        np.testing.assert_allclose(actual, expected, rtol=1e-6)


def shaped(logits: paddle.Tensor, seen: paddle.Tensor | None, position: int, sampling) -> paddle.Tensor:
    """The distribution of the token at one position of every row's answer."""
    return sampling_logits(logits, seen, paddle.full([len(logits)], position + 1 < sampling.min_new_tokens), sampling)


class TestSamplingLogits:
    @pytest.mark.parametrize("minimum", [1, 2, 4])
    def test_no_end_before_min_new_tokens(self, minimum):
        """EOS counts: with a minimum of 4 it may be the fourth token, at position 3, but no earlier one."""
        logits, sampling = random_logits(1), make_sampling(min_new_tokens=minimum)
        for position in range(6):
            expected = logits.copy()
            if position < minimum - 1:
                expected[:, [2, 5]] = -np.inf
            actual = shaped(f32(logits), None, position, sampling).numpy()
            np.testing.assert_array_equal(actual, expected)

    def test_steps_come_in_the_order_of_transformers(self):
        """Penalty, minimum, temperature, top-k, top-p: EOS takes no place in top-k, the penalised mass counts."""
        logits = np.array([[-1.0, 2.0, 9.0, 1.9, 0.2, 8.0, 1.5]])
        seen = np.array([[True, True, False, False, False, False, False]])
        sampling = make_sampling(min_new_tokens=4, temperature=0.5, top_k=4, top_p=0.95, repetition_penalty=2.0)
        # penalised [-2, 1, 9, 1.9, 0.2, 8, 1.5]; without EOS [-2, 1, -, 1.9, 0.2, -, 1.5]; halved temperature
        # [-4, 2, -, 3.8, 0.4, -, 3]; top 4 {1, 3, 4, 6} with masses .098, .593, .020, .266; top .95 without token 4
        actual = shaped(f32(logits), paddle.to_tensor(seen), 0, sampling).numpy()
        expected = np.full([1, 7], -np.inf)
        expected[0, [1, 3, 6]] = [2.0, 3.8, 3.0]
        np.testing.assert_allclose(actual, expected, rtol=1e-6)

    def test_greedy_keeps_penalty_and_minimum(self):
        logits, seen = f32([[3.0, 2.0, 9.0]]), paddle.to_tensor([[True, False, False]])
        sampling = make_sampling(eos_token_ids=(2,), min_new_tokens=2, repetition_penalty=2.0, temperature=0.0)
        np.testing.assert_array_equal(shaped(logits, seen, 0, sampling).numpy(), [[1.5, 2.0, -math.inf]])

    @quick
    @given(
        seeds,
        st.builds(
            make_sampling,
            temperature=st.sampled_from([0.5, 1.0, 2.0]),
            min_new_tokens=st.sampled_from([1, 1, 1, 3]),
            top_k=st.sampled_from([0, 0, 0, 2]),
            top_p=st.sampled_from([1.0, 1.0, 1.0, 0.5]),
            repetition_penalty=st.sampled_from([1.0, 1.0, 1.0, 1.5]),
        ),
    )
    def test_is_truncated_tells_whether_tokens_come_from_softmax(self, seed, sampling):
        logits = random_logits(seed)
        seen = paddle.ones(logits.shape, dtype="bool") if sampling.repetition_penalty != 1.0 else None
        plain = logits / np.float32(sampling.temperature)
        same = [
            np.array_equal(shaped(f32(logits), seen, position, sampling).numpy(), plain)
            for position in range(4)
        ]
        assert all(same) == (not sampling.is_truncated)

    def test_greedy_is_truncated(self):
        assert make_sampling(temperature=0.0).is_truncated
