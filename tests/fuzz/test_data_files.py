"""Data files in every format, through the real readers and the tokenised data sets: samples, or one line."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import tempfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from alignment.apo.convert import convert
from alignment.apo.files import read_answers, read_items
from alignment.apo.schemas import Comparison, Golden, Samples, Scores, Selected
from alignment.apo.selection import MODES, read_scores, select
from alignment.runtime.faults import UsageError
from data import ComparisonDataset, DataError, PreferenceDataset, PromptOnlyDataset, RawDataset, SupervisedDataset
from tests.fuzz.campaign import assert_one_line, fuzz
from tests.fuzz.documents import DEEP, VALUES, changed, damaged, dump

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
TRANSCRIPT = "\n\nHuman: q\n\nAssistant: a"
ROWS = [
    {"input": ["q"], "answer": "a", "other_answer": "b", "better": True, "safer": False, "is_safe": True, "reward": 1},
    {"prompt": "q", "chosen": "a", "rejected": "b"},
    {"chosen": TRANSCRIPT, "rejected": TRANSCRIPT + "b"},
    {"prompt": [USER], "chosen": [ANSWER], "rejected": [{"role": "assistant", "content": "b"}]},
    {"messages": [{"role": "system", "content": "s"}, USER, ANSWER]},
    {"instruction": "do", "input": "it", "output": "a"},
    {"dialogue": ["q", "a"], "system": "s"},
    {"text": ["q<sep>a", "q<sep>b"], "scores": [1.0, 0.0], "type": "apo", "query_id": "1"},
    {"query_id": "1", "query": "q", "sample_0": "a", "sample_1": "b", "scores": {"sample_0": 1.0}, "target": "a"},
    {"query_id": 1, "golden": "a", "instruction": "q"},
    {"prompt": "q", "response_0": "a", "response_1": "b", "is_response_0_safe": True, "better_response_id": 0},
    {"1:sample_0": 1.0, "1:sample_1": 2},
]
NAMES = ["local", "apo", "apo-samples", "alpaca", "hh-rlhf/helpful-base/train", "PKU-SafeRLHF/train", "tldr/train",
         "tldr-comparisons/train"]  # fmt: skip
UNUSUAL = [
    pa.array([b"\xff", None]),
    pa.array([1, 2]).cast(pa.date64()),
    pa.array([1, 2]).cast(pa.timestamp("us")),
    pa.array([1, 2]).cast(pa.decimal128(29, 2)),
    pa.array([1.5, 2]).cast(pa.float32()),
    pa.nulls(2),
    pa.array(["a", "b"]).dictionary_encode(),
    pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int64())),
    pa.array(["a", "b"], pa.large_string()),
    pa.array([[1.0, 2.0], None], pa.list_(pa.float64(), 2)),
    pa.array([{"content": "q", "role": None}, {"content": b"x"}][:1] * 2),
]
KINDS = (SupervisedDataset, PreferenceDataset, ComparisonDataset, PromptOnlyDataset)
keys = st.sampled_from(sorted({key for row in ROWS for key in row})) | st.text(max_size=6)
rows = changed(st.sampled_from(ROWS), keys)
tables = st.lists(rows, min_size=1, max_size=3)
lines = tables.map(lambda rows: "".join(dump(row) + "\n" for row in rows))
arrays = tables.map(dump)
names, kinds = st.sampled_from(NAMES), st.sampled_from(KINDS)


class Bytes:
    """A tokenizer of bytes, as strict as real ones: a text that is none is a TypeError."""

    eos_token, bos_token, pad_token, eos_token_id, pad_token_id, chat_template = "<e>", "<b>", "<p>", 256, 257, None

    def __call__(self, text, add_special_tokens=True):
        if not isinstance(text, str):
            raise TypeError("a tokenizer reads texts")
        return {"input_ids": list(text.encode())}


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    datasets.disable_caching()
    yield
    datasets.config.HF_DATASETS_CACHE = before
    datasets.enable_caching()


def read(content, suffix, name, kind):
    """A file through registry and data set."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        path = Path(folder, f"rows{suffix}")
        path.write_bytes(content)
        try:
            raw = RawDataset.load(name, path=str(path))
            assert all(isinstance(sample, dict) for sample in raw)
            kind([(raw, 1.0)], Bytes(), max_length=200, template="hh")
        except DataError as fault:
            assert_one_line(fault)


def read_tools(content):
    """A file through the schemas of APO's tools, and what they make of it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "items.jsonl")
        path.write_bytes(content)
        for schema in (Golden, Samples, Selected, Comparison, Scores):
            with expected():
                read_items(path, schema)
        with expected():
            read_answers(path)
        with expected():
            convert(read_items(path, Golden), read_items(path, Samples), sampling=True)
        for mode in MODES:
            with expected():
                chosen, _ = select(read_items(path, Samples), read_scores(read_items(path, Scores))[0], mode)
                json.dumps([item.to_json() for item in chosen], allow_nan=False)


@contextlib.contextmanager
def expected():
    try:
        yield
    except UsageError as fault:
        assert_one_line(fault)


def as_csv(rows):
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(rows[0])
    writer.writerows([str(cell) for cell in row.values()] for row in rows)
    return buffer.getvalue()


@st.composite
def parquet(draw):
    """A table of the rows' columns, or of types that JSON does not have."""
    columns = {}
    for row in draw(tables):
        for key, value in row.items():
            columns.setdefault(key, value)
    arrays = {}
    for key, value in columns.items():
        with contextlib.suppress(pa.ArrowException, OverflowError, UnicodeError, TypeError, ValueError):
            arrays[key] = pa.array([value] * 2)
    for key in draw(st.lists(keys, max_size=2)):
        arrays[key] = draw(st.sampled_from(UNUSUAL))
    buffer = io.BytesIO()
    with contextlib.suppress(pa.ArrowException, UnicodeError):
        pq.write_table(pa.table(arrays), buffer)
    return buffer.getvalue()


@st.composite
def bitten(draw, contents):
    """Bytes with a few changed or cut off."""
    content = bytearray(draw(contents))
    for _ in range(draw(st.integers(0, 3))):
        if content:
            content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(content[: len(content) - draw(st.sampled_from([0, 0, 0, 1, 9, 50]))])


@fuzz(80, 2500, content=damaged(lines | DEEP), name=names, kind=kinds)
def json_lines(content, name, kind):
    read(content, ".jsonl", name, kind)


@fuzz(30, 800, content=damaged(arrays | VALUES.map(dump) | DEEP), name=names, kind=kinds)
def json_arrays(content, name, kind):
    read(content, ".json", name, kind)


@fuzz(20, 500, content=bitten(damaged(lines).map(gzip.compress)), name=names, kind=kinds)
def packed(content, name, kind):
    read(content, ".jsonl.gz", name, kind)


@fuzz(20, 500, content=damaged(tables.map(as_csv)) | st.binary(max_size=100), name=names, kind=kinds)
def tables_of_text(content, name, kind):
    read(content, ".csv", name, kind)


@fuzz(40, 1200, content=bitten(parquet()), name=names, kind=kinds)
def columnar(content, name, kind):
    read(content, ".parquet", name, kind)


@fuzz(60, 1500, content=damaged(lines | arrays | DEEP) | st.binary(max_size=100))
def tools(content):
    read_tools(content)


test_json_lines, test_json_lines_full = json_lines
test_json_arrays, test_json_arrays_full = json_arrays
test_packed, test_packed_full = packed
test_tables_of_text, test_tables_of_text_full = tables_of_text
test_columnar, test_columnar_full = columnar
test_tools, test_tools_full = tools
