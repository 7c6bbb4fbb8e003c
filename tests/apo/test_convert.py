"""Golden answers over samples, against what the original tool writes for files of its schema, worked by hand."""

from __future__ import annotations

import json
import sys
from collections import Counter

import pytest

from alignment.apo.convert import convert, cut, main, read_golden
from alignment.apo.files import Placed, read_items
from alignment.apo.queries import QueryDataset, load_queries, read_queries
from alignment.apo.schemas import Comparison, Golden, Samples
from alignment.ppo.models.tokenizer import load_tokenizer
from alignment.runtime.faults import UsageError
from data import ComparisonDataset, DataError, PromptOnlyDataset, RawDataset
from data.builtin.apo import query_turns
from tests.stages import write_tokenizer

QUERY = "\n\nHuman: Name a bird.\n\nAssistant: "
SAMPLES = [
    {"query_id": 12, "query": QUERY, "sample_0": " An owl. ", "sample_1": "Owl\n\nHuman: And now?\n\nAssistant: Cod",
     "sample_2": "A dog.", "sample_3": "Human birds sing.\nHuman: x\nHuman: y"},
    {"query_id": "a:b", "instruction": "Say cat", "sample_0": "dog", "sample_1": "cat"},
]  # fmt: skip
GOLDEN = [{"query_id": "a:b", "golden": "cat\nHuman: dog"}, {"query_id": 12, "golden": "The owl is one.\n"}]
TEXTS = [
    ("12", [QUERY + "<sep>The owl is one.", QUERY + "<sep>An owl."]),
    ("12", [QUERY + "<sep>The owl is one.", QUERY + "<sep>Owl"]),
    ("12", [QUERY + "<sep>The owl is one.", QUERY + "<sep>A dog."]),
    ("12", [QUERY + "<sep>The owl is one.", QUERY + "<sep>Human birds sing."]),
    ("a:b", ["Say cat<sep>cat", "Say cat<sep>dog"]),
]
PAIRS = [{"text": text, "scores": [1.0, 0.0], "type": "apo", "query_id": query_id} for query_id, text in TEXTS]


def place(schema, rows):
    return [Placed(schema.model_validate(row), f"line {i + 1}") for i, row in enumerate(rows)]


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, words)])
    main()


@pytest.fixture
def files(tmp_path):
    for name, rows in (("golden", GOLDEN), ("samples", SAMPLES)):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows, indent=2), encoding="utf-8")
    paths = [tmp_path / name for name in ("golden.json", "samples.json", "o.json")]
    return "--golden", paths[0], "--samples", paths[1], "--output", paths[2]


def test_all_pairs_of_the_original_tool(files, monkeypatch, capsys):
    run(monkeypatch, *files)
    assert json.loads(files[-1].read_text()) == PAIRS
    assert capsys.readouterr().out == f"{files[-1]}: 5 comparisons (1 samples equal to the golden answer left out)\n"
    raw = RawDataset.load("apo", path=str(files[-1]))
    assert raw[0] | {"type": "apo", "query_id": "12", "answers": ["The owl is one.", "An owl."]} == raw[0]
    write_tokenizer(files[-1].parent / "tokenizer")
    items = ComparisonDataset(f"apo:1.0:{files[-1]}", load_tokenizer(files[-1].parent / "tokenizer"))
    assert [(item["is_apo"], item["scores"].tolist()) for item in items] == [(True, [1.0, 0.0])] * 5
    queries = QueryDataset(read_queries(files[3]), items.tokenizer)
    for item, query in zip(items, [queries[0]] * 4 + [queries[1]], strict=True):
        for row in item["input_ids"]:  # the reward model reads the prompt that the policy answered
            assert row[: item["prompt_length"]].tolist() == query["input_ids"].tolist()


def test_one_sample_a_query_by_the_seed(files, monkeypatch):
    chosen = []
    for seed in range(20):
        run(monkeypatch, *files, "--sampling", "--seed", seed)
        rows = json.loads(files[-1].read_text())
        assert len(rows) == 2 and rows[0] in PAIRS[:4] and rows[1] == PAIRS[4]
        chosen.append(PAIRS.index(rows[0]))
    assert set(chosen) == {0, 1, 2, 3}
    run(monkeypatch, *files, "--sampling", "--seed", 3)
    assert json.loads(files[-1].read_text())[0] == PAIRS[chosen[3]]


