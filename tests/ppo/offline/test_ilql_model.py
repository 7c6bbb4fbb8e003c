"""ILQL's heads on a policy: what they say, how targets follow, what is saved."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file, save_file

from alignment.ppo.collect import pack_experience
from alignment.ppo.models.loading import load_policy
from alignment.ppo.models.policy import hidden_states
from alignment.ppo.models.saving import save_model
from alignment.ppo.offline.ilql_model import HEADS_FILE, action_values, add_heads, save_heads
from alignment.runtime.faults import UsageError
from alignment.runtime.files import Files
from tests.models.reference import logits
from tests.models.tiny import log_softmax
from tests.ppo.experiences import make_experience
from tests.ppo.offline.ilql_models import load_with_heads, q_values, write_policy

PROMPTS, ANSWERS = [3, 5, 2], [4, 1, 3]


@pytest.fixture(scope="module", params=[("llama", True), ("qwen2", False)], ids=str)
def setting(request, tmp_path_factory):
    """(directory, configuration, weights, policy with random heads)."""
    directory = tmp_path_factory.mktemp("policy")
    return directory, *write_policy(directory, *request.param), load_with_heads(directory)


def values_of(policy, experience):
    packed, mask = pack_experience(experience)
    with paddle.no_grad():
        hidden = hidden_states(policy, packed.input_ids, packed.attention_mask)
        return action_values(policy, hidden, packed, mask)


def test_action_values_equal_numpy(setting):
    _, config, weights, policy = setting
    experience = make_experience(1, PROMPTS, ANSWERS)
    found = values_of(policy, experience)
    for i, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        ids = experience.input_ids[i][experience.attention_mask[i]]
        (q_1, q_2), targets, v = q_values(policy, weights, config, ids)
        at, tokens = np.arange(prompt - 1, prompt + answer - 1), ids[prompt:]
        expected = {
            "log_probs": log_softmax(logits(weights, config, ids))[at, tokens],
            "q_1": q_1[at, tokens],
            "q_2": q_2[at, tokens],
            "q_1_log_probs": log_softmax(q_1)[at, tokens],
            "q_2_log_probs": log_softmax(q_2)[at, tokens],
            "target_q": np.minimum(*targets)[at, tokens],
            "values": v[at],
        }
        for name, value in expected.items():
            row = getattr(found, name)[i].numpy()
            np.testing.assert_allclose(row[:answer], value, rtol=1e-4, atol=1e-4, err_msg=name)
            assert (row[answer:] == 0).all()


def test_padding_changes_nothing(setting):
    policy = setting[3]
    experience = make_experience(1, PROMPTS, ANSWERS)
    one = values_of(policy, experience)
    other = values_of(policy, make_experience(1, PROMPTS, ANSWERS, garbage=17))
    for first, second in zip(one, other, strict=True):
        np.testing.assert_array_equal(first.numpy(), second.numpy())
    alone = values_of(policy, experience.take(np.array([1])))
    for first, second in zip(one, alone, strict=True):
        np.testing.assert_allclose(first[1, :1].numpy(), second[0].numpy(), rtol=1e-4, atol=1e-5)


def test_new_heads_start_at_zero_and_differ(setting):
    directory = setting[0]
    policy, again, other = (load_policy(directory) for _ in range(3))
    for model, seed in ((policy, 1), (again, 1), (other, 2)):
        add_heads(model, seed)
    found = values_of(policy, make_experience(1, PROMPTS, ANSWERS))
    assert all(float(x.abs().max()) == 0 for x in (found.q_1, found.q_2, found.target_q, found.values))
    first, second = (head.inner.weight.numpy() for head in policy.ilql_heads.q)
    assert np.abs(first - second).max() > 0.1
    np.testing.assert_array_equal(first, again.ilql_heads.q[0].inner.weight.numpy())
    assert np.abs(first - other.ilql_heads.q[0].inner.weight.numpy()).max() > 0.1
    np.testing.assert_array_equal(first, policy.ilql_heads.target_q[0].inner.weight.numpy())
    trained = {name.split(".")[0] for name, p in policy.ilql_heads.named_parameters() if not p.stop_gradient}
    assert trained == {"v", "q"}


def test_targets_move_by_alpha(setting):
    heads = load_with_heads(setting[0]).ilql_heads
    q, before = ([p.numpy().copy() for p in part.parameters()] for part in (heads.q, heads.target_q))
    heads.move_targets(0.25)
    for target, source, old in zip(heads.target_q.parameters(), q, before, strict=True):
        np.testing.assert_allclose(target.numpy(), 0.25 * source + 0.75 * old, rtol=1e-6, atol=1e-7)
    heads.move_targets(1.0)
    for target, source in zip(heads.target_q.parameters(), q, strict=True):
        np.testing.assert_allclose(target.numpy(), source, rtol=1e-6, atol=1e-7)


def test_heads_are_saved_beside_a_policy_that_loads_without_them(setting, tmp_path):
    directory, _, weights, policy = setting
    save_model(policy, None, tmp_path)
    save_heads(policy, Files(tmp_path))
    assert sorted(load_file(tmp_path / "model.safetensors")) == sorted(weights)
    plain = load_policy(tmp_path)
    for name, parameter in plain.state_dict().items():
        np.testing.assert_array_equal(parameter.numpy(), policy.state_dict()[name].numpy())
    add_heads(plain, 0, tmp_path)
    for name, parameter in policy.ilql_heads.state_dict().items():
        np.testing.assert_array_equal(plain.ilql_heads.state_dict()[name].numpy(), parameter.numpy())


@pytest.mark.parametrize("fault", ["shape", "name"])
def test_heads_of_another_model_are_refused(setting, tmp_path, fault):
    policy = setting[3]
    save_heads(policy, Files(tmp_path))
    tensors = load_file(tmp_path / HEADS_FILE)
    if fault == "shape":
        tensors["q.0.outer.bias"] = tensors["q.0.outer.bias"][:-1]
    else:
        tensors["q.2.outer.bias"] = tensors.pop("q.0.outer.bias")
    save_file(tensors, tmp_path / HEADS_FILE)
    with pytest.raises(UsageError, match=r"ilql_heads.safetensors: q\.[02]\.outer\.bias"):
        add_heads(load_policy(setting[0]), 0, tmp_path)
