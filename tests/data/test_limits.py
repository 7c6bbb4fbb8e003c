"""Bombs: small files that would fill the memory, hang or kill the process, and files that are none."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
import zipfile

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import DataError, RawDataset, limits, text_tables
from data.columnar import expanded_bytes

ROW = json.dumps({"prompt": "q", "answer": "a"}) + "\n"


def zipped(name="rows.jsonl"):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, ROW)
    return buffer.getvalue()


def tarred():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("../../escaped"))
    return buffer.getvalue()


def refused(path):
    with pytest.raises(DataError) as fault:
        RawDataset.load("local", path=str(path))
    message = str(fault.value)
    assert "\n" not in message and str(path) in message and len(message) < 400
    return message


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("deep.jsonl", ROW.encode() + b'{"a":' + b"[" * 20_000 + b"]" * 20_000 + b"}\n", "line 2: lists and objects"),
        ("deep.json", b"[" * 200_000, "lists and objects are nested more than 64 deep"),
        ("deeper.jsonl", b'{"a":' * 65 + b"1" + b"}" * 65, "line 1: lists and objects are nested more than 64 deep"),
        ("digits.jsonl", b'{"a": 1' + b"0" * 100_000 + b"}", "line 1: a whole number has more than 4300 digits"),
        ("names.jsonl", b"".join(b'{"k%d": 1}\n' % k for k in range(1001)), "line 1001: the rows have more than 1000"),
        ("names.json", json.dumps([{f"k{k}": 1 for k in range(1001)}]).encode(), "item 1: the rows have more than"),
        ("wide.csv", b",".join(b"c%d" % k for k in range(1001)), "it has 1001 columns, more than 1000"),
        ("half.jsonl", b'{"prompt": "\\ud800"}', "line 1: a text has half of a surrogate pair"),
        ("numbers.jsonl", b"1\n2\n", "line 1: no JSON object, but 1"),
        ("numbers.json", b"[1, 2]", "item 1: no JSON object, but 1"),
        ("latin.csv", b"prompt\n\xe9\n", "line 2: not UTF-8 text"),
        ("archive.jsonl", zipped(), "not UTF-8 text"),
        ("archive.jsonl", tarred(), "line 1: "),
        ("archive.csv", zipped(), "not UTF-8 text"),
        ("archive.parquet", zipped(), "cannot be read"),
        ("archive.jsonl.gz", gzip.compress(zipped()), "not UTF-8 text"),
        ("plain.jsonl.gz", ROW.encode(), "Not a gzipped file"),
        ("short.jsonl.gz", gzip.compress(ROW.encode() * 99)[:-9], "end-of-stream"),
        ("damaged.jsonl.gz", gzip.compress(os.urandom(9999))[:5000] + b"x" * 5000, "cannot be read"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "content",  # its bytes have the time in them
)
def test_file_that_is_refused(name, content, reason, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert reason in refused(tmp_path / name)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "rows.jsonl.gz"])
def test_what_is_no_file(name, tmp_path):
    """Neither a pipe that nobody writes to nor a device that never ends is read."""
    os.mkfifo(tmp_path / name)
    assert "is no regular file" in refused(tmp_path / name)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    assert "is no regular file" in refused(tmp_path / name)


def test_lines_and_arrays_have_a_longest(tmp_path, monkeypatch):
    monkeypatch.setattr(text_tables, "LINE_BYTES", 20)
    monkeypatch.setattr(text_tables, "ARRAY_BYTES", 20)
    (tmp_path / "line.jsonl").write_text(ROW)
    assert "a line of more than 20 bytes" in refused(tmp_path / "line.jsonl")
    (tmp_path / "array.json").write_text(f"[{ROW}]")
    assert "a JSON array of more than 20 bytes; write one object a line" in refused(tmp_path / "array.json")


@pytest.fixture
def little(monkeypatch):
    monkeypatch.setattr(limits, "EXPANSION_BYTES", 1 << 20)


def table(rows, **columns):
    return pa.table({"prompt": ["q"] * rows, **columns})


def write_bomb(kind, path):
    """A file of a few KB that becomes tens of MB."""
    text = "x" * 20_000
    if kind in ("jsonl.gz", "csv.gz", "json.gz"):
        row = f"{json.dumps({'prompt': text})}\n" if kind != "csv.gz" else f"{text}\n"
        rows = row * 1000 if kind != "json.gz" else f"[{','.join([row] * 1000)}]"
        path.write_bytes(gzip.compress(rows.encode()))
    elif kind == "cells.jsonl":
        path.write_text("".join(f'{{"k{k}":1}}\n' for k in range(900)) + '{"k1":1}\n' * 9000)
    elif kind == "cells.csv":
        path.write_text(",".join(f"c{k}" for k in range(900)) + "\n" + "1\n" * 9000)
    elif kind == "dictionary.parquet":
        pq.write_table(table(1000, answer=[text] * 1000), path)
    elif kind == "compressed.parquet":
        values = [text + str(n) for n in range(1000)]
        pq.write_table(table(1000, answer=values), path, compression="zstd", use_dictionary=False)
    elif kind == "nested.parquet":
        messages = [[{"role": "user", "content": text}] * 3] * 400
        pq.write_table(table(400, messages=messages), path)
    elif kind == "nulls.parquet":
        pq.write_table(pa.table({f"c{n}": pa.nulls(100_000, pa.string()) for n in range(20)}), path)
    elif kind == "parquet.gz":
        pq.write_table(table(1000, answer=[text + str(n) for n in range(1000)]), path, use_dictionary=False,
                       compression="none")  # fmt: skip
        path.write_bytes(gzip.compress(path.read_bytes()))


@pytest.mark.parametrize(
    "kind",
    ["jsonl.gz", "json.gz", "csv.gz", "cells.jsonl", "cells.csv", "dictionary.parquet", "compressed.parquet",
     "nested.parquet", "nulls.parquet", "parquet.gz"],
)  # fmt: skip
def test_small_file_that_becomes_large(kind, tmp_path, little):
    path = tmp_path / f"rows.{kind}"
    write_bomb(kind, path)
    assert path.stat().st_size < 300_000
    assert "bytes become more than" in refused(path)


def test_saved_data_set_that_becomes_large(tmp_path, little):
    folder = tmp_path / "saved"
    datasets.Dataset.from_list([{"prompt": "q"}]).save_to_disk(folder)
    file = next(folder.glob("*.arrow"))
    rows = table(1000, answer=["x" * 20_000] * 1000)
    with pa.OSFile(str(file), "wb") as sink:
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.ipc.new_stream(sink, rows.schema, options=options) as writer:
            writer.write_table(rows)
    with pytest.raises(DataError, match="bytes become more than"):
        RawDataset.load("local", path=str(folder))


def test_measuring_a_table_counts_what_python_would_see(tmp_path):
    texts = ["a", "bc", None, "a"] * 50
    nested = [[{"x": "de"}], [], None, [{"x": None}, {"x": "f"}]] * 50
    rows = pa.table({"t": texts, "d": pa.array(texts).dictionary_encode(), "n": nested, "i": list(range(200))})
    sizes = {name: expanded_bytes(rows[name].chunk(0)) for name in rows.column_names}
    assert sizes["t"] == sizes["d"] == 8 * 200 + 4 * 50
    assert sizes["n"] == 8 * 200 + 2 * 8 * 150 + 3 * 50
    assert sizes["i"] == 8 * 200


def test_large_honest_files_are_read(tmp_path):
    """As repetitive as data are: one system prompt in every row."""
    system = "You are a helpful assistant. " * 20
    first = {"role": "system", "content": system}
    rows = [{"messages": [first, {"role": "user", "content": f"q{n}"}]} for n in range(5000)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    for name in ("rows.parquet", "rows.jsonl.gz"):
        raw = RawDataset.load("local", path=str(tmp_path / name))
        assert len(raw) == 5000 and raw[4999] == {"system": system, "input": ["q4999"]}


@pytest.mark.parametrize("name", ["a[1].jsonl", "b*.jsonl", "c?.jsonl", "d {e}.jsonl"])
def test_file_names_are_no_patterns(name, tmp_path):
    (tmp_path / name).write_text(ROW)
    assert RawDataset.load("local", path=str(tmp_path / name))[0]["answer"] == "a"


def test_columns_of_pictures_are_left_out(tmp_path):
    """A row of such a column names a file or an address, which looking at it would open."""
    features = datasets.Features({"prompt": datasets.Value("string"), "picture": datasets.Image()})
    rows = {"prompt": ["q"], "picture": [{"path": "http://127.0.0.1:9/x.png", "bytes": None}]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    raw = RawDataset.load("local", path=str(tmp_path / "rows.parquet"))
    assert raw.rows.column_names == ["prompt"] and raw[0] == {"input": "q"}


def test_text_that_is_no_utf8_in_a_table(tmp_path):
    bad = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(np.array([0, 1], "int32")), pa.py_buffer(b"\xff")])
    pq.write_table(pa.table({"prompt": bad}), tmp_path / "rows.parquet")
    raw = RawDataset.load("local", path=str(tmp_path / "rows.parquet"))
    with pytest.raises(DataError, match="sample 0, file .*rows.parquet: a column is not of the type"):
        raw[0]


def test_scripts_of_a_data_set_are_not_run(tmp_path, monkeypatch):
    """Neither where the data lie nor in the working directory, though they are named like what is asked for."""
    folder = tmp_path / "tatsu-lab" / "alpaca"
    folder.mkdir(parents=True)
    for name in ("alpaca.py", "json.py", "datasets.py", "numpy.py"):
        (folder / name).write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
        (tmp_path / name).write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="dataset 'alpaca'"):
        RawDataset.load("alpaca")
    (folder / "rows.jsonl").write_text(json.dumps({"instruction": "i", "input": "", "output": "o"}))
    assert RawDataset.load("alpaca", path=str(folder))[0]["answer"] == "o"
    assert not (tmp_path / "run").exists()
