"""Runs that are killed and resumed end as uninterrupted ones; see tests/kill_campaign.py."""

from __future__ import annotations

import pytest

from tests.kill_campaign import CASES, run_campaign


def test_three_kills(tmp_path):
    counts = run_campaign(tmp_path, 3, seed=1, cases=["sft", "ppo", "offline"])
    assert sum(row["resumed"] for row in counts.values()) == 3
    assert not any(row["passed_over"] for row in counts.values())


@pytest.mark.trust_full
def test_campaign(tmp_path):
    counts = run_campaign(tmp_path, 35, seed=0, cases=list(CASES))
    assert all(row["resumed"] == 5 for row in counts.values())
    assert sum(row["during_a_save"] for row in counts.values()) >= 10
