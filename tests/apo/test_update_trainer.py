"""Policy updates on tiny models: losses and metrics against NumPy, RJS against SFT, the reference, bad arguments."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit

from alignment.apo.run_update import build_trainer
from alignment.apo.update_arguments import GROUPS
from alignment.apo.update_reference import REFERENCE_FILE
from alignment.runtime.arguments import parse, resolve
from alignment.runtime.faults import UsageError
from alignment.sft.arguments import GROUPS as SFT_GROUPS
from alignment.sft.run_sft import build_trainer as build_sft
from data import DataError, RawDataset, RawSample
from tests.models.reference import logits
from tests.stages import ARGUMENTS, read_rows, weights_of, write_tiny_model

MEASURED = ("timing_s/", "memory_gb/", "perf/")
ANSWERS = [  # prompt, answers, scores
    ("Say cat", ["cat", "a cat", "dog"], [0.5, 1.0, 0.0]),
    ("Say owl", ["owl", "dog owl"], [1.0, 1.0]),  # a tie
    ("Say dog please", ["cat cat", "dog"], [-1.0, 3.0]),
    ("Say cow", ["dog"], [2.0]),
    ("Say please", ["please", "cat", "owl", "please please"], [2.0, 0.0, 1.0, 2.0]),
]


class Scored(RawDataset):
    NAME = "scored-answers"

    def __getitem__(self, index):
        prompt, answers, scores = ANSWERS[index]
        return RawSample(input=prompt, answers=answers, scores=scores)

    def __len__(self):
        return len(ANSWERS)


class Best(Scored):
    NAME = "best-answers"

    def __getitem__(self, index):
        prompt, answers, scores = ANSWERS[index]
        return RawSample(input=prompt, answer=answers[int(np.argmax(scores))])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("update")
    write_tiny_model(folder / "model", scale=1.0)
    return folder


def arguments(folder: Path, stage: str = "update", **changes) -> list[str]:
    """A command line that reads its arguments from a file."""
    values = ARGUMENTS[stage] | {
        "model_name_or_path": str(folder / "model"),
        "train_datasets": "scored-answers",
        "eval_datasets": "scored-answers",
        "dataset_modules": [],
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "evaluation_strategy": "no",
        "output_dir": str(folder / "out"),
        "device": "cpu",
    }
    file = folder / "arguments.json"
    file.write_text(json.dumps(values | changes))
    return [str(file)]


def build(folder, **changes):
    return build_trainer(*parse(arguments(folder, **changes), GROUPS))


def log_probs_of(folder: Path, items) -> list[np.ndarray]:
    """Per item the log-probabilities of its answers, by the NumPy forward pass; and their lengths in tokens."""
    config, weights = json.loads((folder / "model/config.json").read_text()), weights_of(folder / "model")

    def of(ids, start):
        rows = logits(weights, config, ids)[start - 1 : -1]
        chosen = rows[np.arange(len(rows)), ids[start:]]
        return float((chosen - np.log(np.exp(rows - rows.max(1, keepdims=True)).sum(1)) - rows.max(1)).sum())

    return [np.array([of(ids, item["prompt_length"]) for ids in item["input_ids"]]) for item in items]


def pairs_of(item):
    scores = item["scores"]
    return [(i, j) for i in range(len(scores)) for j in range(len(scores)) if scores[i] > scores[j]]


def test_rrhf(folder):
    trainer = build(folder, policy_update="rrhf", rrhf_sft_coeff=0.5)
    items = list(trainer.train_set)
    assert [len(item["scores"]) for item in items] == [3, 2, 2, 1, 4]
    ranking, best, right = 0.0, 0.0, []
    for item, log_probs in zip(items, log_probs_of(folder, items), strict=True):
        p = log_probs / [len(ids) - item["prompt_length"] for ids in item["input_ids"]]
        ranking += sum(max(0, p[j] - p[i]) for i, j in pairs_of(item))
        best -= p[item["scores"].argmax()]
        right += [p[i] > p[j] for i, j in pairs_of(item)]
    metrics = trainer.evaluate()
    assert metrics["rank_loss"] == pytest.approx(ranking / 5, rel=1e-4)
    assert metrics["sft_loss"] == pytest.approx(best / 5, rel=1e-4)
    assert metrics["loss"] == pytest.approx((ranking + 0.5 * best) / 5, rel=1e-4)
    assert metrics["accuracy"] == np.mean(right)


@pytest.mark.parametrize(("pairs", "rows", "count"), [("best_worst", [2, 2, 2], 3), ("all", [3, 2, 4], 9)])
@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_dpo(folder, pairs, rows, count, kind):
    """With a reference that is not the policy: loss, rewards and accuracy of all pairs."""
    trainer = build(folder, policy_update="dpo", dpo_pairs=pairs, dpo_loss_type=kind, dpo_beta=0.2)
    items = list(trainer.train_set)
    assert [len(item["scores"]) for item in items] == rows
    reference = [np.random.default_rng(n).normal(-20, 3, n).astype(np.float32) for n in rows]
    trainer.eval_set.reference = np.concatenate(reference)
    log_probs = log_probs_of(folder, items)
    ratios = [own - other for own, other in zip(log_probs, reference, strict=True)]
    compared = [(r[i], r[j]) for r, item in zip(ratios, items, strict=True) for i, j in pairs_of(item)]
    assert len(compared) == count == trainer.count(items)
    chosen, rejected = np.array(compared).T
    h = chosen - rejected
    losses = (h - 2.5) ** 2 if kind == "ipo" else -np.log(expit(0.2 * h))
    metrics = trainer.evaluate()
    assert metrics["loss"] == pytest.approx(losses.mean(), rel=1e-4)
    assert metrics["accuracy"] == (h > 0).mean()
    assert metrics["rewards/chosen"] == pytest.approx(0.2 * chosen.mean(), rel=1e-4)
    assert metrics["rewards/margin"] == pytest.approx(0.2 * h.mean(), rel=1e-4)
    assert metrics["log_ratio"] == pytest.approx((chosen.mean() + rejected.mean()) / 2, rel=1e-4)


def test_dpo_starts_at_log_2_and_learns_its_pairs(folder):
    trainer = build(folder, policy_update="dpo", dpo_pairs="all", max_steps=20, lr_scheduler_type="constant")
    trainer.train()
    rows = read_rows(folder / "out/metrics.jsonl")
    assert rows[0]["eval/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert (rows[0]["eval/accuracy"], rows[0]["eval/log_ratio"]) == (0.5, pytest.approx(0, abs=1e-4))
    assert rows[-1]["eval/accuracy"] > 0.8 and rows[-1]["eval/rewards/margin"] > 0.05
    for item, expected in zip(trainer.train_set, log_probs_of(folder, trainer.train_set), strict=True):
        np.testing.assert_allclose(item["reference"], expected, rtol=1e-4)


@pytest.mark.parametrize("update", ["rrhf", "dpo"])
def test_accumulation_changes_nothing(folder, update):
    def step(size):
        trainer = build(
            folder,
            policy_update=update,
            **({"dpo_pairs": "all"} if update == "dpo" else {}),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=5 // size,
        )
        if update == "dpo":
            trainer.train_set.reference = np.linspace(-20, -10, len(trainer.train_set.reference), dtype=np.float32)
        trainer.training_step(1)  # the schedule's first step learns nothing
        metrics = trainer.training_step(2)
        weights = [p.numpy() for p in trainer.model.parameters()]
        return {name: value for name, value in metrics.items() if not name.startswith(MEASURED)}, weights

    (one, weights), (other, same) = step(5), step(1)
    assert other == pytest.approx(one, rel=1e-4, abs=1e-6)
    for expected, found in zip(weights, same, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_rjs_is_sft_on_the_best_answers(folder):
    """To the last bit: metrics of every step, and the weights."""
    best = {"train_datasets": "best-answers", "eval_datasets": "best-answers"}
    sft = build_sft(*parse(arguments(folder, "sft", **best), SFT_GROUPS))
    rjs = build(folder, policy_update="rjs")
    steps = [trainer.training_step(step) for trainer in (sft, rjs) for step in (1, 2, 3)]
    ours = [{name: value for name, value in row.items() if not name.startswith(MEASURED)} for row in steps]
    assert ours[:3] == ours[3:] and sft.evaluate() == rjs.evaluate()
    for expected, found in zip(sft.model.parameters(), rjs.model.parameters(), strict=True):
        np.testing.assert_array_equal(found.numpy(), expected.numpy())


def test_what_a_checkpoint_holds_of_other_answers_is_refused(folder):
    trainer = build(folder, policy_update="dpo", output_dir=str(folder / "saved"), max_steps=1)
    trainer.train()
    again = {"policy_update": "dpo", "output_dir": str(folder / "saved")}
    again["resume_from_checkpoint"] = str(folder / "saved/checkpoint-1")
    with pytest.raises(UsageError, match='"train_datasets": not the samples of the run that .*checkpoint-1 is of'):
        build(folder, **again, dpo_pairs="all")
    with pytest.raises(UsageError, match='"eval_datasets": not the samples of the run that .*checkpoint-1 is of'):
        build(folder, **again, eval_datasets="scored-answers:2/-1")
    (folder / "saved/checkpoint-1" / REFERENCE_FILE).write_bytes(b"PK")
    with pytest.raises(UsageError, match=f"checkpoint-1: cannot resume from it: {REFERENCE_FILE}"):
        build(folder, **again).train()


def test_data_that_compare_nothing_are_refused(folder):
    with pytest.raises(DataError, match="no sample is left"):
        build(folder, policy_update="dpo", train_datasets="alike-answers")


class Alike(Scored):
    NAME = "alike-answers"

    def __getitem__(self, index):
        return RawSample(input="Say cat", answers=["cat", "dog"], scores=[1.0, 1.0])


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        ({"policy_update": "dpo", "rrhf_sft_coeff": 0.5}, '"rrhf_sft_coeff": 0.5 is for "policy_update": "rrhf"'),
        ({"policy_update": "rjs", "dpo_beta": 0.5}, '"dpo_beta": 0.5 is for "policy_update": "dpo"'),
        ({"policy_update": "rrhf", "dpo_pairs": "all"}, '"dpo_pairs": "all" is for "policy_update": "dpo"'),
        ({"dpo_loss_type": "ipo", "label_smoothing": 0.1}, '"label_smoothing": give it or "dpo_loss_type": "ipo"'),
    ],
)
def test_refused_in_one_line(folder, changes, start):
    with pytest.raises(UsageError) as caught:
        resolve(arguments(folder, **changes), GROUPS)
    assert str(caught.value).startswith(start) and "\n" not in str(caught.value)
