"""Alerts of real runs: none where all is well; one that a person can act on, and the same one after resuming."""

from __future__ import annotations

import pytest

from tests.stages import read_rows, run, write_project

CONSTANT = "def constant(responses):\n    return [1.0] * len(responses)\n"
ORDINARY = {  # stage: what makes an ordinary run of the random tiny model, whose tokens are noise, a healthy one
    "sft": ("--learning_rate", 1e-3),
    "rm": ("--learning_rate", 1e-3),
    "update": ("--learning_rate", 1e-3),
    "ppo": ("--learning_rate", 1e-4, "--stop_strings", '["a", "e", "i", "o", "s", "t"]', "--max_new_tokens", 24),
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = write_project(tmp_path_factory.mktemp("project"))
    (folder / "constant.py").write_text(CONSTANT)
    return folder


@pytest.mark.parametrize("stage", ORDINARY)
def test_an_ordinary_run_is_quiet(project, stage):
    status, shown = run(project, stage, "--max_steps", 12, *ORDINARY[stage])
    assert status == 0, shown
    assert len([row for row in read_rows(project / stage / "metrics.jsonl") if "lr" in row]) == 12
    assert read_rows(project / stage / "alerts.jsonl") == []
    assert "alert" not in shown


def test_a_constant_reward_is_said_and_said_again_by_a_resumed_run(project):
    options = ("--reward_function", "constant.py:constant", "--eval_datasets", "null", "--evaluation_strategy", "no")
    options += ("--output_dir", "constant", "--max_steps", 6, "--save_strategy", "steps", "--save_steps", 3)
    status, shown = run(project, "ppo", *options)
    assert status == 0, shown
    alerts = read_rows(project / "constant" / "alerts.jsonl")
    (alert,) = [row for row in alerts if row["alert"] == "reward-without-spread"]
    assert alert["step"] == 5 and alert["values"] == {"rollout/reward_std": 0.0}
    assert '"num_return_sequences" (2)' in alert["message"]
    assert f"alert at step 5: reward-without-spread: {alert['message']}" in shown
    first = "constant/policy/checkpoint-3"
    status, shown = run(
        project, "ppo", *options, "--resume_from_checkpoint", first, "--overwrite_output_dir", "true"
    )
    assert status == 0, shown
    assert read_rows(project / "constant" / "alerts.jsonl") == alerts
