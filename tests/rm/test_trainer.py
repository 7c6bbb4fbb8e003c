"""Reward-model trainer: losses of both kinds against the tested functions, normaliser, what it saves."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from alignment.ppo.models.value import load_value
from alignment.rm.losses import ExponentialMovingAverage, RunningMeanStd
from alignment.rm.run_reward import build_normalizer
from alignment.rm.trainer import RewardTrainer
from tests.models.reference import hidden_states, make_config, random_weights, write_checkpoint

PAIRS = [([5, 7, 11, 2], [5, 7, 9, 8, 2]), ([6, 3, 2], [6, 4, 2]), ([8, 9, 10, 11, 2], [8, 2]), ([7, 2], [7, 3, 2])]


class Pairs(list):
    """What the trainer needs of a data.PreferenceDataset."""

    def get_collator(self):
        return collate


def collate(items):
    batch = {}
    width = max(len(ids) for item in items for ids in item.values())
    for side in ("better", "worse"):
        rows = [item[f"{side}_input_ids"] for item in items]
        mask = np.array([np.arange(width) < len(row) for row in rows])
        ids = np.full(mask.shape, 47)
        ids[mask] = np.concatenate(rows)
        batch |= {f"{side}_input_ids": ids, f"{side}_attention_mask": mask}
    return batch


ITEMS = Pairs({"better_input_ids": np.array(b), "worse_input_ids": np.array(w)} for b, w in PAIRS)
SETTINGS = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "per_device_eval_batch_size": 3,
    "data_seed": 1,
    "dataloader_drop_last": False,
    "max_steps": 3,
    "num_train_epochs": 1,
    "learning_rate": 1e-2,
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "lr_scheduler_type": "constant",
    "warmup_ratio": 0.0,
    "warmup_steps": 0,
    "save_total_limit": None,
    "loss_type": "sequence-wise",
    "regularization": 0.0,
}


@pytest.fixture
def setting(tmp_path):
    config = make_config("llama", True)
    weights = random_weights(config)
    model = load_value(write_checkpoint(tmp_path / "model", config, weights), "reward", seed=3)

    def build(normalizer=None, model=model, **changes):
        args = SimpleNamespace(**SETTINGS | changes, output_dir=str(tmp_path / "out"))
        return RewardTrainer(args, model, None, ITEMS, ITEMS, normalizer=normalizer)

    def score(ids):
        """NumPy scores of every position of a sequence."""
        return hidden_states(weights, config, ids) @ model.score_head.weight.numpy().astype(np.float64)[:, 0]

    return build, score


def softplus(x):
    return np.log1p(np.exp(-abs(x))) + max(x, 0.0)


def test_sequence_wise_loss_and_metrics(setting):
    build, score = setting
    metrics = build(regularization=0.1).evaluate()
    ends = np.array([[score(b)[-1], score(w)[-1]] for b, w in PAIRS])
    margins = ends[:, 0] - ends[:, 1]
    expected = np.mean([softplus(-m) for m in margins]) + 0.1 * np.mean((ends**2).sum(1))
    assert metrics["loss"] == pytest.approx(expected, rel=1e-4)
    assert metrics["margin"] == pytest.approx(margins.mean(), rel=1e-4)
    assert metrics["accuracy"] == (margins > 0).mean()
    assert metrics["max_reward"] == pytest.approx(ends.max(), rel=1e-4)


def test_token_wise_loss(setting):
    build, score = setting
    per_pair = []
    for better, worse in PAIRS:
        width = max(len(better), len(worse))
        b, w = (np.pad(score(ids), (0, width - len(ids)), mode="edge") for ids in (better, worse))
        first = next(i for i in range(width) if better[i : i + 1] != worse[i : i + 1])
        per_pair.append(np.mean([softplus(w[t] - b[t]) for t in range(first, width)]))
    assert build(loss_type="token-wise").evaluate()["loss"] == pytest.approx(np.mean(per_pair), rel=1e-4)


def test_normaliser_takes_the_scores_of_the_steps_before(setting):
    build, score = setting
    trainer = build(RunningMeanStd())
    raw = np.array([score(ids)[-1] for pair in PAIRS for ids in pair])
    first = trainer.training_step(1)
    assert first["mean_reward"] == pytest.approx(raw.mean(), rel=1e-4)  # nothing was known before
    assert trainer.normalizer.mean == pytest.approx(raw.mean(), rel=1e-4)
    assert trainer.normalizer.variance == pytest.approx(raw.var(ddof=1), rel=1e-4)
    expected = trainer.evaluate()["mean_reward"]  # a step takes all pairs, so this is what it will see
    assert trainer.training_step(2)["mean_reward"] == pytest.approx(expected, rel=1e-5)
    assert trainer.normalizer.count == 16


def test_the_saved_model_normalises_as_training_did(setting, tmp_path):
    trainer = setting[0](ExponentialMovingAverage(0.5))
    trainer.training_step(1)
    expected = trainer.evaluate()["mean_reward"]
    path = trainer.save(1)
    saved = json.loads((path / "config.json").read_text())
    assert saved["do_normalize"] is True
    assert saved["score_mean"] == trainer.normalizer.mean
    assert trainer.model.do_normalize is False
    again = setting[0](model=load_value(path, "reward", require_head=True))
    assert again.evaluate()["mean_reward"] == pytest.approx(expected, rel=1e-4)
    fresh = ExponentialMovingAverage(0.5)
    fresh.load_state_dict(trainer.state_dict()["normalizer"])
    assert fresh.state_dict() == trainer.normalizer.state_dict()


@pytest.mark.parametrize(
    ("wanted", "kind", "expected"),
    [
        (False, "RunningMeanStd", type(None)),
        (True, "RunningMeanStd", RunningMeanStd),
        (True, "ExponentialMovingAverage", ExponentialMovingAverage),
    ],
)
def test_build_normalizer(wanted, kind, expected):
    args = SimpleNamespace(normalize_score_during_training=wanted, normalizer_type=kind, normalizer_momentum=0.3)
    normalizer = build_normalizer(args)
    assert type(normalizer) is expected
    assert getattr(normalizer, "momentum", 0.3) == 0.3
