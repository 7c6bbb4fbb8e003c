"""Several runs on one page: what is one group, what tells the others apart, means and bands, where it is written."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from matplotlib.figure import Figure

from alignment.report.__main__ import main
from alignment.report.bands import common_series, draw_band, draw_frontier, leading, mean_and_error
from alignment.report.groups import differences, group_runs, shorten
from alignment.report.overview import compare_groups, duration, overview
from alignment.report.reading import read_stages
from alignment.runtime.faults import UsageError
from tests.report_runs import Page, write_lines


def write_run(directory, rewards, seed=1, stage="ppo", **arguments):
    """A run that evaluated at steps 0, 2, ...: its rewards, and twice as much KL."""
    metrics = [
        {"step": 2 * place, "eval/reward_mean": reward, "eval/reward_sem": 0.5, "eval/kl_mean": 2 * reward}
        for place, reward in enumerate(rewards)
    ]
    measured = {"timing_s/rollout": 3.0, "timing_s/update": 1.0, "perf/iteration_s": 5.0, "memory_gb/update": 2.0}
    metrics += [{"step": step} | measured for step in range(1, 2 * len(rewards) - 1)]
    write_lines(directory / "metrics.jsonl", metrics)
    answers = [
        {"step": 2 * place, "prompt_id": i, "prompt": f"Q{i}", "reward": reward + i}
        | {"answer": f"{directory.name}: <b>{i}"}
        for place, reward in enumerate(rewards)
        for i in range(3)
    ]
    write_lines(directory / "samples.jsonl", answers)
    shared = {"policy_loss": "ppo", "kl_coeff": 0.1, "seed": seed, "data_seed": seed, "max_steps": 4}
    run = {
        "stage": stage,
        "command": ["run_ppo.py", "a b"],
        "arguments": {**shared, "output_dir": str(directory), "logging_dir": str(directory / "runs"), **arguments},
        "versions": {"numpy": "1"},
        "topology": {"layout": {"data": 2, "tensor": 1, "sharding_stage": 2}, "device": "gpu:0"},
    }
    (directory / "run.json").write_text(json.dumps(run))


def write_seeds(folder):
    """PPO with two seeds, APA with two values, and one of a third seed that is still on its way."""
    write_run(folder / "ppo1", [0.0, 1.0, 2.0], seed=1)
    write_run(folder / "ppo2", [0.0, 2.0, 4.0], seed=2)
    write_run(folder / "ppo3", [0.0], seed=3)
    write_run(folder / "apa1", [0.0, 1.0, 1.0], policy_loss="apa", apa_lambda=0.1)
    write_run(folder / "apa2", [0.0, 0.5, 0.5], policy_loss="apa", apa_lambda=1.0)


def names_of(groups):
    return {label: [stage.name for stage in stages] for label, stages in groups.items()}


def test_runs_that_differ_in_the_seed_are_one_group_and_labels_say_what_else_differs(tmp_path):
    write_seeds(tmp_path)
    (tmp_path / "bare").mkdir()
    write_lines(tmp_path / "bare" / "metrics.jsonl", [{"step": 0, "eval/reward_mean": 1.0}])
    stages = read_stages(tmp_path)
    groups = group_runs(stages, stages)
    assert names_of(groups) == {
        "apa, apa_lambda 0.1": ["apa1"],
        "apa, apa_lambda 1.0": ["apa2"],
        "bare": ["bare"],
        "ppo": ["ppo1", "ppo2", "ppo3"],
    }
    named = differences([stage for stage in stages if stage.run])
    assert named["seed"] == ["1", "1", "1", "2", "3"] and named["apa_lambda"] == ["0.1", "1.0", "", "", ""]
    assert set(named) == {"policy_loss", "apa_lambda", "seed", "data_seed"}


def test_pipelines_of_two_seeds_match_though_their_models_stand_elsewhere(tmp_path):
    for seed in (1, 2):
        out = tmp_path / f"seed{seed}"
        write_run(out / "rm", [0.0, 1.0], seed=seed, stage="rm")
        write_run(out / "ppo", [0.0, 1.0], seed=seed, reward_model_name_or_path=f"{out}/rm/checkpoint-2")
    write_run(tmp_path / "other" / "ppo", [0.0, 1.0], reward_model_name_or_path="elsewhere/rm")
    stages = read_stages(tmp_path / "seed1", tmp_path / "seed2", tmp_path / "other")
    groups = group_runs([stage for stage in stages if stage.kind == "ppo"], stages)
    assert list(map(len, groups.values())) == [2, 1]
    assert [stage.name for stage in stages] == ["seed1/rm", "seed1/ppo", "seed2/rm", "seed2/ppo", "other/ppo"]
    alone = read_stages(tmp_path / "seed1" / "ppo", tmp_path / "seed2" / "ppo")  # nothing says that the models match
    assert list(map(len, group_runs(alone, alone).values())) == [1, 1]


def test_long_values_are_told_apart_by_what_is_not_the_same():
    assert shorten(["0.1", None]) == ["0.1", "not set"]
    long = [f"a/very/long/path/to/the/models/{name}/checkpoint-20" for name in ("one", "two")]
    assert shorten(long) == ["…one…", "…two…"]


def test_mean_and_standard_error_by_hand(tmp_path):
    """Of 2 and 4: mean 3, standard error sqrt(2) / sqrt(2) = 1. The third seed is behind and does not count."""
    write_seeds(tmp_path)
    stages = read_stages(tmp_path)
    groups = group_runs(stages, stages)
    rows = {row["label"]: row for row in compare_groups("ppo", groups)["rows"]}
    assert rows["ppo"] == {"label": "ppo", "runs": "2 of 3", "cells": ["3.0 ± 1.0", "6.0 ± 2.0"]}
    assert rows["apa, apa_lambda 0.1"]["cells"] == ["1.00 ± 0.50", "2"]  # a single run: over its prompts
    steps, kl, reward = common_series(leading(groups["ppo"]), "eval/kl_mean", "eval/reward_mean")
    assert steps.tolist() == [0, 2, 4] and reward.tolist() == [[0, 1, 2], [0, 2, 4]] and (kl == 2 * reward).all()
    mean, error = mean_and_error(reward)
    assert mean.tolist() == [0, 1.5, 3] and error == pytest.approx([0, 0.5, 1])

    axes = Figure().subplots()
    draw_band(axes, steps, reward, "ppo", "#000000")
    band = axes.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (0, 4) and axes.lines[0].get_ydata().tolist() == [0, 1.5, 3]
    draw_band(axes, steps, reward[:1], "one", "#000000")
    assert len(axes.collections) == 1  # a single run has no band
    frontier = Figure().subplots()
    draw_frontier(frontier, kl, reward, "ppo", "#000000")
    assert frontier.lines[0].get_xydata().tolist() == [[0, 0], [3, 1.5], [6, 3]]


def test_overview(tmp_path):
    write_seeds(tmp_path)
    (first, *_, behind) = overview(read_stages(tmp_path))
    assert first == {
        "Stage": "Online RL", "Objective": "apa", "Seed": "1", "Layout": "data 2, gpu", "Steps": "4",
        "Held-out reward": "1.00 ± 0.50", "KL, nats": "2", "Time": "20 s",
    }  # fmt: skip
    assert behind["Steps"] == "0 of 4" and behind["Time"] == ""
    assert [duration(seconds) for seconds in (None, 89, 90, 7500)] == ["", "89 s", "2 min", "2 h 05 min"]


def test_page_of_several_runs(tmp_path, capsys):
    write_seeds(tmp_path)
    directories = [str(path) for path in sorted(tmp_path.iterdir())]
    main(directories)
    path = tmp_path / "comparison.html"
    assert capsys.readouterr().out == f"{path}\n" and not list(tmp_path.rglob("report.md"))
    text = path.read_text()
    page = Page(text)
    assert not re.search(r'(src|href)="(?!data:|#)', text) and "script" not in page.tags and "b" not in page.tags
    anchors = re.findall(r'href="#([^"]+)"', text)
    assert len(anchors) == 5 and all(f'id="{anchor}"' in text for anchor in anchors)
    titles = [alt.partition(":")[0] for alt in page.alts]
    expected = ["Reward, held-out", "KL to the reference, held-out", "Reward against KL", "Distribution of the reward"]
    assert titles == [*expected, "Mean time of an iteration", "Peak memory by phase"]
    for told in ("ppo from 0 at 0 to 3 at 4", "apa, apa_lambda 1.0 from 0 at 0 to 0.5 at 4"):
        assert told in page.alts[0]
    for image in page.images:
        assert image.width > 700 and np.asarray(image.convert("L")).std() > 5
    for shown in ("2 of 3", "3.0 ± 1.0", "ppo1: <b>0", "apa2: <b>2", "step 4 · reward 4", "run_ppo.py 'a b'"):
        assert shown in page.text
    assert "ppo2: <b>" not in page.text  # one run of a group speaks for it


def test_a_directory_of_runs_is_compared_in_markdown_too(tmp_path):
    write_seeds(tmp_path)
    main([str(tmp_path)])
    text = (tmp_path / "report.md").read_text()
    links = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert len(links) == 6 and all((tmp_path / link).is_file() for link in links)
    assert "| ppo | 2 of 3 | 3.0 ± 1.0 |" in text and "Online RL: 5 runs compared" in text


def test_no_other_file_is_overwritten(tmp_path):
    write_seeds(tmp_path)
    runs, notes = [str(tmp_path / "ppo1"), str(tmp_path / "ppo2")], tmp_path / "notes.html"
    notes.write_text("<p>mine</p>")
    for taken in (notes, tmp_path):
        with pytest.raises(UsageError, match="is there and is no page of this command; name another"):
            main([*runs, "--output", str(taken)])
    assert notes.read_text() == "<p>mine</p>"
    page = tmp_path / "new" / "page.html"
    for _ in range(2):  # a page of its own is replaced
        main([*runs[:1], "--output", str(page)])
    assert "Online RL (ppo1)" in page.read_text() and not (tmp_path / "ppo1" / "report.html").exists()
    with pytest.raises(UsageError, match="absent: no such directory"):
        main([*runs, str(tmp_path / "absent")])
