"""The same global batch gives the same losses and weights with any accumulation and any number of processes.

The data set and the reward function live in files outside the checkout, and the commands are the documented ones.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.stages import read_rows, run, weights_of, write_project

pytestmark = pytest.mark.layouts
# Rounding differs with the order of sums; Adam's first steps turn it into a relative change of an update.
CLOSE = {"rtol": 1e-4, "atol": 1e-6}
LAYOUT_METRICS = ("timing_s/", "perf/")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return write_project(tmp_path_factory.mktemp("project"))


def train(project, stage, name, processes, *overrides):
    status, shown = run(project, stage, "--output_dir", name, *overrides, processes=processes)
    assert status == 0, shown
    rows = [
        {key: value for key, value in row.items() if not key.startswith(LAYOUT_METRICS)}
        for row in read_rows(project / name / "metrics.jsonl")
    ]
    parts = ("policy", "value") if stage == "ppo" else ("",)
    return rows, {part: weights_of(project / name / part / "checkpoint-3") for part in parts}


def assert_same(one, other):
    for row, row_of_other in zip(one[0], other[0], strict=True):
        assert row.keys() == row_of_other.keys()
        for name, value in row.items():
            np.testing.assert_allclose(row_of_other[name], value, **CLOSE, err_msg=f"step {row['step']}: {name}")
    for part, weights in one[1].items():
        for name, value in weights.items():
            np.testing.assert_allclose(other[1][part][name], value, **CLOSE, err_msg=f"{part} {name}")


def batches(processes, accumulation):
    return (
        "--gradient_accumulation_steps",
        accumulation,
        "--per_device_train_batch_size",
        8 // processes // accumulation,
    )


@pytest.fixture(scope="module")
def reward_model(project):
    return train(project, "rm", "rm", 1, *batches(1, 1))


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 2), (1, 4), (2, 1), (2, 2)])
def test_reward_model(project, reward_model, processes, accumulation):
    other = train(project, "rm", f"rm_{processes}_{accumulation}", processes, *batches(processes, accumulation))
    assert_same(reward_model, other)


def test_the_reward_model_learnt(project, reward_model):
    before = weights_of(project / "model")
    after = reward_model[1][""]
    assert all(not np.array_equal(before[name], after[name]) for name in before)
    assert sum("loss" in row for row in reward_model[0]) == 3


def prompts(processes):
    return ("--per_device_prompt_batch_size", 4 // processes)


@pytest.fixture(scope="module")
def policy(project):
    return train(project, "ppo", "ppo", 1, *batches(1, 1), *prompts(1))


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 2), (1, 4), (2, 1), (2, 2)])
def test_ppo(project, policy, processes, accumulation):
    name = f"ppo_{processes}_{accumulation}"
    assert_same(policy, train(project, "ppo", name, processes, *batches(processes, accumulation), *prompts(processes)))


def test_the_policy_learnt(project, policy):
    before = weights_of(project / "model")
    after = policy[1]["policy"]
    assert all(not np.array_equal(before[name], after[name]) for name in before)
    losses = [row["loss/policy_avg"] for row in policy[0] if "loss/policy_avg" in row]
    assert len(set(losses)) == 3


def test_answers_are_the_same_in_every_layout(project, policy):
    train(project, "ppo", "ppo_two", 2, *batches(2, 1), *prompts(2))
    rows = [read_rows(project / name / "samples.jsonl") for name in ("ppo", "ppo_two")]
    assert [row["answer"] for row in rows[0]] == [row["answer"] for row in rows[1]]
