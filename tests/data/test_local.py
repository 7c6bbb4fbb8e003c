"""The generic reader: layouts, file kinds, directories, faults."""

from __future__ import annotations

import datasets
import pytest

from data import DataError, PreferenceDataset, PromptOnlyDataset, RawDataset, SupervisedDataset

PAIR = {"input": ["q"], "answer": "a", "other_answer": "b", "better": True}
USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
OTHER = {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("row", "sample"),
    [
        (PAIR | {"safer": False, "is_safe": True, "is_other_safe": True, "x": 1},) * 2,
        ({"dialogue": ["q", "a"]}, {"dialogue": ["q", "a"]}),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, PAIR | {"input": "q"}),
        ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}, PAIR),
        ({"chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]}, PAIR),
        ({"prompt": [USER], "chosen": [ASSISTANT], "rejected": [OTHER]}, PAIR),
        ({"instruction": "do", "input": "it", "output": "a"}, {"input": "do\nit", "answer": "a"}),
        ({"input": "q", "output": "a"}, {"input": "q", "answer": "a"}),
        ({"prompt": "q", "completion": "a"}, {"input": "q", "answer": "a"}),
        ({"prompt": "q", "response": "a", "reward": 0.5}, {"input": "q", "answer": "a", "reward": 0.5}),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "reward": 2, "other_reward": -1},
            PAIR | {"input": "q", "reward": 2, "other_reward": -1},
        ),
        ({"prompt": "\n\nHuman: q\n\nAssistant:"}, {"input": ["q"]}),
        ({"prompt": "q"}, {"input": "q"}),
        ({"messages": [USER]}, {"input": ["q"]}),
        ({"messages": [USER, ASSISTANT]}, {"dialogue": ["q", "a"], "input": ["q"], "answer": "a"}),
        ({"messages": [{"role": "system", "content": "s"}, USER]}, {"system": "s", "input": ["q"]}),
        ({"conversations": [{"from": "human", "value": "q"}]}, {"input": ["q"]}),
    ],
)
def test_layouts(row, sample, write_rows):
    raw = RawDataset.load("local", path=write_rows("rows.jsonl", [row]))
    assert raw[0] == {key: value for key, value in sample.items() if key != "x"}


@pytest.mark.parametrize("suffix", ["csv", "parquet", "json", "jsonl"])
def test_file_kinds(suffix, tmp_path, tokenizer):
    rows = [{"input": f"q{n}", "answer": "a", "other_answer": "b", "better": n % 2} for n in range(4)]
    table, file = datasets.Dataset.from_list(rows), tmp_path / f"rows.{suffix}"
    {"csv": table.to_csv, "parquet": table.to_parquet}.get(suffix, table.to_json)(file)
    raw = RawDataset.load("local", path=str(file))
    assert [sample["better"] for sample in raw] == [False, True, False, True]
    assert len(PreferenceDataset(f"local:0.5:{file}", tokenizer)) == 2


def test_directory_and_saved_data_set(tmp_path, write_rows):
    write_rows("d/a.jsonl", [{"prompt": "one"}])
    write_rows("d/b.jsonl", [{"prompt": "two"}])
    assert [sample["input"] for sample in RawDataset.load("local", path=str(tmp_path / "d"))] == ["one", "two"]
    table = datasets.Dataset.from_list([{"instruction": "x", "input": "", "output": "y"}])
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=table).save_to_disk(tmp_path / "dict")
    assert [RawDataset.load("alpaca", path=str(tmp_path / kind))[0]["answer"] for kind in ("one", "dict")] == [
        "y",
        "y",
    ]
    with pytest.raises(DataError, match="has no split 'test', only train"):
        RawDataset.load("PKU-SafeRLHF/test", path=str(tmp_path / "dict"))


def test_local_needs_a_path():
    with pytest.raises(DataError, match="dataset 'local' needs a path: local:1.0:path"):
        RawDataset.load("local")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("absent.json", None, "file .*absent.json does not exist"),
        ("rows.txt", "x", "rows.txt is none of .json, .jsonl, .csv, .parquet"),
        ("rows.json", "", "is empty, file .*rows.json"),
        ("rows.jsonl", '{"prompt": "a"}\n{"prompt": \n', "cannot be read, file .*rows.jsonl, line 2: Expecting value"),
        ("rows.json", '[{"prompt": "a"},\n{"prompt" "b"}]', "file .*rows.json, line 2: Expecting ':' delimiter"),
        ("rows.parquet", "not parquet", "cannot be read, file .*rows.parquet: "),
        ("rows.csv", 'a,b\n"open', "cannot be read, file .*rows.csv: "),
    ],
)
def test_unreadable_files(name, text, message, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=f"dataset 'local'.*{message}") as info:
        RawDataset.load("local", path=str(tmp_path / name))
    assert "\n" not in str(info.value)


def test_empty_tables(tmp_path, tokenizer):
    (tmp_path / "rows.json").write_text("[]")
    (tmp_path / "rows.csv").write_text("prompt,chosen\n")
    for name in ("rows.json", "rows.csv"):
        with pytest.raises(DataError, match=f"'local' .*{name}"):
            PromptOnlyDataset({"local": {"path": str(tmp_path / name)}}, tokenizer)
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="has no .json, .jsonl, .csv, .parquet file"):
        RawDataset.load("local", path=str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"foo": 1}, "columns foo are in no known layout; known: RawSample's fields"),
        (
            {"messages": [ASSISTANT]},
            "must alternate user and assistant texts, starting with the user; roles: assistant",
        ),
        ({"messages": []}, "'messages' must be a list"),
        ({"prompt": [USER, ASSISTANT]}, "'prompt' must end with a user message"),
        ({"chosen": "x", "rejected": "y"}, "are no transcripts that differ in the last answer only"),
        ({"chosen": [USER, ASSISTANT], "rejected": [ASSISTANT]}, "starting with the user"),
        ({"chosen": [USER], "rejected": [USER]}, "are no message lists that differ"),
        ({"input": ["a", "b"], "answer": "c"}, "field 'input' must be a text or an odd number of texts"),
        ({"answer": "c", "dialogue": ["a"]}, "field 'dialogue' must be an even number of texts"),
        ({"input": "a"}, "field 'answer' is missing; SupervisedDataset needs input and answer, or dialogue"),
        ({"input": "a", "answer": 3}, "field 'answer' must be a text, got 3"),
    ],
)
def test_faulty_rows_name_data_set_index_and_file(row, message, write_rows, tokenizer):
    path = write_rows("rows.jsonl", [row])
    with pytest.raises(DataError, match=f"dataset 'local', sample 0, file {path}: .*{message}") as info:
        SupervisedDataset(f"local:1:{path}", tokenizer)
    assert "\n" not in str(info.value)


def test_flag_of_the_wrong_type(write_rows, tokenizer):
    path = write_rows("rows.jsonl", [PAIR | {"better": "yes"}])
    with pytest.raises(DataError, match="field 'better' must be true or false, got 'yes'"):
        PreferenceDataset(f"local:1:{path}", tokenizer)
