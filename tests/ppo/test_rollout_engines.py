"""Every rollout engine against a generation loop in NumPy, and against a full forward pass over what it sampled."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.ppo.rollout.eager import EagerRolloutEngine
from alignment.ppo.rollout.fused import FusedRolloutEngine
from alignment.ppo.rollout.native.kernels import NativeKernels
from alignment.ppo.rollout.operations import Operations
from alignment.ppo.rollout.plain import PaddleKernels
from alignment.ppo.rollout.protocol import Draw, Rollout, SamplingParameters, uniforms
from tests.models.reference import logits
from tests.models.tiny import TinyPolicy, answer_log_probs, log_softmax, tiny_policy
from tests.native.compiler import needs_compiler

PAD = 3
LENGTHS = (1, 4, 9, 2, 4, 6)
PLAIN = SamplingParameters(max_new_tokens=10, eos_token_ids=(2, 11, 30, 31, 40), pad_token_id=PAD)
CASES = {
    "plain": PLAIN,
    "one eos": replace(PLAIN, eos_token_ids=(2,)),
    "warm": replace(PLAIN, temperature=1.7),
    "cold": replace(PLAIN, temperature=0.4),
    "greedy": replace(PLAIN, temperature=0.0),
    "top_k": replace(PLAIN, top_k=5, temperature=1.3),
    "top_p": replace(PLAIN, top_p=0.6),
    "penalty": replace(PLAIN, repetition_penalty=1.8),
    "greedy with penalty": replace(PLAIN, repetition_penalty=1.8, temperature=0.0),
    "minimum": replace(PLAIN, min_new_tokens=6),
    "all": replace(PLAIN, min_new_tokens=3, top_k=20, top_p=0.8, repetition_penalty=0.7, temperature=0.9),
}


ENGINES = {
    "eager": EagerRolloutEngine,
    "native": partial(FusedRolloutEngine, kernels=NativeKernels),
    "plain": partial(FusedRolloutEngine, kernels=partial(PaddleKernels, operations=Operations())),
}


@pytest.fixture(scope="module", params=["eager", pytest.param("native", marks=needs_compiler), "plain"])
def make_engine(request):
    """(model, batch size) -> engine."""
    return ENGINES[request.param]


@pytest.fixture(scope="module", params=[("llama", True), ("llama", False), ("qwen2", False)], ids=str)
def policy(request, tmp_path_factory) -> TinyPolicy:
    """Four query heads share two key heads."""
    return tiny_policy(tmp_path_factory.mktemp("policy"), *request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> TinyPolicy:
    return tiny_policy(tmp_path_factory.mktemp("llama"))


def make_prompts(lengths=LENGTHS, seed=0) -> tuple[list[np.ndarray], list[Draw]]:
    random = np.random.default_rng(seed)
    return [random.integers(4, 48, n) for n in lengths], [Draw(17, 3, i // 2, i % 2) for i in range(len(lengths))]


def answer(policy: TinyPolicy, prompt, draw: Draw, sampling: SamplingParameters):
    """tokens, log-probabilities, entropies of one answer, by float64 forwards over the whole text so far."""
    ids, results = list(prompt), []
    for position, uniform in enumerate(uniforms(draw, sampling.max_new_tokens)):
        raw = logits(policy.weights, policy.config, ids)[-1]
        x = log_softmax(raw / (sampling.temperature or 1.0))
        token = choose(raw, ids, position, uniform, sampling)
        results.append((token, x[token], -(np.exp(x) * x).sum()))
        ids.append(token)
        if token in sampling.eos_token_ids:
            break
    return zip(*results, strict=True)


def choose(x: np.ndarray, ids: list[int], position: int, uniform: float, sampling: SamplingParameters) -> int:
    penalised = np.where(x < 0, x * sampling.repetition_penalty, x / sampling.repetition_penalty)
    x = np.where(np.isin(np.arange(len(x)), ids), penalised, x)
    if position + 1 < sampling.min_new_tokens:
        x = np.where(np.isin(np.arange(len(x)), sampling.eos_token_ids), -np.inf, x)
    if sampling.temperature == 0:
        return int(x.argmax())
    order = np.argsort(-x / sampling.temperature)[: sampling.top_k or None]
    mass = np.exp((x[order] - x.max()) / sampling.temperature)
    mass /= mass.sum()
    kept = order[mass.cumsum() - mass < sampling.top_p]
    probs = np.zeros_like(x)
    probs[kept] = mass[: len(kept)] / mass[: len(kept)].sum()
    return int(np.argmax(probs.cumsum() > uniform))


@pytest.mark.parametrize("case", CASES)
def test_answers_are_those_of_a_numpy_loop(make_engine, policy, case):
    sampling = CASES[case]
    prompts, draws = make_prompts()
    rollout = make_engine(policy.model, 4).generate(prompts, draws, sampling)
    for i, (prompt, draw) in enumerate(zip(prompts, draws, strict=True)):
        tokens, log_probs, entropy = answer(policy, prompt, draw, sampling)
        mask = rollout.response_mask[i]
        assert rollout.response_ids[i][mask].tolist() == list(tokens)
        np.testing.assert_allclose(rollout.log_probs[i][mask], log_probs, atol=2e-4)
        np.testing.assert_allclose(rollout.entropy[i][mask], entropy, atol=2e-4)
        assert rollout.finished[i] == (tokens[-1] in sampling.eos_token_ids)


def check_structure(rollout: Rollout, sampling: SamplingParameters) -> None:
    ids, mask = rollout.response_ids, rollout.response_mask
    lengths = mask.sum(-1)
    assert [array.dtype for array in (ids, mask, rollout.log_probs, rollout.entropy, rollout.finished)] == [
        np.int64, bool, np.float32, np.float32, bool
    ]  # fmt: skip
    assert (mask == (np.arange(mask.shape[1]) < lengths[:, None])).all()
    assert mask.shape[1] == lengths.max() <= sampling.max_new_tokens and lengths.min() >= 1
    is_eos = np.isin(ids, sampling.eos_token_ids) & mask
    assert (is_eos.sum(-1) == rollout.finished).all()  # at most one, and none in an answer that was cut
    last = np.take_along_axis(is_eos, lengths[:, None] - 1, 1)[:, 0]
    assert (last == rollout.finished).all()
    assert (lengths[~rollout.finished] == sampling.max_new_tokens).all()
    assert (ids[~mask] == sampling.pad_token_id).all()
    assert (rollout.log_probs[~mask] == 0).all() and (rollout.entropy[~mask] == 0).all()
    assert (rollout.log_probs[mask] < 0).all() and (rollout.entropy[mask] > 0).all()


def test_eos_is_an_action_and_nothing_after_it(make_engine, llama):
    prompts, draws = make_prompts(LENGTHS * 3)
    rollout = make_engine(llama.model, 7).generate(prompts, draws, PLAIN)
    check_structure(rollout, PLAIN)
    ends = {int(ids[mask][-1]) for ids, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)}
    assert len(ends & set(PLAIN.eos_token_ids)) > 1  # several end tokens occur
    assert 0 < rollout.finished.sum() < len(prompts)  # and both kinds of answers
    assert len(set(rollout.response_mask.sum(-1))) > 2


def test_pad_may_be_an_end_token(make_engine, llama):
    """Many models pad with EOS: the mask must not come from the ids."""
    prompts, draws = make_prompts()
    sampling = replace(PLAIN, pad_token_id=2)
    rollout = make_engine(llama.model, 6).generate(prompts, draws, sampling)
    other = make_engine(llama.model, 6).generate(prompts, draws, PLAIN)
    np.testing.assert_array_equal(rollout.response_mask, other.response_mask)
    np.testing.assert_array_equal(rollout.log_probs, other.log_probs)
    check_structure(rollout, sampling)


def test_first_token_may_end_the_answer_and_the_batch(make_engine, llama):
    prompts, draws = make_prompts()
    first = make_engine(llama.model, 6).generate(prompts, draws, PLAIN).response_ids[:, 0]
    sampling = replace(PLAIN, eos_token_ids=tuple(first.tolist()))
    rollout = make_engine(llama.model, 6).generate(prompts, draws, sampling)
    assert rollout.finished.all() and rollout.response_mask.shape == (6, 1)
    np.testing.assert_array_equal(rollout.response_ids[:, 0], first)


def test_without_an_end_token_every_answer_is_cut(make_engine, llama):
    sampling = replace(PLAIN, eos_token_ids=(), max_new_tokens=3)
    rollout = make_engine(llama.model, 6).generate(*make_prompts(), sampling)
    assert rollout.response_mask.shape == (6, 3) and rollout.response_mask.all() and not rollout.finished.any()


def assert_same(first: Rollout, rows, second: Rollout) -> None:
    """Row rows[i] of ``first`` is row i of ``second``."""
    width = second.response_ids.shape[1]
    assert not first.response_mask[rows, width:].any()
    for name in ("response_ids", "response_mask"):
        np.testing.assert_array_equal(getattr(first, name)[rows, :width], getattr(second, name))
    np.testing.assert_array_equal(first.finished[rows], second.finished)
    for name in ("log_probs", "entropy"):
        np.testing.assert_allclose(getattr(first, name)[rows, :width], getattr(second, name), atol=2e-5)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.permutations(range(6)), st.integers(1, 6), st.integers(1, 7), st.sampled_from(["plain", "all", "greedy"]))
def test_an_answer_depends_on_nothing_else_in_the_batch(make_engine, policy, order, count, batch_size, case):
    """Not on the order, the batch size, the other prompts, or, as lengths differ, on left padding."""
    prompts, draws = make_prompts()
    whole = make_engine(policy.model, 6).generate(prompts, draws, CASES[case])
    chosen = order[:count]
    engine = make_engine(policy.model, batch_size)
    part = engine.generate([prompts[i] for i in chosen], [draws[i] for i in chosen], CASES[case])
    assert_same(whole, chosen, part)


def test_what_stands_at_left_padding_does_not_matter(make_engine, llama):
    prompts, draws = make_prompts()
    results = [
        make_engine(llama.model, 6).generate(prompts, draws, replace(PLAIN, pad_token_id=pad, max_new_tokens=1))
        for pad in (0, 47)
    ]
    np.testing.assert_array_equal(results[0].response_ids, results[1].response_ids)
    np.testing.assert_allclose(results[0].log_probs, results[1].log_probs, atol=1e-6)


@pytest.mark.parametrize("case", ["plain", "warm", "cold", "top_p", "penalty", "greedy"])
def test_log_probs_and_entropy_are_those_of_a_full_forward_pass(make_engine, policy, case):
    sampling = CASES[case]
    prompts, draws = make_prompts()
    rollout = make_engine(policy.model, 6).generate(prompts, draws, sampling)
    width = max(LENGTHS)
    ids = np.stack([np.pad(prompt, (width - len(prompt), 0)) for prompt in prompts])
    mask = np.arange(width) >= width - np.array(LENGTHS)[:, None]
    with paddle.no_grad():
        log_probs, entropy = answer_log_probs(
            policy.model,
            np.concatenate([ids, rollout.response_ids], 1),
            np.concatenate([mask, rollout.response_mask], 1),
            rollout.response_mask,
            sampling.temperature or 1.0,
        )
    np.testing.assert_allclose(rollout.log_probs, log_probs.numpy(), atol=2e-5)
    np.testing.assert_allclose(rollout.entropy, entropy.numpy(), atol=2e-5)


def test_current_weights_are_used(make_engine, llama):
    prompts, draws = make_prompts()
    engine = make_engine(llama.model, 6)
    before = engine.generate(prompts, draws, PLAIN)
    head = llama.model.lm_head.weight
    old = head.numpy()
    try:
        head.set_value(old[:, ::-1].copy())  # token i becomes token 47 - i
        after = engine.generate(prompts, draws, replace(PLAIN, max_new_tokens=1))
    finally:
        head.set_value(old)
    np.testing.assert_allclose(after.entropy[:, 0], before.entropy[:, 0], atol=1e-5)
    assert not np.allclose(after.log_probs[:, 0], before.log_probs[:, 0], atol=1e-2)


def test_no_gradient_is_kept_and_no_prompt_is_no_fault(make_engine, llama):
    engine = make_engine(llama.model, 6)
    engine.generate(*make_prompts(), PLAIN)
    assert all(parameter.grad is None for parameter in llama.model.parameters())
    empty = engine.generate([], [], PLAIN)
    assert empty.response_ids.shape == (0, 1) and empty.finished.shape == (0,)
