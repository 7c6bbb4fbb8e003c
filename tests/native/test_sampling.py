"""Tokens drawn by the kernels are distributed as NumPy says, and drawn by the engines' common rule."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from alignment.ppo.rollout.kernels import TokenDraws
from alignment.ppo.rollout.native.structures import sample_tokens
from alignment.ppo.rollout.operations import Operations
from alignment.ppo.rollout.plain import PaddleKernels
from alignment.ppo.rollout.protocol import SamplingParameters
from tests.native.compiler import needs_compiler

pytestmark = needs_compiler
PLAIN = SamplingParameters(max_new_tokens=4, eos_token_ids=(2, 5), pad_token_id=0)
CASES = {
    "temperature 1": PLAIN,
    "temperature 0.5": replace(PLAIN, temperature=0.5),
    "temperature 2": replace(PLAIN, temperature=2.0),
    "top_k": replace(PLAIN, top_k=6),
    "top_p": replace(PLAIN, top_p=0.7),
    "penalty": replace(PLAIN, repetition_penalty=1.7),
    "no end yet": replace(PLAIN, min_new_tokens=3),
    "all": replace(PLAIN, temperature=0.8, top_k=20, top_p=0.9, repetition_penalty=1.3, min_new_tokens=3),
}
VOCABULARY, COUNT = 37, 40_000


def plain_sample(logits, draws, sampling):
    kernels = PaddleKernels.__new__(PaddleKernels)  # sampling uses no weights
    kernels.operations = Operations()
    return kernels.sample(paddle.to_tensor(logits), draws, sampling)


SAMPLERS = {"native": sample_tokens, "plain": plain_sample}


def expected_distribution(logits: np.ndarray, seen: np.ndarray, sampling: SamplingParameters) -> np.ndarray:
    """float64 [V], by sorting; the answer may not end where a minimum is set."""
    x = logits.astype(np.float64)
    penalty = sampling.repetition_penalty
    x = np.where(seen, np.where(x > 0, x / penalty, x * penalty), x)
    if sampling.min_new_tokens > 1:
        x[list(sampling.eos_token_ids)] = -np.inf
    x = x / sampling.temperature
    order = np.argsort(-x)[: sampling.top_k or None]
    mass = np.exp(x[order] - x.max())
    mass /= mass.sum()
    kept = mass.cumsum() - mass < sampling.top_p
    probabilities = np.zeros_like(x)
    probabilities[order[kept]] = mass[kept] / mass[kept].sum()
    return probabilities


def make_draws(rows, uniforms, sampling, seen) -> TokenDraws:
    count = len(uniforms)
    forbids_end = np.full([count], sampling.min_new_tokens > 1)
    used = seen[None].astype(np.uint8) if sampling.repetition_penalty != 1.0 else None
    return TokenDraws(rows, np.zeros([count], np.int64), uniforms, forbids_end, used)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("case", CASES)
def test_frequencies_are_those_of_the_distribution(sampler, case):
    """Chi-square test over tokens that are expected five times or more; the seed is fixed, the level 1 in 10,000."""
    random, sampling = np.random.default_rng(3), CASES[case]
    logits = random.normal(0, 1.5, [1, VOCABULARY]).astype(np.float32)
    seen = random.random(VOCABULARY) < 0.3
    draws = make_draws(np.zeros([COUNT], np.int64), random.random(COUNT), sampling, seen)
    tokens = SAMPLERS[sampler](logits, draws, sampling).tokens
    expected = COUNT * expected_distribution(logits[0], seen, sampling)
    counted = np.bincount(tokens, minlength=VOCABULARY)
    assert (counted[expected == 0] == 0).all()
    common = expected >= 5
    rest = ([counted[~common].sum()], [expected[~common].sum()])
    observed, wanted = (np.concatenate([x[common], y]) for x, y in zip((counted, expected), rest, strict=True))
    keep = wanted > 0
    assert chisquare(observed[keep], wanted[keep]).pvalue > 1e-4


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(0, 10**6),
    st.sampled_from([1, 15, 16, 17, 33, 700, 5000]),
    st.sampled_from([{}, {"top_k": 3}, {"top_p": 0.3}, {"repetition_penalty": 1.4}, {"temperature": 0.0}]),
)
def test_kernels_and_operations_draw_the_same_token_from_the_same_number(seed, vocabulary, changes):
    """Any size of vocabulary, also where it does not fill a vector or a block."""
    random = np.random.default_rng(seed)
    sampling = replace(PLAIN, eos_token_ids=(0,), **changes)
    logits = random.normal(0, 3, [4, vocabulary]).astype(np.float32)
    logits[0, : vocabulary // 2] = -np.inf  # a token that cannot be drawn, first of all
    uniforms = np.concatenate([random.random(6), [0.0, 1 - 2.0**-53]])
    draws = make_draws(np.array([0, 1, 2, 3, 0, 1, 0, 0]), uniforms, sampling, random.random(vocabulary) < 0.4)
    first, second = sample_tokens(logits, draws, sampling), plain_sample(logits, draws, sampling)
    np.testing.assert_array_equal(first.tokens, second.tokens)
    assert np.isfinite(logits[draws.rows, first.tokens]).all()
    np.testing.assert_allclose(first.log_probs, second.log_probs, atol=2e-5)
    whole = draws.rows != 0  # entropy of Paddle's operations is not defined for logits of -inf
    np.testing.assert_allclose(first.entropies[whole], second.entropies[whole], atol=2e-5, rtol=1e-5)


def test_described_by_hand():
    """Probabilities 1/2, 1/4, 1/4, whatever the filter: log 1/4 and 1.5 log 2."""
    logits = np.log(np.array([[0.5, 0.25, 0.25]], np.float32)) + 7
    draws = make_draws(np.array([0]), np.array([0.6]), PLAIN, np.zeros(3, bool))
    drawn = sample_tokens(logits, draws, PLAIN)
    assert drawn.tokens.tolist() == [1]
    np.testing.assert_allclose([drawn.log_probs[0], drawn.entropies[0]], [np.log(0.25), 1.5 * np.log(2)], rtol=1e-6)
