"""Offloading changes no bit: every combination of levels, resuming, and layouts, against the same run without.

One launch runs all its combinations (tests/parallel/trajectories.py) with a reward model, ptx, evaluation, frozen
layers and a checkpoint after each of two iterations.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.parallel.comparison import Launch, metrics_of
from tests.parallel.trajectories import LEVELS, ONLINE, SETS, write_models
from tests.stages import read_rows, weights_of

TP2, PP2 = "--tensor_parallel_degree 2", "--pipeline_parallel_degree 2"
SINGLE = Launch("single")
LAYOUTS = [
    Launch("dp2", 2, 2),
    Launch("tp2_pp2", 4, 1, 4, f"{TP2} {PP2}"),
    Launch("pp2_single", 2, 1, 2, f"{PP2} --eval_mode single"),
    Launch("tp2_sp", 2, 1, 1, f"{TP2} --sequence_parallel true"),
    Launch("sharding2_stage1", 2, 2, 1, "--sharding stage1"),
    Launch("sharding2_stage3", 2, 2, 2, "--sharding stage3"),
]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def single(project):
    return SINGLE.run(project, project / "single", "offload")


def assert_same_bits(expected, found, after=-1):
    """Metrics, sampled tokens with all that was measured on them, answers, and both models of every checkpoint."""
    assert metrics_of(found, after) == metrics_of(expected, after)
    checkpoints = [path.parent.relative_to(expected) for path in expected.rglob("trainer_state.json")]
    assert len(checkpoints) == 2 * ONLINE["max_steps"]
    for checkpoint in checkpoints:
        if int(checkpoint.name.removeprefix("checkpoint-")) > after:
            one, other = weights_of(expected / checkpoint), weights_of(found / checkpoint)
            assert one.keys() == other.keys()
            for name, value in one.items():
                np.testing.assert_array_equal(other[name], value, err_msg=f"{checkpoint} {name}")
    if after < 0:
        one, other = (np.load(folder / "rollouts.npz") for folder in (expected, found))
        for name in one.files:
            np.testing.assert_array_equal(other[name], one[name], err_msg=name)
        assert read_rows(found / "samples.jsonl") == read_rows(expected / "samples.jsonl")


@pytest.mark.parametrize("number", range(1, len(LEVELS)), ids=[words.replace(" ", "+") for words in LEVELS[1:]])
def test_every_combination(single, number):
    plain, *offloaded = SETS["offload"]
    assert_same_bits(single / plain, single / offloaded[number - 1])


def test_the_time_it_takes_is_recorded(single):
    plain, *offloaded = (read_rows(single / scenario / "metrics.jsonl") for scenario in SETS["offload"])
    assert all("timing_s/offload" not in row for row in plain)
    for rows in offloaded:
        seconds = [row["timing_s/offload"] for row in rows if "timing_s/rollout" in row]
        assert len(seconds) == ONLINE["max_steps"] and min(seconds) > 0


def test_with_a_shared_base(project):
    """What LoRA's models share stays, the rest comes and goes."""
    out = SINGLE.run(project, project / "lora", "offload_lora")
    plain, offloaded = SETS["offload_lora"]
    assert_same_bits(out / plain, out / offloaded)


def test_resume(project, single):
    SINGLE.run(project, project / "resumed", "offload_all", "--resume", single)
    for scenario in SETS["offload_all"]:
        assert_same_bits(single / SETS["offload"][0], project / "resumed" / scenario, after=ONLINE["save_steps"])


@pytest.mark.layouts
@pytest.mark.parametrize("launch", LAYOUTS, ids=lambda launch: launch.name)
def test_layouts(project, launch):
    out = launch.run(project, project / launch.name, "offload_all")
    plain, offloaded = SETS["offload_all"]
    assert_same_bits(out / plain, out / offloaded)
