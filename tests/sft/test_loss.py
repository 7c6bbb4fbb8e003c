"""The supervised loss against an independent NumPy forward pass: shifts, padding, the first label, micro-batches."""

from __future__ import annotations

import numpy as np
import pytest

from alignment.ppo.models.loading import load_policy
from alignment.ppo.models.policy import hidden_states
from alignment.sft.loss import count_labels, supervised_micro_batch
from tests.models.reference import logits, make_config, random_weights, write_checkpoint

ITEMS = [
    {"input_ids": np.array([5, 7, 11, 3, 2]), "labels": np.array([-100, -100, 11, 3, 2])},
    {"input_ids": np.array([9, 4, 2]), "labels": np.array([9, 4, -100])},  # 9 has no token before it
]


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    config = make_config("qwen2", True)
    weights = random_weights(config)
    return load_policy(write_checkpoint(tmp_path_factory.mktemp("model"), config, weights)), config, weights


def collate(items, padding=0):
    width = max(len(item["input_ids"]) for item in items)
    mask = np.array([np.arange(width) < len(item["input_ids"]) for item in items])
    ids = np.full(mask.shape, padding)
    labels = np.full(mask.shape, -100)
    for row, item in enumerate(items):
        ids[row, mask[row]], labels[row, mask[row]] = item["input_ids"], item["labels"]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def supervised_loss(model, batch, denominator, coefficient=1.0):
    """(what is learnt, the report) of a micro-batch, by the whole model."""
    micro = supervised_micro_batch(model, batch, denominator, coefficient)
    return micro.finish(hidden_states(model, micro.input_ids, micro.attention_mask))


def reference_sum(config, weights):
    """-log p of 11, 3, 2 in the first item and of 4 in the second."""
    total = 0.0
    for item, places in zip(ITEMS, ([2, 3, 4], [1]), strict=True):
        rows = logits(weights, config, item["input_ids"])
        for place in places:
            row = rows[place - 1]
            total += np.log(np.exp(row - row.max()).sum()) + row.max() - row[item["input_ids"][place]]
    return total


def test_count_labels():
    assert count_labels(ITEMS) == 4


@pytest.mark.parametrize("padding", [0, 40])
def test_next_token_of_every_label_and_of_nothing_else(setting, padding):
    model, config, weights = setting
    loss, (reported, rows) = supervised_loss(model, collate(ITEMS, padding), 4)
    assert loss.item() == reported == pytest.approx(reference_sum(config, weights) / 4, rel=1e-5)
    assert rows == {}


def test_a_coefficient_scales_what_is_learnt_and_not_what_is_reported(setting):
    (one, report), (other, same) = (supervised_loss(setting[0], collate(ITEMS), 4, scale) for scale in (1.0, 2.5))
    assert other.item() == pytest.approx(2.5 * one.item(), rel=1e-6) and report == same


def test_micro_batches_add_up(setting):
    model = setting[0]

    def run(parts):
        model.clear_gradients()
        losses = [supervised_loss(model, collate(part), 4)[0] for part in parts]
        for loss in losses:
            loss.backward()
        gradients = [parameter.grad.numpy().copy() for parameter in model.parameters()]
        return sum(loss.item() for loss in losses), gradients

    whole, parts = run([ITEMS]), run([ITEMS[:1], ITEMS[1:]])
    assert parts[0] == pytest.approx(whole[0], rel=1e-6)
    for one, other in zip(whole[1], parts[1], strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-6)
