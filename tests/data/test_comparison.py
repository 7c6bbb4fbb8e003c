"""Comparisons of any number of answers: what becomes an item, and how items become a batch."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import ComparisonCollator, ComparisonDataset, DataError, RawDataset, RawSample


def make(registry_samples, tokenizer, **kwargs):

    class Samples(RawDataset):
        def __getitem__(self, index):
            return registry_samples[index]

        def __len__(self):
            return len(registry_samples)

    return ComparisonDataset([(Samples(), 1.0)], tokenizer, template="hh", **kwargs)


def test_answers_with_scores(tokenizer):
    sample = RawSample(input="Name a bird.", answers=["The owl.", "No.", "A jay."], scores=[2, -1.5, 2], type="apo")
    [item] = make([sample], tokenizer)
    assert item["scores"].tolist() == [2, -1.5, 2] and item["scores"].dtype == np.float32
    assert item["is_apo"] is True and item["source"] == 0
    for ids, answer in zip(item["input_ids"], sample["answers"], strict=True):
        assert ids.dtype == np.int64
        assert tokenizer.decode(ids[item["prompt_length"] :]) == answer + tokenizer.eos_token
        assert tokenizer.decode(ids[: item["prompt_length"]]) == "<s>\n\nHuman: Name a bird.\n\nAssistant:"


@pytest.mark.parametrize("better, scores", [(True, [1, 0]), (False, [0, 1])])
def test_a_pair_is_a_comparison_of_two(tokenizer, better, scores):
    [item] = make([RawSample(input="Hi", answer="Hello", other_answer="Bye", better=better)], tokenizer)
    assert item["scores"].tolist() == scores and item["is_apo"] is False


def test_equal_answers_are_one_and_keep_the_higher_score(tokenizer):
    [item] = make([RawSample(input="Hi", answers=["a", "b", "a"], scores=[0.0, 1.0, 3.0])], tokenizer)
    assert item["scores"].tolist() == [3, 1]


def test_what_compares_nothing_is_left_out(tokenizer):
    tied = RawSample(input="Hi", answers=["a", "b"], scores=[1, 1])
    alike = RawSample(input="Hi", answer="a", other_answer="a", better=True)
    dataset = make([tied, alike, RawSample(input="Hi", answers=["a", "b"], scores=[1, 2])], tokenizer)
    assert len(dataset) == 1 and dataset.report.identical == 2


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"answers": "a"}, "'answers' must be a list of texts, got 'a'"),
        ({"answers": ["a", 3]}, "'answers' must be a list of texts"),
        ({"scores": [1]}, "'scores' must be 2 finite numbers"),
        ({"scores": [1, float("nan")]}, "'scores' must be 2 finite numbers"),
        ({"scores": [1, True]}, "'scores' must be 2 finite numbers"),
        ({"scores": None}, "field 'scores' is missing"),
    ],
)
def test_bad_fields_are_named(tokenizer, fields, says):
    with pytest.raises(DataError, match="sample 0") as error:
        make([RawSample(input="Hi", answers=["a", "b"], scores=[1, 2]) | fields], tokenizer)
    assert says in str(error.value)


def test_the_longest_answer_decides_what_is_left_of_the_prompt(tokenizer):
    turns = ["A long first question about birds?", "Owls.", "And now?"]
    whole = make([RawSample(input=turns, answers=["a", "b" * 9], scores=[1, 2])], tokenizer)[0]
    limit = len(whole["input_ids"][1]) - 1
    short = make([RawSample(input=turns, answers=["a", "b" * 9], scores=[1, 2])], tokenizer, max_length=limit)[0]
    assert 0 < short["prompt_length"] < whole["prompt_length"] and len(short["input_ids"][1]) <= limit


def test_sources_are_places_in_the_report(tokenizer, tmp_path):
    rows = [{"input": "Hi", "answers": ["a", "b"], "scores": [0.5, 1.0]}]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dataset = ComparisonDataset({"hh-excerpt/test": "2/-1", "local": {"path": str(tmp_path / "own.jsonl")}}, tokenizer)
    assert dataset.report.sources == ["hh-excerpt/test", "local"]
    assert [item["source"] for item in dataset] == [0, 0, 1]


ITEM = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=9).map(np.array), min_size=1, max_size=4)


@given(st.lists(ITEM, min_size=1, max_size=4), st.integers(0, 4))
def test_collator(answers, pad_id):
    items = [
        {
            "input_ids": rows,
            "scores": np.arange(len(rows), dtype=np.float32),
            "prompt_length": number,
            "is_apo": number % 2 == 1,
            "source": number,
        }
        for number, rows in enumerate(answers)
    ]
    batch = ComparisonCollator(pad_id)(items)
    flat = [row for rows in answers for row in rows]
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (len(flat), max(map(len, flat)))
    for ids, mask, row in zip(batch["input_ids"], batch["attention_mask"], flat, strict=True):
        assert mask.tolist() == [True] * len(row) + [False] * (len(mask) - len(row))
        assert ids[mask].tolist() == row.tolist() and (ids[~mask] == pad_id).all()
    owner = [number for number, rows in enumerate(answers) for _ in rows]
    assert batch["item"].tolist() == batch["prompt_length"].tolist() == owner
    assert batch["scores"].tolist() == [float(place) for rows in answers for place in range(len(rows))]
    assert batch["is_apo"].tolist() == [number % 2 == 1 for number in range(len(items))]
    assert batch["source"].tolist() == list(range(len(items))) and batch["scores"].dtype == np.float32


def test_a_separator_ends_the_prompt_and_counts(tokenizer):
    pair = RawSample(input="Hi there, you over there", answer="Hello", other_answer="Bye", better=True)
    [plain], [item] = make([pair], tokenizer), make([pair], tokenizer, sep_token_id=77)
    start = plain["prompt_length"]
    assert item["prompt_length"] == start + 1
    for ids, without in zip(item["input_ids"], plain["input_ids"], strict=True):
        assert ids.tolist() == [*without[:start], 77, *without[start:]]
    longest = max(map(len, plain["input_ids"]))
    assert make([pair], tokenizer, max_length=longest).report.shortened == 0
    shortened = make([pair], tokenizer, max_length=longest, sep_token_id=77)
    assert shortened.report.shortened == 1 and max(map(len, shortened[0]["input_ids"])) <= longest


def test_files_of_one_kind_are_told_apart(tokenizer, tmp_path):
    for name in ("people", "game"):
        rows = [{"text": [f"Hi<sep>{name}", "Hi<sep>no"], "scores": [1, 0]}]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    mixture = f"apo:1:{tmp_path}/people.json, apo:2:{tmp_path}/game.json"
    dataset = ComparisonDataset(mixture, tokenizer, template="hh")
    assert dataset.report.sources == ["apo:people.json", "apo:game.json"]
    assert [item["source"] for item in dataset] == [0, 1, 1]
