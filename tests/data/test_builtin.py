"""Every built-in data set on small files of its real schema, through its real loading code."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import pytest

from data import (
    DataError,
    PreferenceDataset,
    PromptOnlyDataset,
    RawDataset,
    SafetyPreferenceDataset,
    SupervisedDataset,
)

PKU_ROWS = [
    {
        "prompt": prompt,
        "response_0": "first",
        "response_1": "second",
        "prompt_source": "x",
        "is_response_0_safe": safe,
        "is_response_1_safe": not safe,
        "better_response_id": 0 if safe else 1,
        "safer_response_id": 1 - int(safe),
    }
    for prompt, safe in (("p", True), ("q", False), ("p", True))
]
HH_ROWS = [
    {
        "chosen": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why?\n\nAssistant: Because it is.",
        "rejected": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why?\n\nAssistant:",
    },
    {"chosen": "\n\nHuman: Hi\n\nAssistant: a", "rejected": "\n\nHuman: Hello\n\nAssistant: b"},
    {"chosen": "\n\nHuman: Hi\n\nHuman: Ho\n\nAssistant: a", "rejected": "\n\nHuman: Hi\n\nHuman: Ho\n\nAssistant: b"},
    {"chosen": "\n\nHuman: Hi\n\nAssistant: a", "rejected": "\n\nHuman: Hi\n\nAssistant: b"},
]


@pytest.mark.parametrize("name", [name for name in RawDataset.names() if name.startswith("PKU-")])
def test_safe_rlhf(name, write_rows, tokenizer):
    path = write_rows("rows.jsonl", PKU_ROWS)
    raw = RawDataset.load(name, path=path)
    assert raw[1] == {
        "input": "q",
        "answer": "first",
        "other_answer": "second",
        "better": False,
        "safer": False,
        "is_safe": False,
        "is_other_safe": True,
    }
    pairs = PreferenceDataset(f"{name}:1:{path}", tokenizer)
    assert tokenizer.decode(pairs[1]["better_input_ids"]).endswith("second<|im_end|>")
    safety = SafetyPreferenceDataset(f"{name}:1:{path}", tokenizer)
    for item, answer in zip(safety, ("first", "second", "first"), strict=True):
        assert (item["safer_safety_sign"], item["unsafer_safety_sign"]) == (1, -1)
        assert tokenizer.decode(item["safer_input_ids"]).endswith(f"{answer}<|im_end|>")
    prompts = PromptOnlyDataset(f"{name}:1:{path}", tokenizer)
    assert [item["sample"]["input"] for item in prompts] == ["p", "q"]
    assert prompts.report.duplicates == 1


def test_alpaca(write_rows, tokenizer):
    rows = [{"instruction": "Add", "input": "1 2", "output": "3", "text": "."}]
    rows += [{"instruction": "Wave", "input": "", "output": "o/", "text": "."}]
    path = write_rows("alpaca.json", rows)
    raw = RawDataset.load("tatsu-lab/alpaca", path=path)
    assert list(raw) == [{"input": "Add 1 2", "answer": "3"}, {"input": "Wave", "answer": "o/"}]
    with pytest.raises(DataError, match=rf"dataset 'alpaca', sample 0, file {path}: field 'other_answer' is missing"):
        PreferenceDataset({"hh-excerpt/test": 1.0, "alpaca": {"path": path}}, tokenizer)


@pytest.mark.parametrize("name", [name for name in RawDataset.names() if name.startswith("hh-rlhf/")])
def test_hh_from_a_copy_of_the_repository(name, tmp_path):
    _, subset, split = name.split("/")
    for folder in ("helpful-base", "helpful-online", "helpful-rejection-sampled", "harmless-base"):
        (tmp_path / folder).mkdir()
        for part in ("train", "test"):
            rows = HH_ROWS if (folder, part) == (subset, split) else []
            with gzip.open(tmp_path / folder / f"{part}.jsonl.gz", "wt") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
    raw = RawDataset.load(f"Anthropic/{name}", path=str(tmp_path))
    assert (len(raw), raw.skipped) == (2, 2)
    assert raw[0] == {"input": ["Hi", "Yes?", "Why?"], "answer": "Because it is.", "other_answer": "", "better": True}
    assert raw[1]["other_answer"] == "b" and "sample 3," in raw.describe(1)


def test_skipped_rows_are_reported(write_rows, tokenizer):
    path = write_rows("hh.jsonl", HH_ROWS)
    report = PreferenceDataset(f"hh-rlhf/helpful-base/train::{path}", tokenizer).report
    assert (report.kept, report.unusable) == (2, 2)
    assert report.summary().endswith("2 samples from hh-rlhf/helpful-base/train (2 unusable rows skipped)")


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_tldr_from_parquet_shards(split, tmp_path, tokenizer):
    for part in ("train", "valid", "test"):
        for shard in range(2):
            rows = [{"prompt": f"SUBREDDIT: r/x POST: {part} {shard}\nTL;DR:", "label": " A summary."}]
            file = tmp_path / "data" / f"{part}-0000{shard}-of-00002-abc.parquet"
            datasets.Dataset.from_list(rows).to_parquet(file)
    raw = RawDataset.load(f"tldr/{split}", path=str(tmp_path))
    assert [sample["input"][-14:].split("\n")[1] for sample in raw] == ["TL;DR:", "TL;DR:"]
    assert [f"{split} {shard}" in sample["input"] for shard, sample in enumerate(raw)] == [True, True]
    item = PromptOnlyDataset(f"tldr/{split}:1:{tmp_path}", tokenizer, template="plain", max_length=20)[0]
    assert item["prompt"].endswith("\nTL;DR:") and raw[0]["input"].endswith(item["prompt"])
    assert raw[0]["answer"] == "A summary."


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_tldr_comparisons(split, write_rows):
    path = write_rows("c.jsonl", [{"prompt": "POST: x\n", "chosen": "TL;DR: good", "rejected": "TL;DR:  bad"}])
    raw = RawDataset.load(f"tldr-comparisons/{split}", path=path)
    assert raw[0] == {"input": "POST: x\nTL;DR:", "answer": "good", "other_answer": "bad", "better": True}


def test_apo_formats(write_rows):
    transcript = "\n\nHuman: Hi\n\nAssistant: {}"
    rows = [
        {
            "text": ["q<sep>mid", "q<sep>best", "q<sep>worst"],
            "scores": [1.0, 2.5, -1.0],
            "query_id": "7",
            "type": "apo",
        },
        {"text": ["q<sep>a", "q<sep>b"], "scores": [1.0, 1.0], "query_id": "8", "type": "apo"},
        {"text": ["\n\nHuman: Hi\n\nAssistant: <sep>a", "\n\nHuman: Hi\n\nAssistant: <sep>b"], "scores": [0.0, 1.0]},
    ]
    raw = RawDataset.load("apo", path=write_rows("apo.json", rows))
    assert (len(raw), raw.skipped) == (2, 1)
    assert raw[0] == {
        "input": ["q"],
        "answer": "best",
        "other_answer": "worst",
        "better": True,
        "answers": ["mid", "best", "worst"],
        "scores": [1.0, 2.5, -1.0],
        "query_id": "7",
        "type": "apo",
    }
    assert (raw[1]["input"], raw[1]["answer"]) == (["Hi"], "b")
    rows = [{"text": [transcript.format("x"), transcript.format("y")], "score": [1.0, 0.0]}]
    raw = RawDataset.load("dsp", path=write_rows("dsp.jsonl", rows))
    assert raw[0] == {
        "input": ["Hi"],
        "answer": "x",
        "other_answer": "y",
        "better": True,
        "answers": ["x", "y"],
        "scores": [1.0, 0.0],
    }


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": ["q<sep>a", "q<sep>b"], "scores": [1.0]}, "must be lists of the same length"),
        ({"text": ["q<sep>a", "q<sep>b"]}, "must be lists of the same length"),
    ],
)
def test_apo_faults_name_the_row(row, message, write_rows):
    path = write_rows("apo.jsonl", [{"text": ["q<sep>a", "q<sep>b"], "scores": [1.0, 0.0]}, row])
    with pytest.raises(DataError, match=rf"dataset 'apo', sample 1, file {path}: .*{message}"):
        RawDataset.load("apo", path=path)


@pytest.mark.parametrize("texts", [["qa", "q<sep>b"], ["p<sep>a", "q<sep>b"], ["\n\nHuman: q", "q<sep>b"]])
def test_apo_texts_that_are_no_pair_are_skipped(texts, write_rows):
    bad, good = {"text": texts, "scores": [1.0, 0.0]}, {"text": ["q<sep>a", "q<sep>b"], "scores": [1.0, 0.0]}
    raw = RawDataset.load("apo", path=write_rows("apo.jsonl", [bad, good]))
    assert (len(raw), raw.skipped, raw[0]["answer"]) == (1, 1, "a")
    path = write_rows("apo.json", [bad])
    with pytest.raises(DataError, match=f"dataset 'apo': none of the 1 rows of {path} is usable"):
        RawDataset.load("apo", path=path)


def test_embedded_excerpt():
    train, test = RawDataset.load("hh-excerpt/train"), RawDataset.load("hh-excerpt/test")
    assert len(train) >= 400 and len(test) == 80
    questions = [{sample["input"][0].lower() for sample in part} for part in (train, test)]
    assert not questions[0] & questions[1]
    for sample in [*train, *test]:
        assert sample["better"] is True and sample["answer"] != sample["other_answer"]
        assert len(sample["input"]) in (1, 3) and sum(len(turn.split()) for turn in sample["input"]) <= 42
    notice = (Path(train.path).parent / "NOTICE").read_text()
    assert "Copyright (c) 2022 Anthropic" in notice and "Permission is hereby granted" in notice


def test_hub_failure_names_the_way_out(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"hub repository 'tatsu-lab/alpaca' cannot be read .*alpaca:1.0:path") as info:
        RawDataset.load("alpaca")
    assert "\n" not in str(info.value)


def test_missing_column_names_sample_and_columns(write_rows, tokenizer):
    path = write_rows("rows.jsonl", [{"instruction": "a", "output": "b"}, {"instruction": "c", "output": None}])
    with pytest.raises(DataError, match="sample 1, .*column 'output' is missing; the row has: instruction, output"):
        SupervisedDataset({"alpaca": {"path": path}}, tokenizer)
