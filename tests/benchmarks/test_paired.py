"""Pairs and their medians, and processes that are stopped while others are measured."""

from __future__ import annotations

import sys
import time

import psutil
import pytest

from alignment.runtime.faults import RunError, UsageError
from benchmarks.paired import Contender, alternate, median_ratio, median_speed


def pair(ours: tuple[float, int], peer: tuple[float, int]) -> dict:
    return {name: {"seconds": run[0], "tokens": run[1]} for name, run in (("ours", ours), ("peer", peer))}


def test_ratio_is_the_median_of_the_pairs_not_the_ratio_of_medians():
    # 2x, 8x, 3x; medians of the speeds would give 40 / 10 = 4x
    pairs = [pair((2, 40), (1, 10)), pair((1, 80), (1, 10)), pair((1, 40), (3, 40))]
    assert median_ratio(pairs) == pytest.approx(3.0)
    assert median_speed([one["ours"] for one in pairs]) == pytest.approx(40.0)


def test_ratio_counts_tokens_where_answers_differ_in_length():
    assert median_ratio([pair((10, 100), (10, 50))]) == pytest.approx(2.0)  # the same seconds, twice the tokens


def test_ratio_of_runs_without_tokens_is_that_of_seconds():
    assert median_ratio([{"ours": {"seconds": 2.0}, "peer": {"seconds": 3.0}}]) == pytest.approx(1.5)


def test_runs_alternate_ours_first():
    order = []

    def runner(name):
        def run(number):
            order.append((name, number))
            return {"seconds": 1.0, "by": name}

        return run

    pairs = alternate(runner("ours"), runner("peer"), 3, show=lambda line: None)
    assert order == [(name, number) for number in range(3) for name in ("ours", "peer")]
    assert [(one["ours"]["by"], one["peer"]["by"]) for one in pairs] == [("ours", "peer")] * 3


@pytest.fixture
def echo():
    with Contender("echo", "tests.benchmarks.echo", sys.executable, ["a", "b"]) as contender:
        yield contender


def test_contender_answers_and_is_stopped_between_requests(echo):
    assert echo.hello == {"name": "echo"}
    process = psutil.Process(echo._process.pid)
    for text in ("one", "line\nbreaks"):
        wait_until_stopped(process)
        assert echo.ask("repeat", text=text) == {"text": text, "arguments": ["a", "b"]}
    wait_until_stopped(process)


def test_contender_that_ends_is_reported_with_its_last_words(echo):
    with pytest.raises(RunError, match="echo: ended with status 1: no memory left"):
        echo.ask("die", words="no memory left")


def test_contender_that_refuses_its_input_says_why(echo):
    with pytest.raises(UsageError, match="^echo: models/x: no such directory$"):
        echo.ask("die", words="error: models/x: no such directory", status=2)


def test_contender_that_cannot_start_is_reported():
    with pytest.raises(RunError, match="peer: ended with status 1: .*No module named"):
        Contender("peer", "tests.benchmarks.missing", sys.executable)


def test_own_settings_stay_out_of_a_plain_environment(monkeypatch):
    monkeypatch.setenv("MKL_NUM_THREADS", "7")
    for plain in (True, False):
        with Contender("echo", "tests.benchmarks.echo", sys.executable, plain=plain) as contender:
            environment = psutil.Process(contender._process.pid).environ()
            assert ("MKL_NUM_THREADS" in environment) is not plain


def wait_until_stopped(process: psutil.Process) -> None:
    """The signal is on its way when an answer has come; a contender that is never stopped fails the test."""
    for _ in range(100):
        if process.status() == psutil.STATUS_STOPPED:
            return
        time.sleep(0.05)
    pytest.fail(f"still {process.status()}")
