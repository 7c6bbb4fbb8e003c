"""Win rates by hand, what a checkpoint keeps of them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment.ppo.arguments import GROUPS
from alignment.ppo.experience import Experience
from alignment.ppo.judge import WinRate, preferences
from alignment.runtime.arguments import resolve
from alignment.runtime.faults import UsageError
from tests.stages import ARGUMENTS, read_rows, run, write_project, write_reward_model

PROMPT_IDS = [7, 8, 9, 11]
FLOAT32 = st.floats(-1e6, 1e6, width=32)


def answers(*texts: list[int]) -> Experience:
    """An experience of which a judge's statistics read prompts and answers."""
    ids = np.zeros([len(texts), 3], dtype=np.int64)
    mask = np.zeros(ids.shape, dtype=bool)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = text, True
    n, t = ids.shape
    zeros = np.zeros([n, t], np.float32)
    return Experience(
        row=np.arange(n),
        prompt_id=np.array(PROMPT_IDS[:n]),
        prompt_ids=np.ones([n, 1], np.int64),
        prompt_mask=np.ones([n, 1], bool),
        response_ids=ids,
        response_mask=mask,
        finished=np.ones(n, bool),
        scores=zeros[:, 0],
        **dict.fromkeys(("log_probs", "entropy", "ref_log_probs", "values"), zeros),
    )


FIRST = answers([1], [2, 3], [4], [5, 6, 7])
SCORES = np.array([0.1, -2.0, 3.0, 1.5], np.float32)


def test_wins_losses_and_both_kinds_of_ties_by_hand():
    """A win, a loss, equal scores, and the same tokens with other scores: (1 + 0 + 1/2 + 1/2) / 4."""
    win_rate = WinRate("judge")
    start = win_rate.measure(FIRST, SCORES)
    assert (start["eval/win_rate"], start["eval/win_rate_sem"]) == (0.5, 0.0)
    assert start["eval/judge_reward_mean"] == pytest.approx(2.6 / 4)
    assert start["eval/judge_reward_sem"] == pytest.approx(SCORES.std(ddof=1) / 2)

    later = answers([9], [2], [4, 4], [5, 6, 7])
    scores = np.array([0.2, -2.5, 3.0, np.nextafter(np.float32(1.5), np.float32(2))])
    metrics = win_rate.measure(later, scores)
    assert metrics["eval/win_rate"] == pytest.approx(0.5)
    assert metrics["eval/win_rate_sem"] == pytest.approx((0.5 / 3) ** 0.5 / 2)  # deviations 1/2, -1/2, 0, 0
    assert metrics["eval/judge_reward_mean"] == pytest.approx(2.2 / 4)
    all_lost = win_rate.measure(answers([9], [9], [9], [9]), SCORES - 1)
    assert (all_lost["eval/win_rate"], all_lost["eval/win_rate_sem"]) == (0.0, 0.0)


@given(st.lists(st.tuples(FLOAT32, FLOAT32, st.booleans()), min_size=1))
def test_position_does_not_matter(pairs):
    """Asked in both orders the preferences add up to one, so that swapping and averaging changes nothing."""
    one, other, same = (np.array(column) for column in zip(*pairs, strict=True))
    one, other = one.astype(np.float32), other.astype(np.float32)
    forward, backward = preferences(one, other, same), preferences(other, one, same)
    np.testing.assert_array_equal(forward + backward, 1.0)
    np.testing.assert_array_equal(forward == 1.0, (one > other) & ~same)


def test_a_checkpoint_keeps_the_first_answers_bit_by_bit():
    win_rate, later = WinRate("judge"), answers([1], [2], [4], [5])
    win_rate.measure(FIRST, SCORES)
    resumed = WinRate("judge")
    state = json.loads(json.dumps(win_rate.state_dict()))
    resumed.load_state_dict(state, PROMPT_IDS, Path("checkpoint-1"))
    for scores in (SCORES, SCORES * np.float32(1 + 1e-7), -SCORES):
        assert resumed.measure(later, scores) == win_rate.measure(later, scores)


@pytest.mark.parametrize(
    ("model", "prompts", "problem"),
    [
        (None, PROMPT_IDS, "has no answers of the initial policy"),
        ("other", PROMPT_IDS, "was judged by other"),
        ("judge", PROMPT_IDS[:3], "was evaluated on other prompts"),
    ],
)
def test_another_measure_is_refused(model, prompts, problem):
    state = None
    if model:
        earlier = WinRate(model)
        earlier.measure(FIRST, SCORES)
        state = earlier.state_dict()
    message = f'"judge_model_name_or_path": judge cannot go on from checkpoint-1, which {problem}'
    with pytest.raises(UsageError, match=message):
        WinRate("judge").load_state_dict(state, prompts, Path("checkpoint-1"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_datasets": None, "evaluation_strategy": "no"}, 'needs "eval_datasets" or "eval_split_ratio"'),
        ({"reward_model_name_or_path": "judge"}, "judge is the reward model; a judge is one not trained on"),
    ],
)
def test_arguments_that_cannot_judge(tmp_path, changes, message):
    file = tmp_path / "ppo.json"
    file.write_text(json.dumps(ARGUMENTS["ppo"] | {"judge_model_name_or_path": "judge"} | changes))
    with pytest.raises(UsageError, match=message):
        resolve([str(file)], GROUPS)


def test_a_run_is_judged_and_a_stranger_cannot_go_on(tmp_path):
    """The real command: what it writes of the judge is what samples.jsonl adds up to; a policy is no judge."""
    project = write_project(tmp_path)
    write_reward_model(project / "judge")
    write_reward_model(project / "stranger", scale=0.2)
    run_once = ("--max_steps", 2, "--eval_steps", 1)
    status, shown = run(project, "ppo", *run_once, "--judge_model_name_or_path", "judge")
    assert status == 0, shown
    rows = [row for row in read_rows(project / "ppo/metrics.jsonl") if "eval/win_rate" in row]
    samples = read_rows(project / "ppo/samples.jsonl")
    first = [row for row in samples if row["step"] == 0]
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row in rows:
        judged = [sample for sample in samples if sample["step"] == row["step"]]
        scores = np.array([sample["judge"] for sample in judged])
        before = np.array([sample["judge"] for sample in first])
        wins = preferences(scores, before, np.isclose(scores, before, rtol=1e-5))
        assert row["eval/judge_reward_mean"] == pytest.approx(scores.mean(), rel=1e-5)
        assert row["eval/win_rate"] == wins.mean()
    again = (*run_once, "--max_steps", 3, "--resume_from_checkpoint", "true", "--judge_model_name_or_path")
    status, shown = run(project, "ppo", *again[2:], "stranger")
    assert status == 2 and '"judge_model_name_or_path": the weights in stranger are not those that ' in shown
    status, shown = run(project, "ppo", "--judge_model_name_or_path", "model", "--overwrite_output_dir", "true")
    assert status == 2 and '"judge_model_name_or_path": model: not a reward model' in shown