def test_answers_end_where_the_next_human_turn_begins():
    assert cut("a\nHuman: b\nHuman: c") == "a" and cut("\n\nHuman: b") == "" and cut(" a Human \n") == "a Human"


def test_what_does_not_match_is_counted():
    others = [{"query_id": "x", "golden": "y"}, {"query_id": "e", "golden": "\nHuman: "}]
    golden = place(Golden, [*GOLDEN, GOLDEN[0], *others])
    more = [{"query_id": "z", "query": "q", "sample_0": "a"}, {"query_id": "e", "query": "q", "sample_0": "a"}]
    samples = place(Samples, [*SAMPLES, *more, SAMPLES[1] | {"query_id": "n"}])
    golden.append(Placed(Golden(query_id="n", golden="bird"), "line 6"))
    samples[-1].item.answers["sample_1"] = " "
    converted = convert(golden, samples)
    assert [one.to_json() for one in converted.comparisons[:5]] == PAIRS and len(converted.comparisons) == 7
    assert converted.comparisons[6].text[1] == "Say cat<sep>"
    assert +converted.counts == Counter({
        "repeated items left out": 1, "golden answers without samples": 1, "queries without a golden answer": 1,
        "empty golden answers left out": 1, "samples equal to the golden answer left out": 1, "empty samples": 1,
    })  # fmt: skip


def test_what_contradicts_itself_is_refused():
    samples = place(Samples, SAMPLES)
    with pytest.raises(UsageError, match="line 2: field \"query_id\": '12' names another item too"):
        convert(place(Golden, [GOLDEN[1], GOLDEN[1] | {"golden": "other"}]), samples)
    with pytest.raises(UsageError, match='line 1: field "query": differs from that of the golden answer .*line 1'):
        convert(place(Golden, [GOLDEN[1] | {"query": "Name a fish."}]), samples)
    with pytest.raises(UsageError, match="no comparison is left: 1 golden answers without samples, 2 queries without"):
        convert(place(Golden, [{"query_id": "x", "golden": "y"}]), samples)


