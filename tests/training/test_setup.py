"""Output directories that are in use, and when evaluations and checkpoints are due."""

from __future__ import annotations

import errno
from types import SimpleNamespace

import pytest
from paddlenlp.trainer.trainer_utils import IntervalStrategy

from alignment.runtime import lock
from alignment.runtime.faults import UsageError
from alignment.training import setup
from alignment.training.resume import choose_start
from alignment.training.setup import is_due, total_steps
from alignment.training.sums import measure, write_sums


@pytest.fixture
def used(tmp_path):
    """An output directory with metrics, samples and checkpoints 2 and 4 of both parts."""
    for part in ("policy", "value"):
        for step in (2, 4):
            (tmp_path / part / f"checkpoint-{step}").mkdir(parents=True)
            path = tmp_path / part / f"checkpoint-{step}"
            (path / "trainer_state.json").write_text("{}")
            write_sums(path, {"trainer_state.json": measure(path / "trainer_state.json")})
    for name in ("metrics.jsonl", "samples.jsonl", "notes.txt"):
        (tmp_path / name).write_text("")
    return tmp_path


def arguments(output_dir, resume=None, overwrite=False):
    return SimpleNamespace(
        output_dir=str(output_dir), resume_from_checkpoint=resume, overwrite_output_dir=overwrite
    )


def check_output(args, parts=()):
    setup.check_output(args, start_of(args), parts or ("",))


def clear_output(args, parts):
    setup.clear_output(args, start_of(args), parts)


def start_of(args):
    return choose_start(args.output_dir, args.resume_from_checkpoint, PARTS)


def contents(folder):
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != "SHA256SUMS")
    return sorted(str(path.relative_to(folder)) for path in found)


PARTS = ("policy", "value")


def test_a_new_directory_is_made_and_kept_from_others(tmp_path):
    args = arguments(tmp_path / "a" / "b")
    for _ in range(2):  # one process may run a stage after another
        with setup.take_output(args), pytest.raises(UsageError, match='"output_dir": another process is at work in'):
            setup.take_output(args)


def test_a_file_system_without_locks_keeps_nobody_out(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)  # as a network's file system may
    with setup.take_output(arguments(tmp_path)):
        pass
    assert f"notice: {tmp_path} is on a file system without locks (No locks available)" in capsys.readouterr().out


def test_an_earlier_run_is_refused_and_stays(used):
    before = contents(used)
    with pytest.raises(UsageError, match="holds an earlier run.*overwrite_output_dir"):
        check_output(arguments(used), PARTS)
    assert contents(used) == before


def test_overwriting_removes_the_run_and_nothing_else(used):
    args = arguments(used, overwrite=True)
    before = contents(used)
    check_output(args, PARTS)
    assert contents(used) == before  # data and models are not checked yet
    clear_output(args, PARTS)
    assert contents(used) == ["notes.txt"]


def test_resuming_keeps_everything(used):
    before = contents(used)
    args = arguments(used, resume="true")
    check_output(args, PARTS)
    clear_output(args, PARTS)
    assert contents(used) == before


def test_resuming_from_an_older_checkpoint_drops_later_ones_only_if_asked(used):
    older = str(used / "policy" / "checkpoint-2")
    with pytest.raises(UsageError, match="later checkpoints.*checkpoint-4"):
        check_output(arguments(used, resume=older), PARTS)
    args = arguments(used, resume=older, overwrite=True)
    check_output(args, PARTS)
    clear_output(args, PARTS)
    assert [line for line in contents(used) if "checkpoint" in line] == [
        "policy/checkpoint-2/trainer_state.json",
        "value/checkpoint-2/trainer_state.json",
    ]
    assert (used / "metrics.jsonl").exists()


def test_what_killed_runs_left_is_cleared_and_damaged_checkpoints_are_set_aside(used):
    (used / "policy" / ".checkpoint-6.partial").mkdir()
    (used / "value" / "checkpoint-6").mkdir()  # killed before the policy's came into its place
    (used / "policy" / "checkpoint-4" / "trainer_state.json").write_text("{]")
    args = arguments(used, resume="auto")
    check_output(args, PARTS)
    clear_output(args, PARTS)
    names = sorted(path.name for part in PARTS for path in (used / part).iterdir())
    assert names == ["checkpoint-2", "checkpoint-2", "checkpoint-4.damaged", "checkpoint-4.damaged"]


def test_auto_starts_over_what_has_no_checkpoint_yet(tmp_path):
    for name in ("metrics.jsonl", "samples.jsonl", "alerts.jsonl", "notes.txt"):
        (tmp_path / name).write_text("")
    args = arguments(tmp_path, resume="auto")
    check_output(args, PARTS)
    clear_output(args, PARTS)
    assert contents(tmp_path) == ["notes.txt"]


def test_resuming_cuts_the_alerts_to_the_step(used):
    (used / "alerts.jsonl").write_text('{"step": 4, "alert": "a"}\n{"step": 5, "alert": "b"}\n')
    clear_output(arguments(used, resume="true"), PARTS)
    assert (used / "alerts.jsonl").read_text() == '{"step": 4, "alert": "a"}\n'


def test_resuming_into_another_directory_that_is_in_use(used, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("other")
    (elsewhere / "metrics.jsonl").write_text("")
    args = arguments(elsewhere, resume=str(used / "policy" / "checkpoint-2"))
    with pytest.raises(UsageError, match=str(elsewhere)):
        check_output(args, PARTS)


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match='"output_dir".*cannot be written: Not a directory'):
        setup.take_output(arguments(tmp_path / "file" / "out"))


@pytest.mark.parametrize(
    ("strategy", "every", "due"),
    [("no", 1, []), ("steps", 2, [2, 4, 6]), ("epoch", None, [3, 6]), (IntervalStrategy.STEPS, 3, [3, 6])],
)
def test_is_due(strategy, every, due):
    assert [step for step in range(1, 7) if is_due(strategy, every, step, steps_per_epoch=3)] == due


def test_total_steps():
    assert total_steps(SimpleNamespace(max_steps=7, num_train_epochs=2), 5) == 7
    assert total_steps(SimpleNamespace(max_steps=-1, num_train_epochs=1.5), 5) == 8
