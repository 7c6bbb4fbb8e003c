"""Score models: scores are hidden states times the head, read at the last real token, saved and restored exactly."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file

from alignment.ppo.models.loading import load_policy
from alignment.ppo.models.policy import trunk
from alignment.ppo.models.saving import save_model
from alignment.ppo.models.value import add_value_head, end_scores, load_value
from alignment.runtime.faults import UsageError
from tests.models.heads import with_random_head
from tests.models.reference import hidden_states, make_config, random_weights, write_checkpoint

IDS = [5, 7, 11, 3, 2, 40]


@pytest.fixture(params=[("llama", True), ("qwen2", False)], ids=str)
def checkpoint(request, tmp_path):
    config = make_config(*request.param)
    weights = random_weights(config)
    return write_checkpoint(tmp_path / "causal", config, weights), config, weights


def scores_of(model, ids, mask=None):
    model.eval()
    with paddle.no_grad():
        return model(paddle.to_tensor(ids), paddle.to_tensor(np.ones_like(ids, bool) if mask is None else mask))


def test_scores_match_reference(checkpoint):
    directory, config, weights = checkpoint
    model = with_random_head(load_value(directory))
    scores = scores_of(model, [IDS])
    assert scores.dtype == paddle.float32 and scores.shape == [1, len(IDS)]
    expected = hidden_states(weights, config, IDS) @ model.score_head.weight.numpy().astype(np.float64)
    np.testing.assert_allclose(scores[0].numpy(), expected[:, 0], rtol=1e-4, atol=1e-4)


def test_end_scores_ignore_padding_side(checkpoint):
    model = with_random_head(load_value(checkpoint[0]))
    expected = float(scores_of(model, [IDS])[0, -1])
    for left, right in ((0, 0), (3, 0), (0, 3), (1, 2)):
        ids = [[9] * left + IDS + [9] * right]
        mask = [[False] * left + [True] * len(IDS) + [False] * right]
        ended = end_scores(scores_of(model, ids, mask), paddle.to_tensor(mask))
        np.testing.assert_allclose(ended.numpy(), [expected], rtol=1e-4, atol=1e-5)


def test_end_scores_by_hand():
    scores = paddle.to_tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    mask = paddle.to_tensor([[True, True, False], [False, True, True], [True, False, False]])
    assert end_scores(scores, mask).tolist() == [2.0, 6.0, 7.0]


def test_a_new_head_is_reported_and_says_nothing(checkpoint):
    model = load_value(checkpoint[0])
    assert model.head_is_new and not model.score_head.weight.numpy().any()


def test_round_trip_and_critic_from_reward(checkpoint, tmp_path):
    model = load_value(checkpoint[0])
    model.do_normalize, model.score_mean, model.score_var = True, 1.5, 4.0
    save_model(model, None, tmp_path / "reward")
    reward = load_value(tmp_path / "reward", require_head=True)
    assert not reward.head_is_new and reward.do_normalize
    for name, parameter in model.state_dict().items():
        np.testing.assert_array_equal(parameter.numpy(), reward.state_dict()[name].numpy())
    critic = load_value(tmp_path / "reward", score_type="critic")
    assert not critic.do_normalize and not critic.head_is_new
    raw = scores_of(critic, [IDS]).numpy()
    np.testing.assert_allclose(scores_of(reward, [IDS]).numpy(), (raw - 1.5) / 2.0, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(scores_of(load_value(tmp_path / "reward", do_normalize=False), [IDS]).numpy(), raw)


def test_bad_uses(checkpoint, tmp_path):
    directory = checkpoint[0]
    with pytest.raises(UsageError, match="not a reward model"):
        load_value(directory, require_head=True)
    with pytest.raises(UsageError, match="score_type: 'cost'"):
        load_value(directory, score_type="cost")
    with pytest.raises(UsageError, match="score_mean"):
        load_value(directory, do_normalize=True)
    save_model(load_value(directory), None, tmp_path / "reward")
    with pytest.raises(UsageError, match="score model"):
        load_policy(tmp_path / "reward")


@pytest.mark.skipif(paddle.get_device() == "cpu", reason="Paddle has no bfloat16 matrix product on CPUs")
def test_bfloat16_scores_are_float32(checkpoint):
    model = load_value(checkpoint[0], dtype="bfloat16", recompute=True)
    assert {parameter.dtype for parameter in model.parameters()} == {paddle.bfloat16}
    assert scores_of(model, [IDS]).dtype == paddle.float32


class TestValueHeadOnAPolicy:
    def test_its_scores_are_those_of_the_policys_hidden_states(self, checkpoint):
        directory, config, weights = checkpoint
        policy = load_policy(directory)
        critic = with_random_head(add_value_head(policy), 3)
        assert critic.head_is_new and critic.score_head.weight is policy.score_head.weight
        assert trunk(critic) is trunk(policy)
        head = critic.score_head.weight.numpy().astype(np.float64)
        expected = hidden_states(weights, config, IDS) @ head
        np.testing.assert_allclose(scores_of(critic, [IDS])[0].numpy(), expected[:, 0], rtol=1e-4, atol=1e-4)
        assert {"score_head.weight"} == dict(policy.named_parameters()).keys() - dict(
            load_policy(directory).named_parameters()
        ).keys()
        assert not add_value_head(load_policy(directory)).score_head.weight.numpy().any()  # a new one says nothing

    def test_policy_and_critic_are_saved_apart(self, checkpoint, tmp_path):
        directory, _, weights = checkpoint
        policy = load_policy(directory)
        critic = with_random_head(add_value_head(policy), 3)
        save_model(policy, None, tmp_path / "policy")
        save_model(critic, None, tmp_path / "value")
        assert load_file(tmp_path / "policy" / "model.safetensors").keys() == weights.keys()
        alone = load_value(tmp_path / "value", "critic")
        assert not alone.head_is_new
        np.testing.assert_allclose(scores_of(alone, [IDS]).numpy(), scores_of(critic, [IDS]).numpy(), rtol=1e-6)
        again = add_value_head(load_policy(tmp_path / "policy"), tmp_path / "value")
        assert not again.head_is_new
        np.testing.assert_array_equal(again.score_head.weight.numpy(), critic.score_head.weight.numpy())
