"""The report's numbers and plots: verdicts, standard errors, curves, and which of them each kind of run has."""

from __future__ import annotations

import json

import numpy as np
import pytest

from alignment.report.panels import panels_of
from alignment.report.phases import mean_seconds, seconds_per_step, shares
from alignment.report.plots import draw_stage, smooth
from alignment.report.reading import Stage, read_stages
from alignment.report.tables import compare_rewards, headline, verdict, with_error
from tests.report_runs import rows, write_lines


def test_paired_standard_error_by_hand():
    """Differences 1, 2, 3: mean 2, std(ddof=1) 1, standard error 1/sqrt(3), ratio 2 sqrt(3)."""
    samples = rows(0, {1: 0.0, 2: 10.0, 3: -5.0}) + rows(5, {1: 9.0, 2: 9.0}) + rows(9, {3: -2.0, 2: 12.0, 1: 1.0})
    paired = compare_rewards(samples)
    assert (paired.count, paired.difference) == (3, 2.0)
    assert paired.standard_error == pytest.approx(3**-0.5)
    assert paired.ratio == pytest.approx(2 * 3**0.5)


def test_paired_prompts_are_those_of_both_steps_and_answers_are_averaged():
    samples = rows(0, {1: 0.0, 2: 0.0, 8: 100.0}) + rows(4, {1: 2.0, 2: 1.0, 9: 100.0}) + rows(4, {1: 4.0})
    samples += [row | {"decoding": "beta_4"} for row in rows(4, {1: 50.0, 2: 50.0})]  # another policy's
    paired = compare_rewards(samples)
    assert (paired.count, paired.difference) == (2, 2.0)  # prompt 1: (2 + 4) / 2 - 0 = 3, prompt 2: 1


@pytest.mark.parametrize(
    ("samples", "sentence"),
    [
        ([], ""),
        (rows(0, {1: 1.0}), ""),
        (rows(0, {1: 1.0}) + rows(1, {2: 1.0}), ""),
        (rows(0, {1: 1.0}) + rows(1, {1: float("nan")}), ""),
        (rows(0, {1: 1.0}) + rows(1, {1: 3.0}), "changed by +2; a standard error cannot be computed."),
        (rows(0, {1: 1.0, 2: 2.0}) + rows(1, {1: 3.0, 2: 4.0}), "changed by +2; a standard error cannot be computed."),
        (rows(0, {1: 1.0, 2: 2.0}) + rows(1, {1: 0.0, 2: -1.0}), "of 1: 2 standard errors below the start."),
    ],
)
def test_verdict_claims_no_more_than_the_samples_allow(samples, sentence):
    assert verdict(compare_rewards(samples)).endswith(sentence)
    assert bool(verdict(compare_rewards(samples))) == bool(sentence)


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [(1.5569, 0.1165, "1.56 ± 0.12"), (24.95, 1.23, "24.9 ± 1.2"), (8e-5, 7e-6, "8e-05 ± 7e-06"), (2, 0, "2 ± 0")],
)
def test_a_value_is_as_precise_as_its_standard_error(value, error, text):
    assert with_error(value, error) == text


