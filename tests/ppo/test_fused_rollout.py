"""What only the fused engine promises: results that no batch can change, shared prompts, early ends."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.native import build
from alignment.ppo.models.lora import Base, LoRASettings, adapted_layers, add_adapters
from alignment.ppo.rollout.choose import build_engine
from alignment.ppo.rollout.eager import EagerRolloutEngine
from alignment.ppo.rollout.fused import FusedRolloutEngine
from alignment.ppo.rollout.native.kernels import NativeKernels
from alignment.ppo.rollout.operations import Operations, find_operations
from alignment.ppo.rollout.plain import PaddleKernels
from alignment.ppo.rollout.protocol import Draw, Rollout, SamplingParameters
from alignment.runtime.faults import RunError
from tests.models.tiny import TinyPolicy, tiny_policy, tiny_tokenizer
from tests.native.compiler import needs_compiler

pytestmark = needs_compiler
SAMPLING = SamplingParameters(max_new_tokens=9, eos_token_ids=(2, 11, 30, 31), pad_token_id=3)
SYSTEM = [5, 6, 7, 8, 9]
native = partial(FusedRolloutEngine, kernels=NativeKernels)
plain = partial(FusedRolloutEngine, kernels=partial(PaddleKernels, operations=Operations()))


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> TinyPolicy:
    return tiny_policy(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module", params=[("llama", {}), ("qwen2", {}), ("llama", {"hidden_size": 128})], ids=str)
def policy(request, tmp_path_factory) -> TinyPolicy:
    """Heads of 8 and of 32 numbers; sizes that do not fill a vector."""
    family, changes = request.param
    return tiny_policy(tmp_path_factory.mktemp("policy"), family, **changes)


def make_prompts(count: int = 6, samples: int = 2) -> tuple[list[np.ndarray], list[Draw]]:
    """Some prompts begin alike, one is the beginning of another, two are equal."""
    random = np.random.default_rng(1)
    texts = [SYSTEM, [*SYSTEM, 20], [*SYSTEM, 20, 21], [*SYSTEM, 20, 21], random.integers(4, 48, 30), [4]]
    texts = [np.asarray(text, np.int64) for text in texts[:count]]
    draws = [Draw(5, 1, i, k) for i in range(count) for k in range(samples)]
    return [text for text in texts for _ in range(samples)], draws


def assert_identical(first: Rollout, rows, second: Rollout) -> None:
    """Row rows[i] of ``first`` is row i of ``second``, bit for bit."""
    width = second.response_ids.shape[1]
    assert not first.response_mask[rows, width:].any()
    for name in ("response_ids", "response_mask", "log_probs", "entropy"):
        np.testing.assert_array_equal(getattr(first, name)[rows, :width], getattr(second, name))
    np.testing.assert_array_equal(first.finished[rows], second.finished)


def assert_same_answers(first: Rollout, second: Rollout, atol: float = 2e-5) -> None:
    """The same tokens, as likely, and the same ones kept."""
    np.testing.assert_array_equal(first.kept, second.kept)
    rows = first.kept
    for name in ("response_ids", "response_mask", "finished"):
        np.testing.assert_array_equal(_rows(first, name, rows), _rows(second, name, rows))
    for name in ("log_probs", "entropy"):
        np.testing.assert_allclose(_rows(first, name, rows), _rows(second, name, rows), atol=atol)


def _rows(rollout: Rollout, name: str, rows: np.ndarray) -> np.ndarray:
    """Without the columns that only dropped answers need."""
    array = getattr(rollout, name)[rows]
    return array if array.ndim == 1 else array[:, : rollout.response_mask[rows].sum(-1).max()]


@pytest.mark.parametrize("engine", [native, plain], ids=["native", "plain"])
def test_adapters_are_part_of_the_weights(tmp_path, engine):
    policy = tiny_policy(tmp_path, "qwen2")
    base = native(policy.model, 12).generate(*make_prompts(), SAMPLING)
    add_adapters(policy.model, LoRASettings(rank=2, alpha=4), Base(tmp_path, ""), seed=1)
    for number, (_, layer) in enumerate(adapted_layers(policy.model)):
        layer.lora_B.set_value(np.random.default_rng(number).normal(0, 0.3, layer.lora_B.shape).astype("float32"))
    expected = EagerRolloutEngine(policy.model, 12).generate(*make_prompts(), SAMPLING)
    assert_same_answers(engine(policy.model, 12).generate(*make_prompts(), SAMPLING), expected)
    assert (expected.response_ids[:, :1] != base.response_ids[:, :1]).any()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.permutations(range(12)),
    st.integers(1, 12),
    st.integers(1, 13),
    st.sampled_from([{}, {"repetition_penalty": 1.5, "top_k": 7, "top_p": 0.9, "min_new_tokens": 3}]),
)
def test_order_slots_and_company_change_no_bit(policy, order, count, slots, changes):
    prompts, draws = make_prompts()
    sampling = replace(SAMPLING, **changes)
    whole = native(policy.model, 12).generate(prompts, draws, sampling)
    chosen = order[:count]
    part = native(policy.model, slots).generate([prompts[i] for i in chosen], [draws[i] for i in chosen], sampling)
    assert_identical(whole, chosen, part)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.permutations(range(12)),
    st.integers(1, 13),
    st.sampled_from([native, plain]),
    st.sampled_from(
        [
            {},
            {"temperature": 0.0},
            {"temperature": 1.6, "min_new_tokens": 4},
            {"repetition_penalty": 1.5, "top_k": 9, "top_p": 0.8},
        ]
    ),
)
def test_tokens_and_log_probs_are_those_of_the_eager_engine(policy, order, slots, make, changes):
    prompts, draws = make_prompts()
    prompts, draws = [prompts[i] for i in order], [draws[i] for i in order]
    sampling = replace(SAMPLING, **changes)
    expected = EagerRolloutEngine(policy.model, 5).generate(prompts, draws, sampling)
    assert_same_answers(make(policy.model, slots).generate(prompts, draws, sampling), expected)


@pytest.mark.parametrize("make", [native, plain], ids=["native", "plain"])
def test_prompts_longer_than_a_pass_are_read_in_pieces(llama, make, monkeypatch):
    prompts, draws = make_prompts()
    expected = make(llama.model, 4).generate(prompts, draws, SAMPLING)
    monkeypatch.setattr("alignment.ppo.rollout.fused.ROWS_PER_PASS", 7)
    assert_same_answers(make(llama.model, 4).generate(prompts, draws, SAMPLING), expected)


def test_places_that_were_never_written_do_not_matter(llama, monkeypatch):
    """A prompt is read in pieces while a longer text decodes; the cache holds NaN where nothing was written."""

    def empty(shape, dtype):
        return paddle.full(shape, float("nan"), dtype=dtype)

    random = np.random.default_rng(7)
    prompts = [random.integers(4, 48, length) for length in (12, 30, 17, 23, 14, 29, 20, 26)]
    draws = [Draw(5, 1, i, 0) for i in range(8)]
    sampling = replace(SAMPLING, max_new_tokens=30, eos_token_ids=())
    expected = EagerRolloutEngine(llama.model, 8).generate(prompts, draws, sampling)
    monkeypatch.setattr("alignment.ppo.rollout.fused.ROWS_PER_PASS", 4)
    monkeypatch.setattr(f"{PaddleKernels.__module__}.new_cache", empty)
    assert_same_answers(plain(llama.model, 4).generate(prompts, draws, sampling), expected)


@pytest.mark.parametrize("make", [EagerRolloutEngine, native, plain], ids=["eager", "native", "plain"])
def test_logits_that_are_not_finite_end_the_run(llama, make):
    weight = llama.model.lm_head.weight
    before = weight.numpy()
    broken = before.copy()
    broken[0, 7] = np.nan
    try:
        weight.set_value(broken)
        with pytest.raises(RunError, match="the policy's logits are not finite"):
            make(llama.model, 4).generate(*make_prompts(), SAMPLING)
    finally:
        weight.set_value(before)


def test_more_text_than_positions_is_refused(llama):
    longest = llama.model.config.max_position_embeddings
    sampling = replace(SAMPLING, max_new_tokens=longest)
    with pytest.raises(ValueError, match=f"have up to {longest + 1} tokens, the model has {longest} positions"):
        native(llama.model, 1).generate([np.array([5])], [Draw(0, 0, 0, 0)], sampling)


class TestLimits:
    """The rules may end answers early, but keep what an engine keeps that draws every answer to its end."""

    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(st.integers(1, 4), st.integers(1, 20), st.sampled_from([native, plain]))
    def test_oversampling(self, llama, keep, slots, make):
        prompts, draws = make_prompts(4, 4)
        sampling = replace(SAMPLING, keep=keep)
        late = EagerRolloutEngine(llama.model, 16).generate(prompts, draws, sampling)
        early = make(llama.model, slots).generate(prompts, draws, sampling)
        assert_same_answers(early, late)
        assert early.kept.reshape([4, 4]).sum(-1).tolist() == [keep] * 4
        assert early.drawn_tokens <= late.drawn_tokens

    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(st.integers(3, 40), st.integers(3, 20), st.sampled_from([native, plain]))
    def test_token_budget(self, llama, budget, slots, make):
        prompts, draws = make_prompts(4, 3)
        sampling = replace(SAMPLING, token_budget=budget)
        late = EagerRolloutEngine(llama.model, 16).generate(prompts, draws, sampling)
        early = make(llama.model, slots).generate(prompts, draws, sampling)
        assert_same_answers(early, late)
        assert (early.response_mask.sum(-1).reshape([4, 3]).sum(-1) <= budget).all()
        assert early.drawn_tokens == early.response_mask.sum()  # never a token beyond it

    def test_oversampling_saves_the_tail(self, llama):
        prompts, draws = make_prompts(4, 4)
        late = native(llama.model, 16).generate(prompts, draws, SAMPLING)
        early = native(llama.model, 16).generate(prompts, draws, replace(SAMPLING, keep=2))
        assert early.drawn_tokens < late.drawn_tokens
        assert early.response_mask[early.kept].sum() < late.response_mask.sum() / 2

    def test_a_budget_that_is_never_reached_changes_nothing(self, llama):
        prompts, draws = make_prompts(4, 3)
        whole = native(llama.model, 5).generate(prompts, draws, SAMPLING)
        rollout = native(llama.model, 5).generate(prompts, draws, replace(SAMPLING, token_budget=27))
        assert_identical(whole, range(12), rollout)

    def test_answers_to_equal_prompts_may_come_in_any_order(self, llama):
        """Two prompts of the same tokens, two slots: answers that wait for each other take them together."""
        prompts, draws = [np.array([5, 6])] * 4, [Draw(5, 1, i, k) for k in range(2) for i in range(2)]
        sampling = replace(SAMPLING, token_budget=4)
        late = EagerRolloutEngine(llama.model, 4).generate(prompts, draws, sampling)
        assert_same_answers(native(llama.model, 2).generate(prompts, draws, sampling), late)

    def test_a_budget_needs_a_slot_for_each_answer_to_a_prompt(self, llama):
        prompts, draws = make_prompts(2, 3)
        with pytest.raises(ValueError, match="a slot for each of the 3 answers to a prompt, not 2"):
            native(llama.model, 2).generate(prompts, draws, replace(SAMPLING, token_budget=9))


@pytest.mark.parametrize("make", [EagerRolloutEngine, native, plain], ids=["eager", "native", "plain"])
class TestStopStrings:
    def test_an_answer_ends_with_the_token_that_completes_one(self, llama, make, tmp_path):
        tokenizer = tiny_tokenizer(tmp_path)
        prompts, draws = make_prompts()
        sampling = replace(SAMPLING, eos_token_ids=())
        whole = make(llama.model, 6).generate(prompts, draws, sampling)
        answer = whole.response_ids[3]
        stops = (f"w{answer[4]} w{answer[5]}", "never said")
        stopped = make(llama.model, 6, decode=tokenizer.decode).generate(
            prompts, draws, replace(sampling, stop_strings=stops)
        )
        assert stopped.finished[3] and stopped.response_mask[3].sum() == 6
        for row in range(12):
            length = stopped.response_mask[row].sum()
            np.testing.assert_array_equal(stopped.response_ids[row, :length], whole.response_ids[row, :length])
            text = tokenizer.decode(stopped.response_ids[row, :length].tolist())
            assert stopped.finished[row] == (stops[0] in text)
            assert stops[0] not in tokenizer.decode(stopped.response_ids[row, : length - 1].tolist())

    def test_without_text_they_are_refused(self, llama, make):
        with pytest.raises(ValueError, match="stop strings need an engine that can decode"):
            make(llama.model, 6).generate(*make_prompts(), replace(SAMPLING, stop_strings=("x",)))


class TestChoice:
    def test_the_kernels_are_named_at_start(self, llama, capsys):
        assert isinstance(build_engine(llama.model, 2, use_fusemt=False), EagerRolloutEngine)
        engine = build_engine(llama.model, 2, use_fusemt=True)
        assert engine.kernels is NativeKernels
        assert capsys.readouterr().out.splitlines() == [
            "rollout: PaddleNLP's own forward pass (use_fusemt is false)",
            "rollout: C++ kernels compiled for this processor",
        ]

    def test_without_a_compiler_plain_operations_run_and_it_is_said(self, llama, capsys, monkeypatch):
        with monkeypatch.context() as without:
            without.setenv("PATH", "")
            without.delenv("CXX", raising=False)
            build.load_library.cache_clear()
            engine = build_engine(llama.model, 4, use_fusemt=True)
        build.load_library.cache_clear()
        assert "plain Paddle operations, for no C++ compiler ($CXX, g++ or clang++): slower" in capsys.readouterr().out
        prompts, draws = make_prompts()
        expected = EagerRolloutEngine(llama.model, 4).generate(prompts, draws, SAMPLING)
        assert_same_answers(engine.generate(prompts, draws, SAMPLING), expected)

    def test_a_compiler_that_fails_is_named(self, llama, capsys, monkeypatch, tmp_path):
        compiler = tmp_path / "g++"
        compiler.write_text("#!/bin/sh\necho 'kernels.cpp:1:1: error: no such flag' >&2\nexit 1\n")
        compiler.chmod(0o755)
        monkeypatch.setenv("CXX", str(compiler))
        monkeypatch.setenv("ALIGNMENT_CACHE", str(tmp_path / "cache"))
        build.load_library.cache_clear()
        try:
            build_engine(llama.model, 4, use_fusemt=True)
        finally:
            build.load_library.cache_clear()
        assert "for g++ failed: kernels.cpp:1:1: error: no such flag" in capsys.readouterr().out
        assert not list((tmp_path / "cache").glob("*.so"))

    def test_fused_operations_are_used_only_where_they_agree_with_the_plain_ones(self, llama, monkeypatch):
        wrong = [("swiglu", "wrong_swiglu", lambda gate, up: gate * up)]
        monkeypatch.setattr("alignment.ppo.rollout.operations.FUSED", wrong)
        operations, used, missing = find_operations("float32")
        assert operations == Operations() and used == []
        assert len(missing) == 1 and missing[0].startswith("wrong_swiglu (differs by ")

    def test_every_operation_of_the_installed_build_gives_the_same_answers(self, llama):
        operations, used, missing = find_operations("float32")
        assert len(used) + len(missing) == 5 and "scaled_dot_product_attention" in used
        assert any(reason.startswith("flash_attn_unpadded (") for reason in missing)  # it has no CPU kernel
        prompts, draws = make_prompts()
        engine = FusedRolloutEngine(llama.model, 4, partial(PaddleKernels, operations=operations))
        expected = native(llama.model, 4).generate(prompts, draws, SAMPLING)
        assert_same_answers(engine.generate(prompts, draws, SAMPLING), expected)

    def test_off_the_cpu_the_line_names_what_is_used_and_what_not(self, llama, monkeypatch, capsys):
        monkeypatch.setattr(paddle, "get_device", lambda: "gpu:0")  # the kernels are tried where the tensors are
        build_engine(llama.model, 4, use_fusemt=True)
        line = capsys.readouterr().out.strip()
        assert line.startswith("rollout: Paddle's ") and "scaled_dot_product_attention; without " in line
        assert "flash_attn_unpadded (" in line  # it has no CPU kernel
        assert line.endswith(
            "; by choice without block_multihead_attention, masked_multihead_attention, top_p_sampling, paddlenlp_ops"
        )
