"""What a PPO iteration's comparison refuses, and what it asks both trainers for."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from alignment.ppo.arguments import GROUPS
from alignment.runtime.arguments import resolve
from alignment.runtime.faults import RunError
from benchmarks.ppo_iteration import check_equal, own_arguments, summarize, trl_settings

WORK = {"trained_parameters": [10, 11], "new_tokens": 512, "optimizer_steps": 2}
OPTIONS = SimpleNamespace(
    model="model", batch=16, minibatches=4, new_tokens=32, pairs=5, engine="eager", pad_token="<pad>"
)


@pytest.mark.parametrize(
    ("name", "value"), [("trained_parameters", [10, 3]), ("new_tokens", 480), ("optimizer_steps", 1)]
)
def test_other_work_is_refused(name, value):
    check_equal(WORK, dict(WORK))
    with pytest.raises(RunError, match=f"not the same work: {name} is .* of ours, "):
        check_equal(WORK, WORK | {name: value})


def test_phases_are_medians():
    runs = [{"seconds": s, "phases": {"rollout": r}} for s, r in ((9.0, 1.0), (5.0, 4.0), (7.0, 2.0))]
    summary = summarize(runs)
    assert (summary["seconds"], summary["phases"]) == (7.0, {"rollout": 2.0})


def test_both_are_asked_for_the_same(tmp_path):
    """Ours through the stage's own arguments, so that a renamed or forbidden one shows here."""
    file = tmp_path / "arguments.json"
    file.write_text(json.dumps(own_arguments(OPTIONS, tmp_path)))
    ours, trl = resolve([str(file)], GROUPS), trl_settings(OPTIONS, tmp_path, "directory")
    assert ours["per_device_train_batch_size"] * ours["gradient_accumulation_steps"] == trl["batch"] // 4
    assert ours["min_new_tokens"] == ours["max_new_tokens"] == trl["new_tokens"]
    assert ours["per_device_prompt_batch_size"] * ours["num_return_sequences"] == trl["batch"]
    assert ours["update_iters"] == trl["epochs"]
    assert (ours["num_layers_unfrozen"], ours["critic_num_layers_unfrozen"]) == (None, None)  # all are trained
    assert ours["recompute"] is False
    assert not ours["bf16"]
    for name in ("kl_coeff", "learning_rate", "seed"):
        assert ours[name] == trl[name]
