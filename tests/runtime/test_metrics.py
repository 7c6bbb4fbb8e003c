"""metrics.jsonl and the writers beside it, read back by the libraries' own readers."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from alignment.runtime import writers
from alignment.runtime.faults import UsageError
from alignment.runtime.metrics import MetricsWriter, keep_steps


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def settings(*report_to: str, logging_dir=None) -> SimpleNamespace:
    return SimpleNamespace(report_to=list(report_to), logging_dir=logging_dir)


def test_a_line_is_on_disk_when_write_returns(tmp_path):
    writer = MetricsWriter(settings(), tmp_path / "new")
    writer.write(np.int64(3), {"loss": np.float32(0.5), "count": 2})
    assert rows(tmp_path / "new") == [{"step": 3, "loss": 0.5, "count": 2.0}]
    writer.close()
    writer.close()


def test_values_that_are_not_finite_become_null(tmp_path):
    with MetricsWriter(settings(), tmp_path) as writer:
        writer.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.0})
    assert rows(tmp_path) == [{"step": 1, "a": None, "b": None, "c": None, "d": 1.0}]


def test_another_writer_appends_and_a_resumed_one_drops_later_steps(tmp_path):
    for step in (1, 2, 3):
        with MetricsWriter(settings(), tmp_path) as writer:
            writer.write(step, {"loss": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # what a killed run leaves
    with MetricsWriter(settings(), tmp_path, resume_from=2) as writer:
        writer.write(3, {"loss": 30})
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [(1, 1), (2, 2), (3, 30)]
    MetricsWriter(settings(), tmp_path, resume_from=0).close()
    assert rows(tmp_path) == []


@pytest.mark.parametrize("answer", ["one\u2028two", "one\u2029two", "one\x85two", "\x0b\x0c\x1c one two"])
def test_rows_of_any_text_are_kept_on_every_resume_and_a_torn_one_is_dropped(tmp_path, answer):
    path = tmp_path / "samples.jsonl"
    lines = [json.dumps({"step": step, "answer": answer}, ensure_ascii=False).encode() + b"\n" for step in (1, 2, 3)]
    torn = '{"step": 2, "answer": "\u2028'.encode()[:-1]  # inside the character
    path.write_bytes(b"".join(lines) + torn)
    for _ in range(2):
        keep_steps(path, 2)
        assert path.read_bytes() == b"".join(lines[:2])


def test_a_whole_last_row_without_its_newline_is_kept(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_bytes(b'{"step": 1}\nnull\n{"step": "one"}\n{"step": 2}')
    keep_steps(path, 2)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PADDLE_TRAINER_ID", "1")
    with MetricsWriter(settings("tensorboard", "visualdl"), tmp_path) as writer:
        writer.write(1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def read_visualdl(folder: Path) -> list[tuple[int, str, float]]:
    from visualdl import LogReader

    (file,) = (folder / "visualdl").iterdir()
    reader = LogReader(file_path=str(file))
    tags = reader.get_tags().get("scalar", ())
    return [(record.id, tag, record.value) for tag in tags for record in reader.get_data("scalar", tag)]


def read_tensorboard(folder: Path) -> list[tuple[int, str, float]]:
    """As TensorBoard shows it: where a file says that a session starts at a step, what was there from it on goes."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    shown = []
    for file in sorted((folder / "tensorboard").iterdir()):
        for event in map(Event.FromString, tensorboard_records(file.read_bytes())):
            if event.session_log.status == SessionLog.START:
                shown = [point for point in shown if point[0] < event.step]
            shown += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return shown


@pytest.mark.parametrize("own_folder", [True, False])
def test_both_writers_hold_the_scalars(tmp_path, own_folder):
    folder = tmp_path / "events" if own_folder else tmp_path / "runs"
    with MetricsWriter(
        settings("visualdl", "tensorboard", logging_dir=folder if own_folder else None), tmp_path
    ) as writer:
        writer.write(1, {"objective/kl": 0.25, "loss": math.nan})
        writer.write(2, {"objective/kl": 0.5})
    expected = [(1, "objective/kl", 0.25), (2, "objective/kl", 0.5)]
    assert read_visualdl(folder) == read_tensorboard(folder) == expected


def test_a_resumed_run_shows_no_step_twice(tmp_path):
    both, folder = settings("visualdl", "tensorboard"), tmp_path / "runs"
    starts = {0: [0, 1, 2, 3], 2: [3, 4]}
    for start, steps in starts.items():
        time.sleep(1.1)  # TensorBoard's files are named by the second
        with MetricsWriter(both, tmp_path, resume_from=start) as writer:
            for step in steps:
                writer.write(step, {"loss": step + start / 4})
    expected = [(step, "loss", float(value)) for step, value in ((0, 0), (1, 1), (2, 2), (3, 3.5), (4, 4.5))]
    assert read_visualdl(folder) == read_tensorboard(folder) == expected
    time.sleep(1.1)
    with MetricsWriter(both, tmp_path, resume_from=0) as writer:  # another run in the same place
        writer.write(0, {"loss": 7.0})
    assert read_visualdl(folder) == read_tensorboard(folder) == [(0, "loss", 7.0)]


def tensorboard_records(content: bytes):
    """TFRecord framing: length uint64, its checksum uint32, the bytes, their checksum uint32."""
    while content:
        length = int.from_bytes(content[:8], "little")
        yield content[12 : 12 + length]
        content = content[16 + length :]


def test_wandb_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setattr(writers, "find_spec", lambda name: None)
    writers.check_installed(["visualdl"])
    with pytest.raises(UsageError, match='"report_to": "wandb" needs the package wandb'):
        writers.check_installed(["visualdl", "wandb"])


def test_wandb_keeps_its_run_over_a_resume(tmp_path, monkeypatch):
    """Offline, read back from the files that `wandb sync` would send."""
    pytest.importorskip("wandb", reason="no requirement of this toolkit", exc_type=ImportError)
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "run.json").write_text('{"arguments": {"seed": 5}}')
    for start, steps in {0: [0, 1, 2, 3], 2: [3, 4]}.items():
        with MetricsWriter(settings("wandb"), tmp_path, resume_from=start) as writer:
            for step in steps:
                writer.write(step, {"loss": step + start / 4, "bad": math.nan})
    kept = (tmp_path / "wandb_id.txt").read_text().strip()
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    assert [file.stem for file in files] == [f"run-{kept}"] * 2
    first, second = map(read_wandb, files)
    assert first == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0)] and second == [(3, 3.5), (4, 4.5)]
    with MetricsWriter(settings("wandb"), tmp_path, resume_from=0):
        pass
    assert (tmp_path / "wandb_id.txt").read_text().strip() != kept  # another run in the same place


def read_wandb(file: Path) -> list[tuple[int, float]]:
    """(step, loss) of each row of a .wandb file."""
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    store, points = DataStore(), []
    store.open_for_scan(str(file))
    while data := store.scan_data():
        items = {item.key or "/".join(item.nested_key): item for item in Record.FromString(data).history.item}
        if items:
            assert "bad" not in items
            points.append((int(items["_step"].value_json), float(items["loss"].value_json)))
    return points
