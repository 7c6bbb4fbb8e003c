"""Reward-model trainer: losses of both kinds against the tested functions, normaliser, what it saves."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from alignment.ppo.models.value import load_value
from alignment.rm.evaluation import ROLES
from alignment.rm.losses import ExponentialMovingAverage, RunningMeanStd
from alignment.rm.run_reward import build_normalizer, set_reading
from alignment.rm.trainer import RewardTrainer
from alignment.runtime.faults import UsageError
from data import ComparisonCollator
from tests.models.heads import with_random_head
from tests.models.reference import hidden_states, make_config, random_weights, write_checkpoint

PAIRS = [([5, 7, 11, 2], [5, 7, 9, 8, 2]), ([6, 3, 2], [6, 4, 2]), ([8, 9, 10, 11, 2], [8, 2]), ([7, 2], [7, 3, 2])]


class Comparisons(list):
    """What the trainer needs of a data.ComparisonDataset."""

    report = SimpleNamespace(sources=["people", "game"])
    fingerprint = "of these"

    def get_collator(self):
        return ComparisonCollator(47)


def compare(rows, scores, is_apo=False, source=0):
    arrays = {"input_ids": [np.array(row) for row in rows], "scores": np.array(scores, np.float32)}
    return arrays | {"prompt_length": 1, "is_apo": is_apo, "source": source}


ITEMS = Comparisons(compare([w, b], [0, 1]) if i % 2 else compare([b, w], [1, 0]) for i, (b, w) in enumerate(PAIRS))
SETTINGS = {
    "nonfinite": "stop",
    "nonfinite_limit": 1,
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
    "save_steps": 1,
    "save_total_limit": None,
    "use_async_save": False,
    "save_error": "stop",
    "metric_for_best_model": None,
    "greater_is_better": None,
    "early_stopping_patience": None,
    "load_best_model_at_end": False,
    "loss_type": "sequence-wise",
    "regularization": 0.0,
    "rm_kl_coeff": 1.0,
    "apo_loss_coeff": 0.0,
    "apo_sample_num": 1,
    "apo_loss_type": "ranking",
    "calibrate_scores": False,
    "sampling_weights": None,
    "evaluation_strategy": "no",
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
}


@pytest.fixture
def setting(tmp_path):
    config = make_config("llama", True)
    weights = random_weights(config)
    model = with_random_head(load_value(write_checkpoint(tmp_path / "model", config, weights), "reward"), 3)

    def build(normalizer=None, model=model, items=ITEMS, **changes):
        args = SimpleNamespace(**SETTINGS | changes, output_dir=str(tmp_path / "out"))
        return RewardTrainer(args, model, None, items, items, normalizer=normalizer)

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
    trainer.save(1)
    path = trainer.output_dir / "checkpoint-1"
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


MIXED = Comparisons(
    [
        *ITEMS[:2],
        compare([[5, 7, 2], [5, 8, 9, 2], [5, 2], [5, 6, 2]], [2, 0, 1, 1]),
        compare([[6, 3, 3, 2], [6, 4, 2]], [1, 0], is_apo=True, source=1),
        compare([[8, 5, 2], [8, 4, 2], [8, 3, 10, 2]], [1, 0, 0], is_apo=True, source=1),
    ]
)
APO = {"apo_loss_coeff": 0.6, "apo_sample_num": 3, "rm_kl_coeff": 0.8}


@pytest.mark.parametrize("kind", ["ranking", "diff"])
def test_apo_mixture(setting, kind):
    build, score = setting
    trainer = build(items=MIXED, **APO, apo_loss_type=kind)
    metrics = trainer.evaluate()
    margins = {False: [], True: []}
    for item in MIXED:
        ends = [score(ids)[-1] for ids in item["input_ids"]]
        for z, s in zip(ends, item["scores"], strict=True):
            margins[item["is_apo"]] += [z - y for y, t in zip(ends, item["scores"], strict=True) if s > t]
    assert [len(margins[key]) for key in (False, True)] == [2 + 5, 1 + 2]
    human = np.mean([softplus(-m) for m in margins[False]])
    apo = np.mean([-m if kind == "diff" else softplus(-m) for m in margins[True]])
    assert metrics["human/loss"] == pytest.approx(human, rel=1e-4)
    assert metrics["apo/loss"] == pytest.approx(apo, rel=1e-4)
    assert metrics["loss"] == pytest.approx((7 * 0.8 * human + 3 * 0.6 / 3 * apo) / 10, rel=1e-4)
    assert metrics["game/accuracy"] == metrics["apo/accuracy"] == np.mean(np.array(margins[True]) > 0)
    goldens = [score(MIXED[n]["input_ids"][0])[-1] for n in (3, 4)]
    assert metrics["golden/mean_reward"] == pytest.approx(np.mean(goldens), rel=1e-4)
    assert all(np.isfinite(value) for value in metrics.values())


def test_without_a_weight_apos_pairs_are_as_all_others(setting):
    metrics = setting[0](items=MIXED).evaluate()
    assert metrics["loss"] == pytest.approx((7 * metrics["human/loss"] + 3 * metrics["apo/loss"]) / 10, rel=1e-5)


def test_calibrated_scores_are_what_the_saved_model_gives(setting, tmp_path):
    build, _ = setting
    trainer = build(ExponentialMovingAverage(0.5), items=MIXED, **APO, calibrate_scores=True, max_steps=1)
    metrics = trainer.train()
    temperature = metrics["eval/calibration/temperature"]
    assert metrics["eval/calibration/nll_after"] <= metrics["eval/calibration/nll_before"]
    again = build(model=load_value(tmp_path / "out/checkpoint-1", require_head=True), items=MIXED)
    trained = trainer.held_out["score"]
    again.evaluate()
    np.testing.assert_allclose(again.held_out["score"], trained / temperature, rtol=1e-4, atol=1e-5)
    numbers = json.loads((tmp_path / "out/calibration.json").read_text())
    assert numbers["temperature"] == temperature and set(numbers["scores"]) == set(ROLES)
    assert {len(numbers["reliability"][name]["count"]) for name in numbers["reliability"]} == {10}
    for name in ("reliability.png", "scores.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_sampling_weights(setting):
    trainer = setting[0](items=MIXED, sampling_weights={"people": 1, "game": 4}, max_steps=2)
    assert sorted(trainer.schedule.order(0)[:].tolist())[-4:] == [3, 3, 4, 4]
    for weights, problem in (
        ({"people": 1}, "the data sets are people, game"),
        ({"people": 1, "game": -1}, "game: -1 is not a number >= 0"),
        ({"people": 0, "game": 0}, "at least one"),
    ):
        with pytest.raises(UsageError, match=problem):
            setting[0](items=MIXED, sampling_weights=weights)
    with pytest.raises(UsageError, match="no sample of it is left"):
        setting[0](sampling_weights={"people": 1, "game": 1})


def test_a_reward_model_goes_on_reading_as_it_learnt_to(setting, tmp_path):
    trainer = setting[0]()
    set_reading(trainer.model, "last", 9, eos_token_id=2)
    trainer.save(0)
    trained = load_value(trainer.output_dir / "checkpoint-0", require_head=True)
    assert (trained.pooling_type, trained.sep_token_id, trained.config.eos_token_id) == ("last", 9, 2)
    set_reading(trained, "last", 9, 2)
    with pytest.raises(UsageError, match='trained with "last" and sep_token_id 9'):
        set_reading(trained, "eos", None, 2)
