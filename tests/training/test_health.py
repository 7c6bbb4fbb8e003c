"""Each alert on both sides of its threshold, when it is said again, and a resumed run's alerts."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from alignment.runtime.faults import RunError
from alignment.runtime.metrics import MetricsWriter
from alignment.training.health import ALERTS_FILE, Health
from alignment.training.health_rules import RULES

QUIET = {
    "val/ratio_start_error": 1e-12,
    "objective/kl": 2.0,
    "rollout/length_mean": 50.0,
    "rollout/reward_mean": 0.5,
    "rollout/reward_std": 1.0,
    "rollout/repetition_rate": 0.02,
    "rollout/truncated_rate": 0.2,
    "loss/value_avg": 0.3,
    "critic/vf_explained_var": 0.4,
    "policy/entropy_avg": 1.5,
    "loss": 0.7,
    "eval/loss": 0.7,
}
ARGUMENTS = {"learning_rate": 1e-5, "kl_coeff": 0.02, "max_new_tokens": 64, "top_p": 0.8, "critic_learning_rate": None}
# alert: (the last rows just within the limit, the same just over it, an argument that the message must name)
CASES = {
    "ratio-off-at-start": ([{"val/ratio_start_error": 0.0025}], [{"val/ratio_start_error": 0.0026}], "temperature"),
    "kl-exploding": ([{"objective/kl": 25.0}] * 5, [{"objective/kl": 25.1}] * 5, '"kl_coeff" (0.02)'),
    "kl-negative": ([{"objective/kl": -0.09}] * 5, [{"objective/kl": -0.11}] * 5, '"top_p" (0.8)'),
    "reward-hacking": (
        [{"rollout/reward_mean": 1.6, "rollout/length_mean": 99.0}] * 5,
        [{"rollout/reward_mean": 1.6, "rollout/length_mean": 101.0}] * 5,
        '"kl_coeff" (0.02)',
    ),
    "value-loss-diverging": ([{"loss/value_avg": 1.49}] * 5, [{"loss/value_avg": 1.51}] * 5, "critic_learning_rate"),
    "critic-not-learning": (
        [{"critic/vf_explained_var": -1.0}] * 19,
        [{"critic/vf_explained_var": -0.01}] * 20,
        "clip_range_value",
    ),
    "all-answers-truncated": (
        [{"rollout/truncated_rate": 1.0}] * 4,
        [{"rollout/truncated_rate": 1.0}] * 5,
        '"max_new_tokens" (64)',
    ),
    "entropy-collapsed": ([{"policy/entropy_avg": 0.1}] * 5, [{"policy/entropy_avg": 0.09}] * 5, "entropy_coeff"),
    "reward-without-spread": (
        [{"rollout/reward_std": 0.0}] * 4,
        [{"rollout/reward_std": 0.0}] * 5,
        "num_return_sequences",
    ),
    "loss-diverging": ([{"loss": 1.14}] * 5, [{"loss": 1.16}] * 5, '"learning_rate" (1e-05)'),
    "held-out-loss-rising": ([{"eval/loss": 0.83}] * 2, [{"eval/loss": 0.85}] * 2, "num_train_epochs"),
}
MORE = {  # further cases that must be quiet, or not: alert: [(last rows, whether it comes)]
    "reward-hacking": [
        ([{"rollout/reward_mean": 1.4, "rollout/length_mean": 200.0}] * 5, False),  # longer, but no better
        ([{"rollout/reward_mean": 1.6}] * 5, False),  # better, as it should be
        ([{"rollout/reward_mean": 1.6, "rollout/repetition_rate": 0.21}] * 5, False),
        ([{"rollout/reward_mean": 1.6, "rollout/repetition_rate": 0.23}] * 5, True),
    ],
    "kl-negative": [([{"objective/kl": -9.0}] * 4, False), ([{"objective/kl": -9.0}] * 4 + [{}], False)],
    "kl-exploding": [([{"objective/kl": 90.0}], False)],  # one row alone
    "entropy-collapsed": [([{"policy/entropy_avg": 0.09}] * 4, False)],
    "held-out-loss-rising": [([{"eval/loss": 9.0}, {}], False)],
}
EVERY_CASE = [
    *((name, rows, False) for name, (rows, _, _) in CASES.items()),
    *((name, rows, True) for name, (_, rows, _) in CASES.items()),
    *((name, *case) for name, some in MORE.items() for case in some),
]


def args_of(folder):
    return SimpleNamespace(output_dir=str(folder), **ARGUMENTS)


def feed(folder, rows, start=0):
    """What a stage's loop does with rows of metrics after ``start`` steps; returns alerts.jsonl."""
    args = args_of(folder)
    with MetricsWriter(args, folder, resume_from=start) as writer, Health(args, start) as health:
        for step, row in enumerate(rows[start:], start + 1):
            writer.write(step, row)
            health.observe(step, row)
    return [json.loads(line) for line in (folder / ALERTS_FILE).read_text().splitlines()]


