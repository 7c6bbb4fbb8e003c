"""run.json: enough to repeat a run, and no secret."""

from __future__ import annotations

import json
import sys

import pytest

from alignment.ppo.arguments import GROUPS
from alignment.runtime.arguments import parse, resolve
from alignment.runtime.faults import RunError, UsageError
from alignment.runtime.run_record import write_run_record

GIVEN = ["--train_datasets=x", "--reward_server=http://localhost:1", "--reward_server_token", "hunter2"]


def test_the_record_repeats_the_run_without_the_secret(tmp_path, monkeypatch):
    given = [f"--output_dir={tmp_path}", *GIVEN, "--evaluation_strategy=epoch", "--eval_datasets=y"]
    monkeypatch.setattr(sys, "argv", ["run_ppo.py", *given, "--reward_server_token=hunter3"])
    arguments = parse(given, GROUPS)
    write_run_record(tmp_path, "ppo", arguments)
    text = (tmp_path / "run.json").read_text()
    assert "hunter" not in text
    record = json.loads(text)
    assert record["stage"] == "ppo"
    assert record["command"][0] == "run_ppo.py"
    assert record["arguments"]["reward_server_token"] == "***"
    assert record["arguments"]["evaluation_strategy"] == "epoch"
    assert record["versions"]["paddlenlp"] == "3.0.0b4"
    assert record["topology"]["processes"] == 1


@pytest.mark.parametrize("token", [["hunter2"], {"it": "hunter2"}, "hunter2\0"])
def test_a_refused_secret_is_not_told(tmp_path, token):
    file = tmp_path / "ppo.json"
    file.write_text(json.dumps({"output_dir": "out", "train_datasets": "x", "reward_server_token": token}))
    with pytest.raises(UsageError, match=r'"reward_server_token": \*\*\* is not allowed; it ') as fault:
        parse([str(file)], GROUPS)
    assert "hunter" not in str(fault.value)


def test_the_recorded_arguments_are_an_argument_file_that_means_the_same(tmp_path, capsys):
    given = [f"--output_dir={tmp_path}", *GIVEN[:2], "--evaluation_strategy=epoch", "--eval_datasets=y", "--seed=3"]
    write_run_record(tmp_path, "ppo", parse(given, GROUPS))
    file = tmp_path / "again.json"
    file.write_text(json.dumps(json.loads((tmp_path / "run.json").read_text())["arguments"]))
    again, first = resolve([str(file)], GROUPS), resolve(given, GROUPS)
    assert capsys.readouterr().err == ""
    # what a run settles when it starts
    assert {name for name in first if again[name] != first[name]} <= {"device", "disable_tqdm", "logging_dir"}


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PADDLE_TRAINER_ID", "1")
    write_run_record(tmp_path, "ppo", ())
    assert list(tmp_path.iterdir()) == []


def test_a_record_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "run.json").mkdir()
    with pytest.raises(RunError, match=r"run\.json: cannot be written: Is a directory"):
        write_run_record(tmp_path, "ppo", ())
