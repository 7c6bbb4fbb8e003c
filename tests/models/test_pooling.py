"""Pooling: by hand, and a score that depends neither on padding nor on what it is batched with."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.ppo.models.policy import hidden_states
from alignment.ppo.models.pooling import POOLING_TYPES, pool
from alignment.ppo.models.saving import save_model
from alignment.ppo.models.value import load_value
from alignment.runtime.faults import UsageError
from tests.models.heads import with_random_head
from tests.models.reference import hidden_states as reference_states
from tests.models.reference import make_config, random_weights, write_checkpoint

EOS = 2
STATES = [[9.0, 9.0], [-1.0, -6.0], [-3.0, -2.0], [-5.0, -4.0], [9.0, 9.0]]
BY_HAND = {"eos": [-5.0, -4.0], "last": [-3.0, -2.0], "average": [-3.0, -4.0], "max": [-1.0, -2.0]}
rows = st.lists(st.lists(st.integers(3, 40), min_size=1, max_size=6), min_size=1, max_size=4)


@pytest.mark.parametrize("kind", POOLING_TYPES)
def test_by_hand(kind):
    # two tokens and EOS between padding whose states are the largest, and its ids EOS
    ids, mask = paddle.to_tensor([[EOS, 5, 6, EOS, EOS]]), paddle.to_tensor([[False, True, True, True, False]])
    assert pool(paddle.to_tensor([STATES]), ids, mask, kind, EOS).tolist() == [BY_HAND[kind]]


def test_last_without_and_with_nothing_but_the_end():
    states, mask = paddle.to_tensor([STATES[:3]] * 2), paddle.to_tensor([[True, True, True]] * 2)
    found = pool(states, paddle.to_tensor([[5, EOS, 6], [EOS, EOS, EOS]]), mask, "last", EOS)
    assert found.tolist() == [STATES[2], STATES[2]]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Configuration, weights, and a saved and restored reward model for each kind of pooling."""
    folder = tmp_path_factory.mktemp("models")
    config = make_config("llama", True) | {"eos_token_id": EOS}
    weights = random_weights(config)
    made = {}
    for kind in POOLING_TYPES:
        model = with_random_head(load_value(write_checkpoint(folder / "base", config, weights)))
        model.pooling_type, model.sep_token_id = kind, 7
        save_model(model, None, folder / kind)
        made[kind] = load_value(folder / kind, require_head=True)
        made[kind].eval()
        assert (made[kind].pooling_type, made[kind].sep_token_id) == (kind, 7)
    critic = load_value(folder / "max", "critic")
    assert (critic.pooling_type, critic.sep_token_id) == ("eos", None)
    return config, weights, made


def scores_of(model, answers, left=0, right=0):
    """Scores [B] of token lists, padded to one width and further."""
    width = left + max(map(len, answers)) + right
    ids, mask = np.full((len(answers), width), EOS), np.zeros((len(answers), width), bool)
    for row, answer in enumerate(answers):
        ids[row, left : left + len(answer)], mask[row, left : left + len(answer)] = answer, True
    ids, mask = paddle.to_tensor(ids), paddle.to_tensor(mask)
    with paddle.no_grad():
        return model.answer_scores(hidden_states(model, ids, mask), ids, mask).numpy()


@settings(max_examples=15)
@given(rows, st.integers(0, 2), st.integers(0, 3), st.booleans())
@pytest.mark.parametrize("kind", POOLING_TYPES)
def test_neighbours_and_padding_change_no_score(models, kind, answers, left, right, ended):
    model = models[2][kind]
    answers = [answer + [EOS] * ended for answer in answers]
    together = scores_of(model, answers, left, right)
    alone = np.concatenate([scores_of(model, [answer]) for answer in answers])
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", POOLING_TYPES)
def test_equals_the_reference(models, kind):
    config, weights, made = models
    states = reference_states(weights, config, [5, 7, 11, EOS])
    pooled = {"eos": states[-1], "last": states[-2], "average": states.mean(0), "max": states.max(0)}[kind]
    expected = pooled @ made[kind].score_head.weight.numpy().astype(np.float64)
    np.testing.assert_allclose(scores_of(made[kind], [[5, 7, 11, EOS]]), expected, rtol=1e-4, atol=1e-5)


def test_an_unknown_pooling_in_a_file_is_refused(tmp_path):
    config = make_config("llama", True)
    write_checkpoint(tmp_path, config | {"pooling_type": "median"}, random_weights(config))
    with pytest.raises(UsageError, match="config.json: pooling_type = 'median' is not supported"):
        load_value(tmp_path)
