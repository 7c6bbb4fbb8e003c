"""SFT -> reward model -> APA -> export -> report, by the one command, on a tiny model and a user's data."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from alignment.pipeline import UserFileStep
from alignment.ppo.models.loading import load_policy
from tests.stages import ARGUMENTS, CHECKOUT, read_rows, weights_of, write_project

STEPS = ["sft", "rm", "apa", "exported", "report"]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = write_project(tmp_path_factory.mktemp("project"))
    (folder / "config").mkdir()
    for stage, name in (("sft", "sft"), ("rm", "rm"), ("ppo", "apa")):
        arguments = ARGUMENTS[stage] | {"policy_loss": "apa"} if stage == "ppo" else ARGUMENTS[stage]
        (folder / "config" / f"{name}_argument.json").write_text(json.dumps(arguments))
    return folder


def run_pipeline(project, *options):
    command = [sys.executable, "-m", "alignment.pipeline", "--model", str(project / "config"), "--objective", "apa"]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    result = subprocess.run(
        [*command, "--output_dir", "out", *options], cwd=project, env=environment, capture_output=True, text=True
    )
    return result.returncode, result.stdout + result.stderr


def test_pipeline(project):
    status, shown = run_pipeline(project)
    assert status == 0, shown
    out = project / "out"
    assert json.loads((out / "pipeline.json").read_text())["finished"] == STEPS
    load_policy(out / "exported")
    for name, value in weights_of(out / "exported").items():
        assert (value == weights_of(out / "apa" / "policy" / "checkpoint-3")[name]).all()
    samples = read_rows(out / "apa" / "samples.jsonl")
    assert [row["step"] for row in samples] == [0] * 6 + [2] * 6 + [3] * 6
    report = (out / "report.html").read_text()
    for words in ("Supervised fine-tuning", "Reward model", "Online RL", "held-out prompts the reward changed by"):
        assert words in report
    run = json.loads((out / "apa" / "run.json").read_text())
    assert run["arguments"]["reward_model_name_or_path"] == "out/rm"

    status, shown = run_pipeline(project)
    assert status == 0
    assert [line for line in shown.splitlines() if line.startswith("already done")] == [
        f"already done: {step}" for step in STEPS
    ]

    file = project / "config" / "apa_argument.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_steps": 2}))
    status, shown = run_pipeline(project)
    assert status == 0 and "already done: rm" in shown and "already done: apa" not in shown
    assert max(row["step"] for row in read_rows(out / "apa" / "samples.jsonl")) == 2

    (project / "config" / "rm_argument.json").write_text(json.dumps(ARGUMENTS["rm"] | {"max_steps": 0.5}))
    status, shown = run_pipeline(project, "--seed", "2")  # a bad argument in the second stage
    assert status == 2
    assert '"max_steps": 0.5' in shown
    assert json.loads((out / "pipeline.json").read_text())["finished"] == ["sft"]


def test_a_secret_in_an_argument_file_is_not_recorded(tmp_path):
    file = tmp_path / "ppo_argument.json"
    file.write_text(json.dumps({"max_steps": 2, "reward_server_token": "hunter2"}))
    step = UserFileStep("ppo", "run_ppo.py", argument_file=file)
    assert step.describe() == {"command": "run_ppo.py", "max_steps": 2}
