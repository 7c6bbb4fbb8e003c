"""APO's files: what is written is read again, and what is malformed is refused in one line that says where."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment.apo.files import index_by_query, read_answers, read_items, write_items
from alignment.apo.schemas import Comparison, Golden, Samples, Scores, Selected
from alignment.runtime.faults import UsageError
from data import RawDataset
from data.builtin.apo import split_text

TEXT = st.text(max_size=20)
NUMBER = st.floats(allow_nan=False, allow_infinity=False)
QUERY_ID = st.text(min_size=1, max_size=8)
QUERY = st.text(min_size=1, max_size=20).filter(lambda text: text.strip() and "<sep>" not in text)
KEYS = st.integers(0, 20).map("sample_{}".format)
MORE = st.dictionaries(st.sampled_from(["source", "note", "gpt4"]), TEXT | st.none() | st.lists(st.integers()))


@st.composite
def selected(draw):
    answers = draw(st.dictionaries(KEYS, TEXT, min_size=1, max_size=4))
    keys = draw(st.lists(st.sampled_from(sorted(answers)), unique=True))
    target, scores = draw(st.sampled_from(sorted(answers.values()))), {key: draw(NUMBER) for key in keys}
    columns = {"target": target, "scores": scores}
    return {"query_id": draw(QUERY_ID), "query": draw(QUERY), **answers, **columns, **draw(MORE)}


@st.composite
def comparison(draw):
    query, answers = draw(QUERY), draw(st.lists(TEXT, min_size=1, max_size=4))
    text = [f"{query}<sep>{answer}" for answer in answers]
    columns = {"text": text, "scores": [draw(NUMBER) for _ in text]}
    return columns | draw(st.sampled_from([{}, {"type": "apo"}])) | draw(st.sampled_from([{}, {"query_id": "a:b"}]))


KINDS = {
    Golden: st.fixed_dictionaries({"query_id": QUERY_ID, "golden": TEXT}, optional={"query": QUERY}),
    Selected: selected(),
    Comparison: comparison(),
    Scores: st.dictionaries(st.builds("{}:{}".format, QUERY_ID, KEYS), NUMBER, min_size=1),
}


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("schema", KINDS)
def test_what_is_written_is_read_again(tmp_path, schema, suffix):
    @given(st.lists(KINDS[schema], min_size=1, max_size=4))
    def check(rows):
        path = tmp_path / f"file.{suffix}"
        write_items(path, rows)
        entries = read_items(path, schema)
        assert [entry.item.to_json() for entry in entries] == rows
        place = "{0}, item {1} (line {2})" if suffix == "json" else "{0}, line {1}"
        assert [entry.where for entry in entries] == [place.format(path, i + 1, i + 2) for i in range(len(rows))]

    check()


def test_the_original_tools_files_are_read(tmp_path):
    """Indented arrays, numbers for ids, "instruction" for the query, columns that nobody here knows."""
    path = tmp_path / "alpaca.sample.json"
    rows = [
        {"query_id": 7, "instruction": "Say cat", "sample_0": "cat", "sample_1": "dog", "gpt4": "a cat"},
        {"query_id": "b", "query": "Say owl", "sample_0": "owl"},
    ]
    path.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    first, second = read_answers(path)
    assert first.item.to_json() == {
        "query_id": "7", "query": "Say cat", "sample_0": "cat", "sample_1": "dog", "gpt4": "a cat"
    }  # fmt: skip
    assert second.item.to_json() == rows[1]
    assert (first.where, second.where) == (f"{path}, item 1 (line 2)", f"{path}, item 2 (line 9)")


def test_the_original_tools_selections_are_read(tmp_path):
    """Which score the answer that people preferred, too, in a column of its own."""
    row = {"query_id": "7", "query": "q", "sample_0": "cat", "sample_1": "dog", "hh_best": "owl", "target": "owl",
           "scores": {"sample_0": 0.5, "sample_1": -1.0, "hh_best": 2.0}}  # fmt: skip
    path = tmp_path / "rjs.json"
    path.write_text(json.dumps([row]), encoding="utf-8")
    (entry,) = read_items(path, Selected)
    assert entry.item.to_json() == row
    (sample,) = RawDataset.load("apo-samples", path=str(path))
    assert (sample["answers"], sample["scores"], sample["answer"]) == (["cat", "dog"], [0.5, -1.0], "owl")


GOOD = '{"query_id": "0", "query": "q", "sample_0": "a"}\n'
MALFORMED = {  # name: (schema, text, what the line must say)
    "no JSON": (Samples, GOOD + "{oops}\n", "line 2: no JSON: Expecting property name"),
    "cut short": (Samples, GOOD + GOOD[:-9], "line 2: no JSON"),
    "two objects on a line": (Samples, GOOD[:-1] + GOOD, "line 1: more than one JSON object"),
    "no object": (Samples, "\n\n3\n", "line 3: 3 is no JSON object"),
    "empty": (Samples, "\n", "has no items"),
    "empty array": (Samples, "[ ]", "has no items"),
    "array without end": (Samples, f"[{GOOD},", "item 2 (line 2): no JSON"),
    "array without comma": (Samples, f"[\n{GOOD}{GOOD}]", "item 1 (line 2): a ',' or ']' is missing"),
    "text behind an array": (Samples, f"[{GOOD}] {GOOD}", "text follows the end of its array"),
    "fault deep in an array": (Samples, f"[{GOOD},\n\n{GOOD},{{}}]", 'item 3 (line 5): field "query_id": missing'),
    "field twice": (Samples, '{"query_id": "0", "query_id": "1"}', 'line 1: field "query_id": given twice'),
    "no id": (Samples, '{"query": "q", "sample_0": "a"}', '"query_id": missing; the item has: query, sample_0'),
    "id of another type": (Samples, GOOD.replace('"0"', "1.5"), 'field "query_id": 1.5 is not allowed'),
    "flag for an id": (Samples, GOOD.replace('"0"', "true"), 'field "query_id": True is not allowed'),
    "no query": (Samples, '{"query_id": 3, "sample_0": "a"}', 'field "query": missing'),
    "blank query": (Samples, GOOD.replace('"q"', '" "'), """field "query": ' ' is not allowed: a query is a text"""),
    "separator in a query": (Samples, GOOD.replace('"q"', '"q<sep>r"'), "has no '<sep>'"),
    "no answers": (Samples, '{"query_id": 3, "query": "q"}', '"sample_*": missing; the item has: query_id, query'),
    "answer of another type": (Samples, GOOD.replace('"a"', "null"), 'field "sample_0": None is not allowed'),
    "answer without number": (Samples, GOOD.replace("sample_0", "sample_a"), 'field "sample_a": '),
    "no golden answer": (Golden, '{"query_id": 3, "gold": "a"}', '"golden": missing; the item has: query_id, gold'),
    "a text that is no list": (Comparison, '{"text": "q<sep>a", "scores": [1]}', 'field "text"'),
    "text without answer": (Comparison, '{"text": ["q"], "scores": [1]}', """field "text.0": 'q' is not allowed"""),
    "scores for others": (Comparison, '{"text": ["q<sep>a"], "scores": [1, 2]}', "a number for each entry of 'text'"),
    "two queries": (Comparison, '{"text": ["q<sep>a", "r<sep>a"], "scores": [1, 2]}', "which must have one query"),
    "score of another type": (Comparison, '{"text": ["q<sep>a"], "scores": ["1"]}', """field "scores.0": '1' is"""),
    "score without key": (Scores, '{"3": 1.0}', """field "3": '3' is not allowed: the name of a score is"""),
    "score that is no number": (Scores, '{"3:sample_0": "1"}', """field "3:sample_0": '1' is not allowed"""),
    "score that is not finite": (Scores, '{"3:sample_0": NaN}', "NaN is not a JSON number"),
    "score beyond numbers": (Scores, '{"3:sample_0": 1e999}', 'field "3:sample_0": inf is not allowed'),
    "target that nobody gave": (Selected, GOOD[:-2] + ', "target": "b", "scores": {}}', "'target' must be one of"),
    "score of no answer": (Selected, GOOD[:-2] + ', "target": "a", "scores": {"sample_1": 1}}', "'scores' must name"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files_are_refused_with_place_and_field(tmp_path, name):
    schema, text, message = MALFORMED[name]
    path = tmp_path / "file.jsonl"
    path.write_text(text)
    with pytest.raises(UsageError) as fault:
        read_items(path, schema)
    assert str(fault.value).startswith(str(path)) and message in str(fault.value) and "\n" not in str(fault.value)


def test_what_is_no_text_file_and_what_has_no_answers(tmp_path):
    path = tmp_path / "file.jsonl"
    with pytest.raises(UsageError, match="file.jsonl: No such file"):
        read_answers(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not a UTF-8 text file"):
        read_answers(path)
    path.write_text('{"query": "q"}')
    with pytest.raises(UsageError, match='line 1: has no answers: one of the columns "sample_0", "golden" and "text"'):
        read_answers(path)


def test_one_query_id_for_two_items(tmp_path):
    path = tmp_path / "file.jsonl"
    path.write_text(GOOD + GOOD.replace('"0"', '"1"') + GOOD)
    found, repeated = index_by_query(read_items(path, Samples))
    assert list(found) == ["0", "1"] and repeated == 1
    path.write_text(GOOD + GOOD.replace('"a"', '"b"'))
    with pytest.raises(UsageError, match=r"line 2: field \"query_id\": '0' names another item too \(.*line 1\)"):
        index_by_query(read_items(path, Samples))


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.json"
    write_items(path, [{"a": 1}])
    with pytest.raises(ValueError):
        write_items(path, [{"a": float("nan")}])
    assert json.loads(path.read_text()) == [{"a": 1}] and [one.name for one in tmp_path.iterdir()] == ["file.json"]
    (tmp_path / "taken").write_text("")
    with pytest.raises(UsageError, match="taken/file.json: cannot be written"):
        write_items(tmp_path / "taken" / "file.json", [])


def test_comparisons_split_into_the_query_and_its_answers():
    item = Comparison(text=["\n\nHuman: Hi\n\nAssistant:<sep> a", "\n\nHuman: Hi\n\nAssistant: b"], scores=[1, 0])
    assert [split_text(text) for text in item.text] == [(["Hi"], "a"), (["Hi"], "b")]
