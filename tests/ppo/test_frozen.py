"""A resumed run has the frozen models that it began with, whatever their names mean by now."""

from __future__ import annotations

import json
import shutil

import pytest

from alignment.ppo.frozen import check_unchanged, fingerprints
from alignment.runtime.faults import UsageError
from tests.stages import run, write_project, write_reward_model, write_tiny_model

ACTOR, REWARD = "actor_model_name_or_path", "reward_model_name_or_path"


def test_other_weights_are_refused_and_older_checkpoints_go_on(tmp_path):
    policy = write_tiny_model(tmp_path / "policy")
    reward = write_reward_model(tmp_path / "reward")
    before = fingerprints({ACTOR: str(policy), REWARD: str(reward), "judge_model_name_or_path": None})
    assert before.keys() == {ACTOR, REWARD}
    state = tmp_path / "trainer_state.json"
    state.write_text(json.dumps({"frozen_models": before}))
    moved = shutil.copytree(policy, tmp_path / "moved")
    check_unchanged(fingerprints({ACTOR: str(moved), REWARD: str(reward)}), tmp_path)
    shutil.rmtree(reward)
    now = fingerprints({ACTOR: str(policy), REWARD: str(write_reward_model(reward, scale=0.2))})
    with pytest.raises(UsageError, match=f'"{REWARD}": the weights in .*reward are not those that .* was trained'):
        check_unchanged(now, tmp_path)
    state.write_text("{}")
    check_unchanged(now, tmp_path)


@pytest.mark.parametrize("stage", ["ppo", "offline"])
def test_a_newer_checkpoint_is_no_new_anchor(tmp_path, stage):
    """The policy is named by the output directory of a run that goes on writing."""
    project = write_project(tmp_path)
    shutil.copytree(project / "model", project / "start" / "checkpoint-1")
    quick = ("--evaluation_strategy", "no", "--eval_datasets", "null", f"--{ACTOR}")
    status, shown = run(project, stage, "--max_steps", 1, *quick, "start")
    assert status == 0, shown
    shutil.copytree(project / "model", project / "start" / "checkpoint-2")
    write_tiny_model(project / "start" / "checkpoint-2", scale=0.2)
    more = ("--max_steps", 2, "--resume_from_checkpoint", "true", *quick)
    status, shown = run(project, stage, *more, "start")
    assert status == 2
    assert f'error: "{ACTOR}": the weights in start/checkpoint-2 are not those that ' in shown
    assert "which were in start/checkpoint-1" in shown
    status, shown = run(project, stage, *more, "start/checkpoint-1")
    assert status == 0, shown