def test_every_rule_has_a_case():
    assert CASES.keys() == {rule.name for rule in RULES}
    assert {name for rule in RULES for name in rule.metrics} == QUIET.keys()


@pytest.mark.parametrize(("name", "rows", "comes"), EVERY_CASE)
def test_threshold(tmp_path, capsys, name, rows, comes):
    alerts = feed(tmp_path, [QUIET] * 25 + [QUIET | row for row in rows])
    assert [alert["alert"] for alert in alerts].count(name) == comes
    if comes:
        alert = next(alert for alert in alerts if alert["alert"] == name)
        assert alert["step"] <= 25 + len(rows) and alert["values"].keys() <= QUIET.keys()
        assert CASES[name][2] in alert["message"] and "{" not in alert["message"] and "\n" not in alert["message"]
        assert f"alert at step {alert['step']}: {name}: {alert['message']}" in capsys.readouterr().out


def test_quiet_metrics_give_no_alert(tmp_path):
    assert feed(tmp_path, [QUIET] * 40) == []


def test_an_alert_is_said_once_and_again_after_it_has_gone(tmp_path):
    bad = QUIET | {"val/ratio_start_error": 1.0}
    alerts = feed(tmp_path, [QUIET, bad, bad, bad, QUIET, bad])
    assert [(alert["step"], alert["alert"]) for alert in alerts] == [
        (2, "ratio-off-at-start"),
        (6, "ratio-off-at-start"),
    ]


def test_a_number_that_is_not_finite_counts_for_nothing(tmp_path):
    nothing = {name: float("nan") for name in QUIET}
    assert feed(tmp_path, [QUIET] * 5 + [nothing] * 20 + [QUIET] * 5) == []


def test_a_full_disk_is_one_line(tmp_path):
    health = Health(SimpleNamespace(output_dir=tmp_path, **ARGUMENTS), 0)
    health._file.close()
    health._file = open("/dev/full", "a")
    with pytest.raises(RunError, match=r"alerts\.jsonl: cannot be written: No space left on device"), health:
        health.observe(1, QUIET | {"val/ratio_start_error": 1.0})


@pytest.mark.parametrize("stop", range(1, 18))
def test_a_resumed_run_gives_the_same_alerts(tmp_path, stop):
    """Stopped later than it is resumed from, with alerts that begin before, across and after the step."""
    bad = QUIET | {"loss": 9.0, "rollout/truncated_rate": 1.0, "val/ratio_start_error": 1.0}
    rows = [QUIET] * 5 + [bad] * 6 + [QUIET] + [bad] * 5
    expected = feed(tmp_path / "whole", rows)
    assert {alert["alert"] for alert in expected} == {"loss-diverging", "all-answers-truncated", "ratio-off-at-start"}
    feed(tmp_path / "part", rows[: stop + 1])
    assert feed(tmp_path / "part", rows, start=stop) == expected
