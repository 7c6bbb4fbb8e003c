"""Selecting from scored samples, against a brute-force reference and examples worked by hand."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment.apo.files import Placed, read_items, write_items
from alignment.apo.schemas import Comparison, Samples, Scores, Selected
from alignment.apo.selection import rank, read_scores, select
from alignment.ppo.models.tokenizer import load_tokenizer
from alignment.runtime.faults import UsageError
from data import ComparisonDataset, RawDataset, SupervisedDataset
from tests.stages import CHECKOUT, write_tokenizer

ROWS = [
    {"query_id": 1, "query": "q", "sample_0": "low", "sample_1": " ", "sample_2": "high", "sample_10": "high "},
    {"query_id": "a:b", "query": "r", "sample_0": "x", "sample_1": "x"},
    {"query_id": "none", "query": "s", "sample_0": "y"},
]
SCORES = [
    {"1:sample_0": 5.0},  # replaced by the line below it
    {"1:sample_0": -1.0, "1:sample_1": 9.0, "1:sample_2": 2.0, "1:sample_10": 2.0},
    {"a:b:sample_0": 0.5},
    {"a:b:sample_1": 0.5},
    {"other:golden": 1.0},
]


def place(rows):
    return [Placed(Samples.model_validate(row), f"line {i + 1}") for i, row in enumerate(rows)]


def scores_of(rows):
    return read_scores([Placed(Scores.model_validate(row), "") for row in rows])


def test_scores_split_at_the_last_colon_and_later_ones_count():
    found, replaced = scores_of(SCORES)
    assert found["a:b"] == {"sample_0": 0.5, "sample_1": 0.5} and found["1"]["sample_0"] == -1.0 and replaced == 1


def test_best_and_ranking():
    chosen, counts = select(place(ROWS), scores_of(SCORES)[0])
    assert [item.to_json() for item in chosen] == [
        ROWS[0] | {"query_id": "1", "target": "high",
                   "scores": {"sample_0": -1.0, "sample_1": 9.0, "sample_2": 2.0, "sample_10": 2.0}},
        ROWS[1] | {"target": "x", "scores": {"sample_0": 0.5, "sample_1": 0.5}},
    ]  # fmt: skip
    assert +counts == {"items without scores": 1, "scored queries without samples": 1}
    chosen, _ = select(place(ROWS), scores_of(SCORES)[0], "ranking")
    assert [list(item.to_json().items()) for item in chosen] == [
        [("query_id", "1"), ("query", "q"), ("sample_2", "high"), ("sample_0", "low"), ("target", "high"),
         ("scores", {"sample_2": 2.0, "sample_0": -1.0})],
        [("query_id", "a:b"), ("query", "r"), ("sample_0", "x"), ("target", "x"), ("scores", {"sample_0": 0.5})],
    ]  # fmt: skip
    assert list(chosen[0].scores) == ["sample_2", "sample_0"]
    chosen, _ = select(place(ROWS), scores_of(SCORES)[0], "ranking", keep_duplicates=True)
    assert [list(item.answers) for item in chosen] == [["sample_2", "sample_10", "sample_0"], ["sample_0", "sample_1"]]


def test_pairs_and_margins():
    chosen, counts = select(place(ROWS), scores_of(SCORES)[0], "pairs")
    assert [item.to_json() for item in chosen] == [
        {"text": ["q<sep>high", "q<sep>low"], "scores": [2.0, -1.0], "query_id": "1"}
    ]
    assert counts["items without a better and a worse answer"] == 1
    assert len(select(place(ROWS), scores_of(SCORES)[0], min_margin=3.0)[0]) == 1
    with pytest.raises(UsageError, match="no item is left of 3: .*margin below 3.5"):
        select(place(ROWS), scores_of(SCORES)[0], min_margin=3.5)
    for margin in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="min_margin: .* finite number >= 0"):
            select(place(ROWS), scores_of(SCORES)[0], min_margin=margin)


def test_an_answer_without_a_score_is_refused_unless_it_is_empty():
    scores, _ = scores_of([{"1:sample_0": 1.0, "1:sample_2": 2.0, "1:sample_10": 1.0}])
    assert select(place(ROWS), scores)[0][0].target == "high"
    del scores["1"]["sample_2"]
    with pytest.raises(UsageError, match='line 1: field "sample_2": has no score, but sample_0, sample_10 of'):
        select(place(ROWS), scores)


ANSWERS = st.dictionaries(
    st.integers(0, 12).map("sample_{}".format), st.sampled_from(["", " ", "a", "a ", "b", "c", "\nc"]), min_size=1
)


@given(ANSWERS.flatmap(lambda answers: st.tuples(
    st.just(answers), st.fixed_dictionaries({key: st.sampled_from([-1.0, 0.0, 0.5, 2.0]) for key in answers}))),
    st.booleans(), st.sampled_from([0.0, 0.5, 1.0]))  # fmt: skip
def test_against_brute_force(given_item, keep, margin):
    answers, scores = given_item
    number = {key: int(key[7:]) for key in answers}

    def is_before(one, other):
        return scores[one] > scores[other] or (scores[one] == scores[other] and number[one] < number[other])

    kept = [key for key in answers if answers[key].strip() and (keep or not any(
        answers[other].strip() == answers[key].strip() and is_before(other, key) for other in answers))]  # fmt: skip
    expected = [None] * len(kept)
    for key in kept:
        expected[sum(is_before(other, key) for other in kept)] = key
    assert rank(answers, scores, keep) == expected

    samples = place([{"query_id": "1", "query": "q", **answers}])
    spread = max(scores[key] for key in kept) - min(scores[key] for key in kept) if kept else -1
    for mode, left in (("best", spread >= margin), ("pairs", spread >= margin and spread > 0)):
        if not left:
            with pytest.raises(UsageError, match="no item is left"):
                select(samples, {"1": scores}, mode, margin, keep)
            continue
        (item,), _ = select(samples, {"1": scores}, mode, margin, keep)
        if mode == "best":
            assert item.target == answers[expected[0]] and item.scores == scores and item.answers == answers
        else:
            assert item.scores == [scores[expected[0]], scores[expected[-1]]]
            assert item.text == [f"q<sep>{answers[expected[i]]}" for i in (0, -1)]


def run_select(folder, files, *words, cwd=CHECKOUT):
    paths = [word for name, file in files.items() for word in (name, str(folder / file))]
    command = [sys.executable, "-m", "alignment.apo.select", *paths, *words]
    return subprocess.run(command, cwd=cwd, env={"PYTHONPATH": str(CHECKOUT)}, capture_output=True, text=True)


def test_the_command_and_the_data_sets_that_read_its_files(tmp_path):
    write_items(tmp_path / "samples.json", ROWS)
    write_items(tmp_path / "scores.jsonl", SCORES)
    for mode in ("best", "ranking", "pairs"):
        files = {"--samples": "samples.json", "--scores": "scores.jsonl", "--output": f"{mode}.json"}
        # In the folder of the sources: nothing there may hide a module of Python's own.
        result = run_select(tmp_path, files, "--mode", mode, cwd=CHECKOUT / "alignment/apo")
        assert result.returncode == 0, result.stderr
        assert "scores.jsonl: 1 scores replaced by later ones" in result.stdout
    assert "pairs.json: 1 of 3 items (1 scored queries without samples" in result.stdout
    assert len(read_items(tmp_path / "best.json", Selected)) == 2
    assert len(read_items(tmp_path / "pairs.json", Comparison)) == 1

    raw = RawDataset.load("apo-samples", path=str(tmp_path / "ranking.json"))
    assert list(raw) == [
        {"input": ["q"], "answers": ["low", "high"], "scores": [-1.0, 2.0], "answer": "high", "query_id": "1"},
        {"input": ["r"], "answers": ["x"], "scores": [0.5], "answer": "x", "query_id": "a:b"},
    ]
    write_tokenizer(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    assert len(SupervisedDataset(f"apo-samples:1.0:{tmp_path / 'best.json'}", tokenizer)) == 2
    raw = RawDataset.load("apo", path=str(tmp_path / "pairs.json"))
    assert (raw[0]["answer"], raw[0]["other_answer"]) == ("high", "low") and "type" not in raw[0]
    assert len(ComparisonDataset(f"apo:1.0:{tmp_path / 'pairs.json'}", tokenizer)) == 1
    # "low" and "high" are told apart by their scores; "x" has nothing to be compared with.
    (item,) = ComparisonDataset(f"apo-samples:1.0:{tmp_path / 'ranking.json'}", tokenizer)
    assert item["scores"].tolist() == [-1.0, 2.0] and not item["is_apo"]


def test_the_help_of_both_commands(tmp_path):
    told = {"select": ("--min_margin", "best: samples"), "convert": ("--sampling", "stand in for them")}
    for name, words in told.items():
        result = subprocess.run(
            [sys.executable, "-m", f"alignment.apo.{name}", "--help"], cwd=CHECKOUT, capture_output=True, text=True
        )
        assert result.returncode == 0 and all(word in result.stdout for word in words)


def test_a_malformed_file_ends_the_command_with_one_line(tmp_path):
    (tmp_path / "samples.jsonl").write_text(json.dumps(ROWS[0]) + "\n" + json.dumps({"query_id": 2}) + "\n")
    write_items(tmp_path / "scores.jsonl", SCORES)
    result = run_select(tmp_path, {"--samples": "samples.jsonl", "--scores": "scores.jsonl", "--output": "o"})
    assert (result.returncode, result.stderr) == (
        2, f'error: {tmp_path / "samples.jsonl"}, line 2: field "query": missing; the item has: query_id\n'
    )  # fmt: skip
    assert not (tmp_path / "o").exists()
