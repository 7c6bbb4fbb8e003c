"""The CPU forms, compiled and plain: equal to NumPy's, and to PaddleNLP's own, gradients included."""

from __future__ import annotations

from unittest import mock

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paddlenlp.transformers.llama import modeling as llama
from paddlenlp.transformers.llama.modeling import scaled_dot_product_attention
from paddlenlp.transformers.qwen2 import modeling as qwen2

from alignment.ppo.models import cpu, loading
from alignment.ppo.models.cpu import attend_by_groups, speed_up_on_cpu
from alignment.ppo.models.loading import load_policy
from alignment.ppo.models.policy import position_ids_of, trunk
from tests.models.reference import rms_norm
from tests.models.tiny import answer_log_probs, tiny_policy
from tests.native.compiler import needs_compiler, reason

pytestmark = pytest.mark.skipif(paddle.get_device() != "cpu", reason="nothing is changed on a GPU")
FORBIDDEN = np.finfo(np.float32).min  # what PaddleNLP adds to the scores of masked positions
small = st.integers(1, 4)
forms = pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_compiler), False])


def attention(query, key, value, allowed):
    """Per head, in float64. query [B, Q, H, D]; key, value [B, L, G, D]; allowed bool [B, Q, L]."""
    heads, groups = query.shape[2], key.shape[2]
    outputs = []
    for head in range(heads):
        k, v = (x[:, :, head * groups // heads].astype(np.float64) for x in (key, value))
        scores = query[:, :, head] @ k.transpose(0, 2, 1) / np.sqrt(query.shape[-1])
        weights = np.where(allowed, np.exp(scores - scores.max(-1, keepdims=True)), 0)
        outputs.append(weights / weights.sum(-1, keepdims=True) @ v)
    return np.concatenate(outputs, -1)


@forms
@settings(max_examples=40)
@given(st.integers(0, 2**31), small, small, small, small, st.integers(0, 3), st.sampled_from([2, 4, 6]))
def test_attention_by_groups(compiled, seed, batch, width, groups, shared, past, size):
    with mock.patch.object(cpu, "has_kernels", lambda: compiled):
        check_attention(seed, batch, width, groups, shared, past, size)


def check_attention(seed, batch, width, groups, shared, past, size):
    random = np.random.default_rng(seed)
    length = width + past
    query = random.normal(size=[batch, width, groups * shared, size]).astype(np.float32)
    key, value = (random.normal(size=[batch, length, groups, size]).astype(np.float32) for _ in range(2))
    allowed = random.random([batch, width, length]) < 0.6
    allowed[..., -1] = True  # a position sees itself, say
    mask = np.where(allowed, 0, FORBIDDEN).astype(np.float32)[:, None]
    tensors = [paddle.to_tensor(x) for x in (query, key, value, mask)]
    actual = attend_by_groups(tensors[0], None, *tensors[1:])
    assert actual.shape == [batch, width, groups * shared * size]
    np.testing.assert_allclose(actual.numpy(), attention(query, key, value, allowed), atol=2e-5)
    by_tokens = attend_by_groups(tensors[0], None, *tensors[1:], sequence_parallel=True)  # rows of tokens
    np.testing.assert_array_equal(by_tokens.numpy(), actual.numpy().reshape(batch * width, -1))


@pytest.fixture(
    scope="module",
    params=[(kind, compiled) for kind in ("llama", "qwen2") for compiled in (True, False)],
    ids=lambda param: f"{param[0]}-{'compiled' if param[1] else 'plain'}",
)
def models(request, tmp_path_factory):
    """The same weights as load_policy gives them, and without the CPU forms."""
    kind, compiled = request.param
    if compiled and reason:
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "has_kernels", lambda: compiled)
        policy = tiny_policy(tmp_path_factory.mktemp("policy"), kind)
        patch.setattr(loading, "speed_up_on_cpu", lambda model: None)
        yield policy.model, load_policy(policy.directory)


def attentions(model):
    return [layer.self_attn for layer in trunk(model).layers]


def norms(model):
    body = trunk(model)
    return [body.norm, *(x for layer in body.layers for x in (layer.input_layernorm, layer.post_attention_layernorm))]


def test_it_is_on_in_one_model_and_off_in_the_other(models):
    compiled = cpu.has_kernels()
    for model, on in zip(models, (True, False), strict=True):
        assert {"forward" in vars(layer.mlp) for layer in trunk(model).layers} == {on and compiled}
        assert {layer.attn_func is attend_by_groups for layer in attentions(model)} == {on}
        assert {layer.num_key_value_groups for layer in attentions(model)} == {1 if on else 2}
        assert {"forward" in vars(norm) for norm in norms(model)} == {on}


def test_norm(models):
    x = np.random.default_rng(0).normal(0, 3, [2, 3, 32]).astype(np.float32)
    for model in models:
        for norm in norms(model):
            expected = rms_norm(x.astype(np.float64), norm.weight.numpy(), 1e-5)
            np.testing.assert_allclose(norm(paddle.to_tensor(x)).numpy(), expected, rtol=1e-5, atol=1e-6)


def make_batch():
    """Left padding, right padding, none."""
    ids = np.random.default_rng(1).integers(4, 48, [3, 9])
    mask = np.ones([3, 9], bool)
    mask[0, :4] = mask[1, 7:] = False
    return ids, mask, mask[:, 5:]


def learn(model):
    """Log-probabilities, and the gradients of their weighted sum."""
    log_probs, _ = answer_log_probs(model, *make_batch())
    (log_probs * paddle.to_tensor(np.random.default_rng(2).normal(size=[3, 4]).astype(np.float32))).sum().backward()
    gradients = {name.split(".", 1)[1]: p.grad.numpy() for name, p in model.named_parameters()}
    model.clear_gradients()
    return log_probs.numpy(), gradients


def assert_learn_alike(first, second):
    (log_probs, gradients), (expected, expected_gradients) = learn(first), learn(second)
    np.testing.assert_allclose(log_probs, expected, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert abs(gradient).max() > 0, name
        np.testing.assert_allclose(gradients[name], gradient, atol=2e-5 * abs(gradient).max(), err_msg=name)


def test_forward_and_gradients(models):
    assert_learn_alike(*models)


def test_recomputed_activations(models, tmp_path):
    own = models[1]
    directory = tiny_policy(tmp_path, own.config.model_type).directory
    assert_learn_alike(load_policy(directory, recompute=True), own)


def test_decoding_with_a_cache(models):
    """A prompt, then two tokens one by one: the last hidden state of every step."""
    ids, mask, _ = (paddle.to_tensor(x) for x in make_batch())
    results = []
    for model in models:
        cache, steps = None, []
        with paddle.no_grad():
            for start, end in ((0, 7), (7, 8), (8, 9)):
                hidden, cache = trunk(model)(
                    input_ids=ids[:, start:end],
                    attention_mask=mask[:, :end],
                    position_ids=position_ids_of(mask)[:, start:end],
                    past_key_values=cache,
                    use_cache=True,
                    return_dict=False,
                )[:2]
                steps.append(hidden[:, -1].numpy()[[0, 2]])  # row 1 is padded on the right
        results.append(np.stack(steps))
        assert cache[0][0].shape == [3, 9, 2, 8]
    np.testing.assert_allclose(*results, atol=1e-5)


def test_nothing_changes_on_a_gpu(models, monkeypatch):
    monkeypatch.setattr(paddle, "get_device", lambda: "gpu:0")
    speed_up_on_cpu(models[1])
    assert attentions(models[1])[0].attn_func is not attend_by_groups and "forward" not in vars(norms(models[1])[0])


def test_paddlenlp_still_computes_the_same():
    """The function that is replaced, on repeated heads: the day its arguments change, this fails."""
    random = np.random.default_rng(3)
    query, key, value = (paddle.to_tensor(random.normal(size=[2, 5, n, 8]).astype("float32")) for n in (4, 2, 2))
    causal = paddle.to_tensor(np.where(np.tri(5, dtype=bool), 0, FORBIDDEN).astype("float32")).expand([2, 1, 5, 5])

    class Config:
        use_flash_attention, context_parallel_degree = False, 1

    repeated = (x.repeat_interleave(2, axis=2) for x in (key, value))
    expected = scaled_dot_product_attention(query, Config, *repeated, causal, False)
    actual = attend_by_groups(query, Config, key, value, causal, False)
    np.testing.assert_allclose(actual.numpy(), expected.numpy(), atol=1e-6)


@needs_compiler
@pytest.mark.parametrize("module", [llama, qwen2])
def test_rotation_equals_paddlenlps(module, models):
    random = np.random.default_rng(4)
    query, key = (paddle.to_tensor(random.normal(size=[2, 5, n, 8]).astype("float32")) for n in (4, 2))
    cos, sin = trunk(models[0]).layers[0].self_attn.rotary_emb(query, seq_len=9)
    positions = paddle.to_tensor(random.integers(0, 9, [2, 5]))
    own = module.apply_rotary_pos_emb.__wrapped__(query, key, cos, sin, positions)
    for actual, expected in zip(module.apply_rotary_pos_emb(query, key, cos, sin, positions), own, strict=True):
        np.testing.assert_allclose(actual.numpy(), expected.numpy(), atol=1e-6)
