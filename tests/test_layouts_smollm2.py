"""The embedded real model, 135 million parameters with 9 heads and 30 layers, in layouts that divide it."""

from __future__ import annotations

import json

import pytest

from tests.parallel.comparison import assert_same_trajectory
from tests.stages import CHECKOUT, run

pytestmark = pytest.mark.layouts_full
ARGUMENTS = {
    "actor_model_name_or_path": "smollm2-135m-instruct",
    "reward_function": str(CHECKOUT / "config/smollm2/brevity.py") + ":brevity",
    "train_datasets": "hh-excerpt/train",
    "eval_datasets": "hh-excerpt/test",
    "max_length": 96,
    "max_prompt_len": 64,
    "max_new_tokens": 12,
    "per_device_prompt_batch_size": 8,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "per_device_eval_batch_size": 8,
    "num_eval_prompts": 8,
    "evaluation_strategy": "epoch",
    "max_steps": 2,
    "num_layers_unfrozen": -1,
    "learning_rate": 1e-4,
    "adam_epsilon": 1e-4,  # see tests/parallel/trajectories.py
    "lr_scheduler_type": "constant",
    "disable_tqdm": True,
}
LAYOUTS = {
    "tp3": (3, "--tensor_parallel_degree"),
    "pp2": (2, "--pipeline_parallel_degree"),
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    (folder / "ppo.json").write_text(json.dumps(ARGUMENTS))
    status, shown = run(folder, "ppo", "--output_dir", "one")
    assert status == 0, shown
    return folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_ppo(project, name):
    processes, degree = LAYOUTS[name]
    status, shown = run(project, "ppo", "--output_dir", name, degree, processes, processes=processes)
    assert status == 0, shown
    assert_same_trajectory(project / "one", project / name)
