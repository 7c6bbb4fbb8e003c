"""APA's and AWR's optimum by a real Llama: float32, all its parameters trained, every answer enumerated."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from alignment.ppo import losses
from tests.models.tiny import answer_log_probs, log_softmax, tiny_policy
from tests.ppo.answer_tree import build_tree, minimise, soft_values, tilt

TREE = build_tree(vocab=4, length=2, seed=2)  # 1 + 3 * 4 = 13 answers


@pytest.fixture
def model(tmp_path):
    shape = {"vocab_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "bos_token_id": 1, "eos_token_id": 0}
    return tiny_policy(tmp_path / "llama", **shape).model


def answers_of(model) -> paddle.Tensor:
    prompt = np.tile([1, 2], (len(TREE.scores), 1))  # of one token only, Llama cannot tell x from x x
    ids, mask = np.concatenate([prompt, TREE.tokens], 1), np.concatenate([prompt > 0, TREE.mask], 1)
    return answer_log_probs(model, ids, mask, TREE.mask)[0]


def table_of(model) -> np.ndarray:
    table = np.zeros(TREE.child.shape)
    values, where = answers_of(model).numpy().astype(np.float64), TREE.mask
    table[TREE.states[where], TREE.tokens[where]] = values[where]
    return log_softmax(table)


@pytest.mark.parametrize("objective", ["apa", "awr"])
def test_reaches_the_closed_form(model, objective):
    initial = table_of(model)
    mask, old = paddle.to_tensor(TREE.mask), answers_of(model).detach()
    table, _ = soft_values(TREE, initial, 1.0)
    advantages = paddle.to_tensor(TREE.of_answers(table), dtype="float32")
    # One sample of every answer, equally often. AWR moves from these samples, APA from its anchor.
    counts = np.zeros_like(initial)
    np.add.at(counts, (TREE.states, TREE.tokens), TREE.mask)
    around = initial if objective == "apa" else np.log(counts / counts.sum(-1, keepdims=True))

    def loss() -> paddle.Tensor:
        new = answers_of(model)
        if objective == "apa":
            return losses.apa_loss(new, old, old, advantages, mask, 1.0)[0]
        return losses.awr_loss(new, old, advantages, mask, 1.0)[0]

    minimise(model.parameters(), loss)
    np.testing.assert_allclose(table_of(model), tilt(around, table, 1.0), atol=5e-3)
    assert np.abs(tilt(around, table, 1.0) - initial).max() > 0.5
