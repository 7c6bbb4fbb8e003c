"""Sampling from the advantage-shifted policy, by every rollout engine, against a loop in NumPy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from alignment.ppo.offline.ilql_model import advantage_shift
from alignment.ppo.rollout.protocol import SamplingParameters, uniforms
from tests.models.reference import logits
from tests.models.tiny import log_softmax
from tests.native.compiler import needs_compiler
from tests.ppo.offline.ilql_models import load_with_heads, q_values, write_policy
from tests.ppo.test_rollout_engines import ENGINES, choose, make_prompts

PLAIN = SamplingParameters(max_new_tokens=8, eos_token_ids=(2, 11, 30), pad_token_id=3)
CASES = {
    "plain": PLAIN,
    "top_k": replace(PLAIN, top_k=5, temperature=1.3),
    "greedy": replace(PLAIN, temperature=0.0),
    "penalty": replace(PLAIN, repetition_penalty=1.4, temperature=0.7),
}


@pytest.fixture(scope="module", params=["eager", pytest.param("native", marks=needs_compiler), "plain"])
def make_engine(request):
    return ENGINES[request.param]


@pytest.fixture(scope="module", params=[("llama", True), ("qwen2", False)], ids=str)
def setting(request, tmp_path_factory):
    """(configuration, weights, policy with random heads)."""
    directory = tmp_path_factory.mktemp("policy")
    return *write_policy(directory, *request.param), load_with_heads(directory)


def shifted_logits(config, weights, policy, ids, beta: float) -> np.ndarray:
    _, targets, v = q_values(policy, weights, config, ids)
    return logits(weights, config, ids)[-1] + beta * (np.minimum(*targets)[-1] - v[-1])


def answer(setting, prompt, draw, sampling, beta):
    """tokens and log-probabilities of one answer, by float64 forwards over the whole text so far."""
    ids, results = list(prompt), []
    for position, uniform in enumerate(uniforms(draw, sampling.max_new_tokens)):
        x = shifted_logits(*setting, ids, beta)
        token = choose(x, ids, position, uniform, sampling)
        results.append((token, log_softmax(x / (sampling.temperature or 1.0))[token]))
        ids.append(token)
        if token in sampling.eos_token_ids:
            break
    return zip(*results, strict=True)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("beta", [0.5, 4.0])
def test_answers_are_those_of_a_numpy_loop(make_engine, setting, case, beta):
    sampling, policy = CASES[case], setting[2]
    engine = make_engine(policy, 4)
    engine.adjust_logits = advantage_shift(policy, beta)
    prompts, draws = make_prompts()
    rollout = engine.generate(prompts, draws, sampling)
    for i, (prompt, draw) in enumerate(zip(prompts, draws, strict=True)):
        tokens, log_probs = answer(setting, prompt, draw, sampling, beta)
        mask = rollout.response_mask[i]
        assert rollout.response_ids[i][mask].tolist() == list(tokens)
        np.testing.assert_allclose(rollout.log_probs[i][mask], log_probs, atol=5e-4)


@pytest.mark.parametrize("case", CASES)
def test_without_beta_answers_are_exactly_the_policy_s(make_engine, setting, case):
    policy, (prompts, draws) = setting[2], make_prompts()
    engine = make_engine(policy, 4)
    expected = engine.generate(prompts, draws, CASES[case])
    engine.adjust_logits = advantage_shift(policy, 0.0)
    found = engine.generate(prompts, draws, CASES[case])
    engine.adjust_logits = advantage_shift(policy, 4.0)
    other = engine.generate(prompts, draws, CASES[case])
    for name, value in vars(expected).items():
        np.testing.assert_array_equal(getattr(found, name), value, err_msg=name)
    assert found.response_ids.shape != other.response_ids.shape or (found.response_ids != other.response_ids).any()
