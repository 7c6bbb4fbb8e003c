"""ILQL learns the same in every layout: metrics, checkpoints with their heads, answers of the shifted policy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from alignment.ppo.offline.ilql_model import HEADS_FILE
from tests.parallel.comparison import (
    METRICS_CLOSE,
    WEIGHTS_CLOSE,
    assert_same_metrics,
    assert_same_weights,
    metrics_of,
)
from tests.parallel.trajectories import MODELS
from tests.stages import CHECKOUT, write_tiny_model

SCRIPT = CHECKOUT / "tests/parallel/ilql_trajectory.py"
LAYOUTS = {  # processes, rows of a micro-batch, layout
    "accumulate": (1, 2, {}),
    "dp2": (2, 3, {"data": 2}),
    "sharding2_stage1": (2, 2, {"sharding": 2, "sharding_stage": 1}),
    "sharding2_stage2": (2, 3, {"sharding": 2, "sharding_stage": 2}),
    "sharding2_stage3": (2, 3, {"sharding": 2, "sharding_stage": 3}),
    "tp2": (2, 4, {"tensor": 2}),
    "tp2_sp": (2, 8, {"tensor": 2, "sequence_parallel": True}),
    "pp2": (2, 2, {"pipeline": 2}),
    "tp2_pp2": (4, 3, {"tensor": 2, "pipeline": 2}),
    "dp2_tp2": (4, 2, {"data": 2, "tensor": 2}),
}
pytestmark = pytest.mark.layouts


def run(model: Path, out: Path, processes: int, rows: int, layout: dict, *checkpoint: Path) -> Path:
    launcher = ["-m", "paddle.distributed.launch", "--nproc_per_node", processes, "--log_dir", f"{out}.log"]
    command = [sys.executable, "-u", *launcher, SCRIPT, model, out, json.dumps(layout), rows, *checkpoint]
    out.mkdir(parents=True)
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0, f"{result.stdout[-3000:]}{result.stderr[-3000:]}"
    return out


@pytest.fixture(scope="module", params=["llama_tied", "qwen2_untied"])
def single(request, tmp_path_factory):
    """(model, output directory of one process); the Q heads of the first divide over two processes."""
    folder = tmp_path_factory.mktemp(request.param)
    model = write_tiny_model(folder / "model", num_hidden_layers=3, **MODELS[request.param])
    return model, run(model, folder / "single", 1, 8, {})


def assert_same(expected: Path, found: Path, steps: tuple[int, ...] = (2, 4)) -> None:
    assert_same_metrics(metrics_of(expected, steps[0] - 2), metrics_of(found, steps[0] - 2))
    for step in steps:
        one, other = expected / f"checkpoint-{step}", found / f"checkpoint-{step}"
        assert_same_weights(one, other)
        heads, others = load_file(one / HEADS_FILE), load_file(other / HEADS_FILE)
        assert heads.keys() == others.keys()
        for name, value in heads.items():
            np.testing.assert_allclose(others[name], value, **WEIGHTS_CLOSE, err_msg=name)
    answers, others = np.load(expected / "answers.npz"), np.load(found / "answers.npz")
    for name in answers.files:
        np.testing.assert_allclose(others[name], answers[name], **METRICS_CLOSE, err_msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_trajectory(single, tmp_path, layout):
    model, expected = single
    assert_same(expected, run(model, tmp_path / layout, *LAYOUTS[layout]))


@pytest.mark.parametrize(("saved", "resumed"), [("tp2_pp2", "dp2"), ("dp2", "tp2")])
def test_resume_in_another_layout(single, tmp_path, saved, resumed):
    model, expected = single
    start = run(model, tmp_path / saved, *LAYOUTS[saved]) / "checkpoint-2"
    assert_same(expected, run(model, tmp_path / resumed, *LAYOUTS[resumed], start), steps=(4,))


def test_heads_have_learnt(single):
    """What the other tests compare is not all zeros, and the targets lag behind."""
    first, last = (load_file(single[1] / f"checkpoint-{step}" / HEADS_FILE) for step in (2, 4))
    for name in ("v.outer.weight", "q.0.outer.weight", "target_q.1.outer.weight"):
        assert 0 < np.abs(first[name]).max() != np.abs(last[name]).max()
    assert np.abs(last["target_q.0.outer.weight"] - last["q.0.outer.weight"]).max() > 1e-4
