"""A run that is interrupted and resumed ends where an uninterrupted one ends, to the last bit."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tests.stages import read_rows, run, weights_of, write_project, write_reward_model

UNLIKE = ("timing_s/", "memory_gb/", "perf/")
PTX = ("--ptx_datasets", "animals:9/-1")
ILQL = ("--policy_loss", "ilql", "--steps_for_target_q_sync", 2, "--ilql_decoding_beta", "[1, 3]")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = write_project(tmp_path_factory.mktemp("project"))
    write_reward_model(folder / "judge")
    return folder


def train(project, stage, *overrides):
    status, shown = run(project, stage, *overrides)
    assert status == 0, shown


def rows_of(folder):
    rows = read_rows(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith(UNLIKE)} for row in rows]


def assert_timed(rows, phase):
    """Each row says how long its step or evaluation took and the memory of it; the next one, what saving took."""
    steps = {row["step"]: row for row in rows if "epoch" in row}
    evaluations = [row for row in rows if any(name.startswith("eval/") for name in row)]
    timed = [(row, phase) for row in steps.values()] + [(row, "evaluation") for row in evaluations]
    timed.append((steps[3], "saving"))
    for row, name in timed:
        assert row[f"timing_s/{name}"] > 0 and row[f"memory_gb/{name}"] > 0
    assert evaluations and len(timed) - 1 == len(rows)
    assert [row["step"] for row in rows if "timing_s/saving" in row] == [3]


def check_other_data_are_refused(project, stage, folder, *overrides):
    others = {"train_datasets": ("--data_seed", 4)} | ({"ptx_datasets": PTX} if stage == "ppo" else {})
    for key, change in others.items():
        before = bytes_of(folder)
        again = ("--output_dir", folder.name, *overrides, "--resume_from_checkpoint", "auto")
        status, shown = run(project, stage, *again, *change)
        assert status == 2, shown
        assert re.search(f'error: "{key}": not the samples of the run that .*checkpoint-2 is of', shown), shown
        assert bytes_of(folder) == before


def bytes_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize(
    ("stage", "parts"),
    [
        ("sft", [""]),
        ("rm", [""]),
        ("update", [""]),
        ("ppo", ["policy", "value"]),
        ("offline", ["policy", "value"]),
        ("ilql", ["policy"]),
    ],
)
def test_resume(project, stage, parts, lora):
    whole, resumed = project / f"{stage}_whole_{lora}", project / f"{stage}_resumed_{lora}"
    critic_first = stage == "offline" and lora  # for two steps; then the policy begins
    steps = ("--max_steps", 2 if critic_first else 4, "--lr_scheduler_type", "constant")
    steps += ("--save_strategy", "steps", "--save_steps", 2)
    more = ("--kl_controller", "adaptive", "--kl_target", 0.01, "--kl_horizon", 50) if stage == "ppo" else ()
    more += ("--judge_model_name_or_path", "judge") if stage in ("ppo", "offline", "ilql") else ()
    more += ("--lora", "true", "--lora_rank", 4) if lora else ()
    if stage == "ilql":
        stage, more = "offline", (*more, *ILQL)
    elif stage == "offline":
        more += ("--critic_training", "first", "--critic_epochs", 0.3) if critic_first else ("--critic_refresh", 3)
    train(project, stage, "--output_dir", whole.name, *steps, *more)
    train(project, stage, "--output_dir", resumed.name, *steps, *more)
    # As a run looks that was killed after step 3: checkpoint-2 is complete, metrics go on to 3, the last line torn.
    lines = (resumed / "metrics.jsonl").read_text().splitlines(keepends=True)
    (resumed / "metrics.jsonl").write_text("".join(lines[:-1]) + lines[-1][:10])
    for part in parts:
        (resumed / part / "checkpoint-4").rename(resumed / part / ".checkpoint-4.partial")
    if not lora:
        check_other_data_are_refused(project, stage, resumed, *steps, *more)
    train(project, stage, "--output_dir", resumed.name, *steps, *more, "--resume_from_checkpoint", "auto")
    assert rows_of(resumed) == rows_of(whole)
    assert_timed(read_rows(whole / "metrics.jsonl"), "update" if stage in ("ppo", "offline") else "training")
    for part in parts:
        one, other = (weights_of(folder / part / "checkpoint-4") for folder in (whole, resumed))
        assert any("lora_A" in name for name in one) == lora
        for name, value in one.items():
            np.testing.assert_array_equal(other[name], value, err_msg=name)
    if stage in ("ppo", "offline"):
        assert read_rows(resumed / "samples.jsonl") == read_rows(whole / "samples.jsonl")
        judged = [row for row in rows_of(whole) if "eval/win_rate" in row]
        first, last = judged[0], judged[-1]
        assert first["eval/win_rate"] == 0.5
        assert critic_first or first["eval/judge_reward_mean"] != last["eval/judge_reward_mean"]
