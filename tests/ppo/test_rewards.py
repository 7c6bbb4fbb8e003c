"""Rewards from real Python functions, and weighted sums of them."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest

from alignment.parallel.layout import Layout
from alignment.parallel.topology import Topology
from alignment.ppo.rewards import FunctionReward, RewardSource, WeightedRewards, base, check_rewards
from alignment.runtime.faults import RunError, UsageError
from tests.ppo.reward_examples import FUNCTIONS, make_batch


@pytest.fixture
def functions(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(FUNCTIONS)
    return path


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("words", [3, 1, 1, 2]),
        ("overlap", [1, 1, 1, 0]),
        ("ended", [2, 0, 2, 0]),
        ("everything", [4, 4, 4, 4]),
        ("judge.score", [7, 7, 7, 7]),
    ],
)
def test_function_gets_the_columns_it_names(functions, name, expected):
    rewards = FunctionReward(f"{functions}:{name}")(make_batch())
    assert rewards.dtype == np.float32
    np.testing.assert_array_equal(rewards, expected)


def test_function_from_a_module_in_the_working_directory(functions, monkeypatch):
    monkeypatch.chdir(functions.parent)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", os.getcwd())])
    source = FunctionReward("my_rewards:words")
    assert source.name == "words"
    assert source(make_batch()).tolist() == [3, 1, 1, 2]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", r"broken raised ZeroDivisionError: .* \(response 0: 'a b c'; end of its prompt: 'question 0'\)"),
        ("short", "returned 3 rewards for 4 responses"),
        ("holes", "returned nan for response 1"),
        ("text", "returned '1' for response 0, which is not a number"),
        ("nested", r"returned \[1.0\] for response 0"),
        ("single", "returned float, not a sequence of 4 numbers"),
    ],
)
def test_function_fault_is_named(functions, name, message):
    with pytest.raises(RunError, match=message) as fault:
        FunctionReward(f"{functions}:{name}")(make_batch())
    assert "\n" not in str(fault.value) and str(functions) in str(fault.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("words", "expected module:name"),
        ("no_such_module_here:f", "cannot import no_such_module_here: ModuleNotFoundError"),
        ("missing.py:f", "no such file: missing.py"),
        ("{file}:absent", "has no 'absent'; it has .*words"),
        ("{file}:constant", "constant is int, not a function"),
        ("{file}:needs_more", "cannot fill its parameter 'model'"),
        ("{folder}/bad.py:f", "cannot import .*SyntaxError"),
        ("{folder}/leaves.py:f", "cannot import .*SystemExit"),
    ],
)
def test_function_that_cannot_be_used_is_refused_at_start(functions, spec, message):
    (functions.parent / "bad.py").write_text("def f(:")
    (functions.parent / "leaves.py").write_text("import sys; sys.exit(3)")
    with pytest.raises(UsageError, match=message):
        FunctionReward(spec.format(file=functions, folder=functions.parent))


@pytest.mark.parametrize("values", [[1, 2.5], (1, 2.5), np.array([1, 2.5]), [np.float16(1), np.array(2.5)]])
def test_check_rewards_takes_what_functions_return(values):
    np.testing.assert_array_equal(check_rewards(values, 2, "f"), np.array([1, 2.5], dtype=np.float32))


@pytest.mark.parametrize("value", [float("inf"), -1e39, 10**400, None, "1", 1j, {}])
def test_check_rewards_refuses_what_is_no_finite_float32(value):
    with pytest.raises(RunError, match="f returned .* for response 1"):
        check_rewards([0.0, value], 2, "f")


# --- weighted sums


def test_weighted_sum_keeps_unweighted_components(functions):
    sources = [FunctionReward(f"{functions}:{name}") for name in ("words", "ended", "words")]
    total, parts = WeightedRewards(sources, [1.0, -0.5, 2.0]).score(make_batch())
    assert {name: part.tolist() for name, part in parts.items()} == {
        "rewards/words": [3, 1, 1, 2],
        "rewards/ended": [2, 0, 2, 0],
        "rewards/words_2": [3, 1, 1, 2],
    }
    np.testing.assert_allclose(total, [8, 3, 2, 6])


@pytest.mark.parametrize("weights", [[1.0], [1.0, float("nan")]])
def test_weights_must_match_the_sources(functions, weights):
    sources = [FunctionReward(f"{functions}:words"), FunctionReward(f"{functions}:ended")]
    with pytest.raises(UsageError, match=r"one finite number is needed for each of \['words', 'ended'\]"):
        WeightedRewards(sources, weights)


def test_no_source_is_refused():
    with pytest.raises(UsageError, match="no reward source"):
        WeightedRewards([])


class Counting(RewardSource):
    """Answers 5, and counts how often it was asked."""

    def __init__(self, name, is_divided):
        self.name, self.is_divided, self.asked = name, is_divided, 0

    def __call__(self, batch):
        self.asked += 1
        return np.full(len(batch), 5.0, np.float32)


@pytest.mark.parametrize(
    ("layout", "stage", "tensor_rank", "is_head"),
    [
        (Layout(), 0, 0, True),
        (Layout(pipeline=2, tensor=2), 1, 0, True),
        (Layout(pipeline=2, tensor=2), 1, 1, False),
        (Layout(pipeline=2, tensor=2), 0, 0, False),
        (Layout(data=2, sharding=2), 0, 0, True),
    ],
)
def test_a_source_is_asked_once_for_the_processes_of_a_model_but_a_model_on_all(
    monkeypatch, layout, stage, tensor_rank, is_head
):
    """The others take the head's word, so that a server is not asked twice and a random function agrees."""
    given = []

    def from_head(item):
        given.append(item)
        return np.full(4, 7.0, np.float32)

    monkeypatch.setattr(base, "topology", lambda: Topology(layout, stage=stage, tensor_rank=tensor_rank))
    monkeypatch.setattr(base, "from_head", from_head)
    judge, model = Counting("judge", False), Counting("model", True)
    total, components = WeightedRewards([judge, model], [1.0, 10.0]).score(make_batch())
    assert total.tolist() == [57.0] * 4 and components["rewards/judge"].tolist() == [7.0] * 4
    assert (judge.asked, model.asked) == (int(is_head), 1)
    assert len(given) == 1 and (given[0] is not None) == is_head
