"""Log-probabilities and entropies of marked tokens against the NumPy forward pass, gradients against full logits."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.ppo.models import policy as forward_pass
from alignment.ppo.models.policy import hidden_states, language_model_head, pack, position_ids_of, target_log_probs
from tests.models.tiny import TinyPolicy, answer_log_probs, log_softmax, tiny_policy

PROMPTS, ANSWERS = (3, 1, 5), (2, 4, 1)  # tokens of each row
P, T = max(PROMPTS), max(ANSWERS)


@pytest.fixture(scope="module", params=[("llama", True), ("llama", False), ("qwen2", False)], ids=str)
def policy(request, tmp_path_factory) -> TinyPolicy:
    return tiny_policy(tmp_path_factory.mktemp("policy"), *request.param)


def make_batch(prompts=PROMPTS, answers=ANSWERS, garbage=0, seed=0):
    """ids int64 [B, P + T], attention mask, answer mask [B, T]; ``garbage`` stands at padding."""
    p, t = max(prompts), max(answers)
    mask = np.array([[p - a <= i < p + b for i in range(p + t)] for a, b in zip(prompts, answers, strict=True)])
    real = iter(np.random.default_rng(seed).integers(4, 48, mask.sum()))
    ids = np.array([[next(real) if keep else garbage for keep in row] for row in mask])
    return ids, mask, mask[:, p:]


def as_tensors(*arrays):
    return [paddle.to_tensor(array) for array in arrays]


def expected_rows(policy: TinyPolicy, ids, mask, temperature=1.0):
    """For each row, of its real tokens alone: log-probabilities and entropies [l - 1] of tokens 1 to l - 1."""
    for row, keep in zip(ids, mask, strict=True):
        x = policy.log_softmax(row[keep], temperature)[:-1]
        yield np.take_along_axis(x, row[keep][1:, None], 1)[:, 0], -(np.exp(x) * x).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_response_log_probs(policy, temperature):
    ids, mask, response_mask = make_batch()
    with paddle.no_grad():
        actual = answer_log_probs(policy.model, ids, mask, response_mask, temperature)
    assert [x.dtype for x in actual] == [paddle.float32] * 2
    for i, expected in enumerate(expected_rows(policy, ids, mask, temperature)):
        for x, y in zip(actual, expected, strict=True):
            np.testing.assert_allclose(x[i].numpy()[response_mask[i]], y[-ANSWERS[i] :], atol=2e-4)
            assert (x[i].numpy()[~response_mask[i]] == 0).all()


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 5)), min_size=1, max_size=4), st.integers(0, 47))
def test_padding_and_other_rows_change_nothing(policy, lengths, garbage):
    prompts, answers = zip(*lengths, strict=True)
    ids, mask, response_mask = make_batch(prompts, answers, garbage)
    with paddle.no_grad():
        log_probs, entropy = answer_log_probs(policy.model, ids, mask, response_mask)
        for i, count in enumerate(answers):
            row = ids[i][mask[i]][None]
            alone = answer_log_probs(policy.model, row, row >= 0, np.ones([1, count], bool))
            for batched, single in zip((log_probs, entropy), alone, strict=True):
                np.testing.assert_allclose(batched[i, :count].numpy(), single[0].numpy(), atol=1e-5)


def test_targets_come_in_row_major_order_anywhere_but_in_column_0(policy, monkeypatch):
    """And nothing else becomes a logit."""
    ids, mask, _ = make_batch((1, 1), (6, 6), seed=1)
    target_mask = np.zeros_like(mask)
    target_mask[0, [1, 4]] = target_mask[1, [0, 2, 3, 6]] = True
    seen = []

    def head(model, hidden):
        seen.append(language_model_head(model, hidden))
        return seen[-1]

    monkeypatch.setattr(forward_pass, "language_model_head", head)
    with paddle.no_grad():
        packed = pack(*as_tensors(ids, mask, target_mask))
        hidden = hidden_states(policy.model, packed.input_ids, packed.attention_mask)
        log_probs = target_log_probs(policy.model, hidden, packed, temperature=0.7)
    first, second = (policy.log_softmax(row, 0.7) for row in ids)
    rows = np.stack([*first[[0, 3]], *second[[1, 2, 5]]])
    targets = [*ids[0, [1, 4]], *ids[1, [2, 3, 6]]]
    np.testing.assert_allclose(log_probs.numpy(), rows[range(5), targets], atol=2e-4)
    assert log_probs.dtype == paddle.float32 and [logits.shape for logits in seen] == [[5, 48]]
    np.testing.assert_allclose(log_softmax(seen[0].numpy() / 0.7), rows, atol=2e-4)


def gradients(model, loss) -> dict[str, np.ndarray]:
    model.clear_gradients()
    loss.backward()
    found = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    model.clear_gradients()
    return found


def test_gradients_are_those_of_full_logits(policy):
    """Log-probability, and entropy where it is asked for, written out on PaddleNLP's own logits [B, L, V]."""
    ids, mask, response_mask = make_batch()
    model, weight = policy.model, paddle.to_tensor(np.random.default_rng(2).normal(size=[3, T]).astype(np.float32))
    for entropy_weight in (0.0, 0.7):
        log_probs, entropy = answer_log_probs(
            model, ids, mask, response_mask, 0.8, train_entropy=entropy_weight > 0
        )
        assert entropy.stop_gradient == (entropy_weight == 0)
        actual = gradients(model, (weight * (log_probs + entropy_weight * entropy)).sum())

        logits = model(
            input_ids=paddle.to_tensor(ids),
            attention_mask=paddle.to_tensor(mask),
            position_ids=position_ids_of(paddle.to_tensor(mask)),
            return_dict=False,
        )
        logits = (logits[0] if isinstance(logits, tuple) else logits)[:, P - 1 : -1] / 0.8
        x = logits - logits.logsumexp(-1, keepdim=True)
        chosen = (x * paddle.nn.functional.one_hot(paddle.to_tensor(ids[:, P:]), 48)).sum(-1)
        value = weight * (chosen - entropy_weight * (x.exp() * x).sum(-1))
        expected = gradients(model, (value * paddle.to_tensor(response_mask).astype("float32")).sum())

        assert actual.keys() == expected.keys() == dict(model.named_parameters()).keys()
        for name, gradient in expected.items():
            np.testing.assert_allclose(actual[name], gradient, atol=1e-4 * abs(gradient).max(), err_msg=name)


def test_head_of_one_row_and_of_many(policy):
    hidden = paddle.to_tensor(np.random.default_rng(3).normal(size=[2, 3, 32]).astype(np.float32))
    with paddle.no_grad():
        whole = language_model_head(policy.model, hidden).numpy()
        flat = language_model_head(policy.model, hidden.reshape([6, 32])).numpy()
        one = language_model_head(policy.model, hidden[0, :1]).numpy()
    assert whole.shape == (2, 3, 48) and one.shape == (1, 48)
    np.testing.assert_allclose(flat.reshape(2, 3, 48), whole, atol=1e-5)
    np.testing.assert_allclose(one, whole[0, :1], atol=1e-5)


def test_position_ids_count_real_tokens():
    mask = paddle.to_tensor([[False, False, True, True, True], [True, True, True, False, False]])
    assert position_ids_of(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]]