def test_resumed_run_counts_each_step_once_and_gaps_are_skipped(tmp_path):
    metrics = [{"step": 1, "loss": 9.0}, {"step": 2, "loss": 9.5}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": None}]
    write_lines(tmp_path / "metrics.jsonl", metrics)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "loss": NaN}\n{"step": 5, "lo')
    (stage,) = read_stages(tmp_path)
    steps, values = stage.series("loss")
    assert (steps.tolist(), values.tolist()) == ([1, 2], [9.0, 2.0])
    assert any("last line of metrics.jsonl is incomplete" in note for note in stage.notes)
    assert headline(stage) == [
        {"label": "Training loss (nats per token)", "start": "9", "final": "2", "change": "-7"},
    ]


def test_smoothing_neither_lags_nor_invents():
    line = np.arange(100.0)
    np.testing.assert_allclose(smooth(line)[5:-5], line[5:-5])
    jitter = np.where(np.arange(100) % 2, 1.0, -1.0)
    assert np.abs(smooth(jitter)).max() < 0.4
    assert smooth(line)[0] == 2.5  # the mean of the first six


def test_only_what_exists_is_drawn(tmp_path):
    assert draw_stage(Stage(tmp_path, "ppo", {"eval/unknown": {1: 1.0}})) == []
    pictures = draw_stage(Stage(tmp_path, "ppo", {"timing_s/rollout": {7: 1.0}, "eval/kl_mean": {0: 0.0}}))
    assert [picture.key for picture in pictures] == ["kl", "timing"]


def test_evaluation_and_saving_are_spread_over_the_steps_that_they_follow(tmp_path):
    """Rows of every other step: two seconds a step, evaluations of 4, 2 and 6 seconds, a save of 2."""
    metrics = [{"step": 0, "eval/loss": 1.0, "timing_s/evaluation": 4.0}]
    metrics += [{"step": step, "loss": 1.0, "timing_s/training": 2.0, "memory_gb/training": 1.0} for step in (2, 4, 6)]
    metrics[3] |= {"timing_s/saving": 2.0, "memory_gb/saving": 1.5}
    metrics += [{"step": step, "eval/loss": 1.0, "timing_s/evaluation": value} for step, value in ((3, 2.0), (6, 6.0))]
    write_lines(tmp_path / "metrics.jsonl", metrics)
    (stage,) = read_stages(tmp_path)
    phases = seconds_per_step(stage)
    assert phases == {
        "training": {2: 2.0, 4: 2.0, 6: 2.0}, "evaluation": {2: 2.0, 4: 1.0, 6: 3.0}, "saving": {6: 1.0}
    }  # fmt: skip
    assert mean_seconds(phases) == {"training": 2.0, "evaluation": 2.0, "saving": pytest.approx(1 / 3)}
    assert shares(phases)["training"] == pytest.approx(6 / 13)
    told = {picture.key: picture.alt for picture in draw_stage(stage)}
    assert told["timing"] == "Time per step: training 46%, evaluation 46%, saving 8%"
    assert told["memory"] == "Peak memory by phase: training up to 1 GB, saving up to 1.5 GB"
    evaluated = Stage(tmp_path, "sft", {"timing_s/evaluation": {0: 1.0}})
    assert seconds_per_step(evaluated) == {} and draw_stage(evaluated) == []


@pytest.mark.parametrize("told", [{}, {"logged/answers": 8}], ids=["online", "logged answers"])
def test_a_judge_has_its_rows_and_plots(tmp_path, told):
    write_lines(
        tmp_path / "metrics.jsonl",
        [
            {
                "step": step,
                "eval/reward_mean": 0.5,
                "eval/judge_reward_mean": 0.25 * step,
                "eval/judge_reward_sem": 0.125,
                "eval/win_rate": 0.5 + 0.1 * step,
                "eval/win_rate_sem": 0.05 * step,
                **told,
            }
            for step in range(3)
        ],
    )
    (stage,) = read_stages(tmp_path)
    assert stage.kind == ("offline" if told else "ppo")
    assert [picture.key for picture in draw_stage(stage)] == ["reward", "judge", "win_rate"]
    judge, wins = headline(stage)[1:]
    assert (judge["start"], judge["final"], judge["change"]) == ("0.00 ± 0.12", "0.50 ± 0.12", "+0.5")
    assert wins["label"].startswith("Win rate") and (wins["start"], wins["final"]) == ("0.5 ± 0", "0.70 ± 0.10")


def test_logged_answers(tmp_path):
    """A run on logged answers is told from an online one, with and without answers of its own."""
    rows = [
        {"step": 0, "eval/loss": 3.0, "eval/reward_mean": 0.1, "eval/reward_sem": 0.05, "eval/kl_mean": 0.0},
        {"step": 1, "loss/value_avg": 0.9, "logged/score_mean": 0.4},
        {"step": 2, "loss/policy_avg": 2.5, "logged/answers": 8, "logged/score_mean": 0.4, "lr": 1e-4},
        {"step": 2, "eval/loss": 2.0, "eval/reward_mean": 0.3, "eval/reward_sem": 0.05, "eval/kl_mean": 0.7},
    ]
    write_lines(tmp_path / "metrics.jsonl", rows)
    (stage,) = read_stages(tmp_path)
    assert stage.kind == "offline" and stage.title.startswith("Logged answers")
    assert {picture.key for picture in draw_stage(stage)} == {
        *("reward", "kl", "policy_loss", "value_loss", "lr", "frontier")
    }
    changes = {row["label"]: row["change"] for row in headline(stage)}
    assert changes["Held-out reward"] == "+0.2" and changes["Loss on held-out logged answers"] == "-1"


def test_answers_of_ilql_by_several_betas(tmp_path):
    """Each beyond the first has a curve of its own beside the first one's, with its own standard errors."""
    metrics = [{"step": 2, "loss/ilql_avg": 2.5, "logged/answers": 8}]
    for step in (0, 2):
        values = {"reward_mean": 0.5 * step, "reward_sem": 0.1, "kl_mean": 1.0, "win_rate": 0.5, "win_rate_sem": 0.1}
        first = {f"eval/{name}": value for name, value in values.items()}
        others = {f"eval/beta_{beta}/{name}": value + beta for beta in (4, 0.5) for name, value in values.items()}
        metrics.append({"step": step, "eval/loss": 3.0 - step, **first, **others})
    write_lines(tmp_path / "metrics.jsonl", metrics)
    (stage,) = read_stages(tmp_path)
    told = {picture.key: picture.alt for picture in draw_stage(stage)}
    assert set(told) == {"reward", "win_rate", "kl", "policy_loss", "frontier"}
    assert told["reward"] == (
        "Reward: held-out from 0 at 0 to 1 at 2; held-out, beta 4 from 4 at 0 to 5 at 2; "
        "held-out, beta 0.5 from 0.5 at 0 to 1.5 at 2"
    )
    assert "beta 4 from 5 at 0" in told["kl"] and "beta 0.5 from 1 at 0" in told["win_rate"]
    assert "held-out from 3 at 0 to 1 at 2; training from 2.5 at 2" in told["policy_loss"]
    (reward,) = (panel for panel in panels_of(stage) if panel.key == "reward")
    assert [curve.errors for curve in reward.curves] == [
        *("eval/reward_sem", "eval/beta_4/reward_sem", "eval/beta_0.5/reward_sem")
    ]


def test_policy_updates(tmp_path):
    """DPO and RRHF are told by their metrics, RJS, which is supervised tuning, by what run.json says."""
    for update, names in {
        "dpo": ("loss", "accuracy", "rewards/chosen", "rewards/margin", "logps/chosen", "log_ratio"),
        "rrhf": ("loss", "accuracy", "rank_loss", "sft_loss", "logps/chosen", "logps/rejected"),
        "rjs": ("loss", "perplexity"),
    }.items():
        held_out = [{"step": step, **{f"eval/{name}": 1.0 + step for name in names}} for step in (0, 2)]
        write_lines(tmp_path / update / "metrics.jsonl", [*held_out, {"step": 1, **dict.fromkeys(names, 0.5)}])
    (tmp_path / "rjs" / "run.json").write_text(json.dumps({"stage": "update"}))
    drawn = {}
    for stage in read_stages(tmp_path):
        assert stage.title == f"Policy update ({stage.directory.name})"
        drawn[stage.directory.name] = [picture.key for picture in draw_stage(stage)]
    assert drawn == {
        "dpo": ["loss", "accuracy", "margin", "rewards", "logps", "log_ratio"],
        "rrhf": ["loss", "accuracy", "logps", "rank_loss", "sft_loss"],
        "rjs": ["loss"],
    }
    changes = {row["label"]: row["change"] for row in headline(read_stages(tmp_path / "dpo")[0])}
    assert changes["Held-out accuracy"] == changes["Held-out margin of the implicit reward"] == "+2"