def test_better_answers_of_a_data_set_stand_in_for_golden_ones(tmp_path, monkeypatch):
    rows = [{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(6)]
    rows.insert(3, rows[1] | {"chosen": "another"})  # the prompt of row 1 again
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    golden = read_golden(f"local:1.0:{path}", 42)
    places = (0, 1, 2, 4, 5, 6)
    assert [(one.item.query_id, one.item.golden, one.item.query) for one in golden] == [
        (f"local/{place}", f"good {i}", f"q{i}") for i, place in enumerate(places)
    ]
    half = read_golden(f"local:0.5:{path}", 42)
    assert len(half) == 3 and {one.item.query_id for one in half} < {one.item.query_id for one in golden}
    assert read_golden(f"local:2.5:{path}", 42) == golden
    excerpt, lengths = RawDataset.load("hh-excerpt/test"), set()
    for item in (one.item for one in read_golden("hh-excerpt/test:20/-1", 42)):
        sample = excerpt[int(item.query_id.removeprefix("hh-excerpt/test/"))]
        assert item.golden == sample["answer"] and query_turns(item.query) == sample["input"]
        lengths.add(len(sample["input"]))
    assert lengths == {1, 3}
    run_path = tmp_path / "s.jsonl"
    run_path.write_text(json.dumps({"query_id": "local/4", "query": "q3", "sample_0": "sample"}))
    run(monkeypatch, "--golden", f"local:1.0:{path}", "--samples", run_path, "--output", tmp_path / "o.jsonl")
    (entry,) = read_items(tmp_path / "o.jsonl", Comparison)
    assert entry.item.text == ["q3<sep>good 3", "q3<sep>sample"] and entry.item.query_id == "local/4"


def test_the_authors_chain_by_their_names(tmp_path, monkeypatch):
    """Comparisons with a query_id, sampled as a file or as a data set; golden answers without queries; converted."""
    transcript = "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Name a fish.\n\nAssistant:"
    rows = [
        {"text": ["Name a bird.<sep>owl", "Name a bird.<sep>dog"], "scores": [1.0, 0.0], "query_id": "3"},
        {"text": [f"{transcript}<sep>cod", f"{transcript}<sep>cat"], "scores": [0.0, 1.0], "query_id": "b:1"},
        {"text": ["Name a bird.<sep>hen", "Name a bird.<sep>cow"], "scores": [1.0, 0.0], "query_id": "3"},
    ]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    expected = [("3", "Name a bird.", ["Name a bird."]), ("b:1", transcript, ["Hi.", "Hello.", "Name a fish."])]
    for queries in (read_queries(tmp_path / "train.json"), load_queries(f"apo:1.0:{tmp_path / 'train.json'}", 0)):
        assert [query[:3] for query in queries] == expected
    golden = [{"query_id": "b:1", "golden": "A codfish."}, {"query_id": 3, "golden": "An owl."}]
    (tmp_path / "golden.json").write_text(json.dumps(golden))
    ours = read_queries(tmp_path / "golden.json", tmp_path / "train.json")
    assert [query[:3] for query in ours] == expected[::-1]
    samples = [{"query_id": query.query_id, "query": query.text, "sample_0": "x"} for query in ours]
    (tmp_path / "samples.json").write_text(json.dumps(samples))
    files = ("--golden", tmp_path / "golden.json", "--samples", tmp_path / "samples.json")
    run(monkeypatch, *files, "--output", tmp_path / "apo.json")
    texts = [one["text"] for one in json.loads((tmp_path / "apo.json").read_text())]
    assert texts == [
        [f"{transcript}<sep>A codfish.", f"{transcript}<sep>x"], ["Name a bird.<sep>An owl.", "Name a bird.<sep>x"],
    ]  # fmt: skip


def test_prompts_of_several_files_have_names_of_their_own(tmp_path):
    for name in ("a", "b"):
        row = {"text": [f"Name {name}.<sep>owl", f"Name {name}.<sep>dog"], "scores": [1, 0]}
        (tmp_path / f"{name}.json").write_text(json.dumps([row]))
    queries = load_queries(",".join(f"apo:1.0:{tmp_path / name}.json" for name in ("a", "b")), 0)
    assert [query.query_id for query in queries] == ["apo:a.json/0", "apo:b.json/0"]


def test_a_comparison_without_a_name_is_no_query(tmp_path):
    (tmp_path / "pairs.json").write_text('{"text": ["q<sep>a", "q<sep>b"], "scores": [1, 0]}')
    with pytest.raises(UsageError, match='pairs.json, line 1: field "query_id": missing; a prompt needs a name'):
        read_queries(tmp_path / "pairs.json")


def test_queries_of_a_data_set_are_those_of_ppo(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer, mixture = load_tokenizer(tmp_path), "hh-excerpt/train:0.3,hh-excerpt/test:5/-1"
    ours = QueryDataset(load_queries(mixture, seed=7), tokenizer, max_length=60)
    theirs = PromptOnlyDataset(mixture, tokenizer, max_length=60, seed=7)
    assert len(ours) == len(theirs) == 129 and ours.report.shortened == theirs.report.shortened > 0
    for one, other in zip(ours, theirs, strict=True):
        assert one["prompt"] == other["prompt"] and one["prompt_id"] == other["prompt_id"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q"}, "field 'answer' is missing"),
        ({"input": 3, "answer": "a"}, "field 'input' must be a text or a list of texts, got 3"),
        ({"input": "q", "system": "Be kind.", "answer": "a"}, "field 'system': APO's files have no place"),
        ({"input": "Human: q<sep>", "answer": "a"}, "cannot hold the prompt"),
        ({"input": ["a", "b\n\nHuman: c", "d"], "answer": "a"}, "cannot hold the prompt"),
    ],
)
def test_prompts_that_the_files_cannot_hold(tmp_path, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises((UsageError, DataError), match=f"sample 0, file {path}: {message}|{message}"):
        read_golden(f"local:1.0:{path}", 42)


def test_a_golden_file_that_is_not_there():
    with pytest.raises(UsageError, match="--golden nowhere.json: no such file"):
        read_golden("nowhere.json", 42)
    with pytest.raises(DataError, match="unknown dataset 'hh-excerp/train'"):
        read_golden("hh-excerp/train", 42)
