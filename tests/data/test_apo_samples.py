"""Selected samples as a data set."""

from __future__ import annotations

import pytest

from data import DataError, PromptOnlyDataset, RawDataset

TURNS = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why?\n\nAssistant:"


def test_scored_answers_by_number_and_unscored_ones(write_rows):
    rows = [
        {"query_id": "7", "query": TURNS, "sample_0": "a", "sample_10": "b", "sample_2": "c", "target": "b",
         "note": "x", "scores": {"sample_10": 2, "sample_0": 1.5}},
        {"query_id": "8", "query": "q", "sample_1": "d", "target": "d", "scores": {"sample_1": -1}},
    ]  # fmt: skip
    assert list(RawDataset.load("apo-samples", path=write_rows("selected.json", rows))) == [
        {"input": ["Hi", "Yes?", "Why?"], "answers": ["a", "b"], "scores": [1.5, 2.0], "answer": "b", "query_id": "7"},
        {"input": ["q"], "answers": ["d"], "scores": [-1.0], "answer": "d", "query_id": "8"},
    ]
    rows = [{"query_id": 7, "instruction": "q", "sample_1": "b", "sample_0": "a"}]
    raw = RawDataset.load("apo-samples", path=write_rows("samples.jsonl", rows))
    assert list(raw) == [{"input": ["q"], "answers": ["a", "b"], "query_id": "7"}]


def test_ppo_takes_the_prompts(write_rows, tokenizer):
    path = write_rows("s.jsonl", [{"query": "q", "sample_0": "a"}, {"query": TURNS, "sample_0": "a"}])
    prompts = PromptOnlyDataset(f"apo-samples:1.0:{path}", tokenizer, template="hh")
    assert [item["prompt"] for item in prompts] == ["\n\nHuman: q\n\nAssistant:", TURNS]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"sample_0": "a"}, "column 'query' is missing; the row has: sample_0"),
        ({"query": "q", "sample_0": "a", "scores": 3}, "column 'scores' must map answers to numbers, got 3"),
        ({"query": "q", "sample_0": "a", "scores": {"sample_1": 3}}, "column 'scores' names 'sample_1', an answer"),
    ],
)
def test_faults_name_the_row(row, message, write_rows):
    path = write_rows("s.jsonl", [row])
    with pytest.raises(DataError, match=f"dataset 'apo-samples', sample 0, file {path}: {message}"):
        RawDataset.load("apo-samples", path=path)[0]
