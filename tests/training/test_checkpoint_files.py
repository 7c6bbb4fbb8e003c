"""A run's checkpoints: listed, dropped, the newest found; after kills, saved asynchronously, on a full disk."""

from __future__ import annotations

import os
import shutil
import subprocess
from types import SimpleNamespace

import pytest
from safetensors.numpy import load_file

from alignment.runtime.faults import RunError, UsageError
from alignment.training.checkpoint import drop_old_checkpoints, list_checkpoints, recover
from alignment.training.resume import agree_on_start, choose_start, clear_leftovers
from alignment.training.sums import find_damage
from tests.training.checkpoints import CHANGES, content_of, make_checkpoints, make_writer, names_of, save
from tests.training.language_model import assert_same_bits, make_engine, make_model, train


def test_checkpoints_are_listed_by_step(tmp_path):
    make_checkpoints(tmp_path, 10, 9, 100, 2)
    make_checkpoints(tmp_path, "best", "7-copy")  # a person's own
    (tmp_path / "checkpoint-300").write_text("a file")
    (tmp_path / ".checkpoint-400.partial").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"checkpoint-{n}" for n in (2, 9, 10, 100)]
    assert list_checkpoints(tmp_path / "missing") == []


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 9, None, 0, -1])
def test_save_total_limit(tmp_path, limit):
    kept = {1: [11], 2: [9, 11]}.get(limit, [5, 9, 11])
    for part in ("policy", "value"):
        make_checkpoints(tmp_path / part, 9, 5, 11)
    make_checkpoints(tmp_path / "policy", "best")
    drop_old_checkpoints(tmp_path, limit, ("policy", "value"))
    for part in ("policy", "value"):
        assert [path.name for path in list_checkpoints(tmp_path / part)] == [f"checkpoint-{n}" for n in kept]
    assert (tmp_path / "policy" / "checkpoint-best").is_dir()


def test_the_best_checkpoint_is_kept_beyond_the_limit(tmp_path):
    make_checkpoints(tmp_path, 1, 2, 3, 4)
    drop_old_checkpoints(tmp_path, 1, keep=[2])
    assert names_of(tmp_path) == ["checkpoint-2", "checkpoint-4"]


class TestChooseStart:
    @pytest.mark.parametrize("asked", [None, "", "false", "False"])
    def test_start_afresh(self, tmp_path, asked):
        assert choose_start(make_checkpoints(tmp_path, 1), asked).checkpoint is None

    @pytest.mark.parametrize("asked", ["true", "True", "auto"])
    def test_newest(self, tmp_path, asked):
        make_checkpoints(tmp_path / "policy", 3, 12)
        assert choose_start(tmp_path, asked, ("policy", "value")).checkpoint == tmp_path / "policy" / "checkpoint-12"

    def test_a_path_wherever_it_is(self, tmp_path):
        make_checkpoints(tmp_path / "elsewhere", 3, 12)
        path = tmp_path / "elsewhere" / "checkpoint-3"
        assert choose_start(tmp_path / "out", str(path)).checkpoint == path
        assert choose_start(tmp_path / "out", f"{path}/").checkpoint == path

    def test_a_path_to_one_of_several_models_names_all(self, tmp_path, monkeypatch):
        make_checkpoints(tmp_path / "policy", 3)
        found = choose_start(tmp_path / "out", str(tmp_path / "value" / "checkpoint-3"), ("policy", "value"))
        assert found.checkpoint == tmp_path / "policy" / "checkpoint-3"

    @pytest.mark.parametrize(
        ("asked", "message"),
        [
            ("true", '"resume_from_checkpoint": no checkpoint in '),
            ("out/checkpoint-5", "out/checkpoint-5 is not a checkpoint"),
        ],
    )
    def test_what_is_not_there(self, tmp_path, monkeypatch, asked, message):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UsageError, match=message):
            choose_start(tmp_path / "out", asked)

    @pytest.mark.parametrize(
        "asked", ["ppo", "ppo/policy", "ppo/checkpoint-3", "ppo/policy/latest", "ppo/policy/checkpoint-4", "."]
    )
    def test_what_a_path_must_be(self, tmp_path, monkeypatch, asked):
        make_checkpoints(tmp_path / "ppo" / "policy", 3, "best")
        (tmp_path / "ppo" / "policy" / "latest").symlink_to("checkpoint-3")
        monkeypatch.chdir(tmp_path)
        message = f"{asked} is not a checkpoint; it must be a path to a directory policy/checkpoint-N,"
        with pytest.raises(UsageError, match=f'^"resume_from_checkpoint": {message}'):
            choose_start(tmp_path / "out", asked, ("policy", "value"))

    def test_it_only_looks(self, tmp_path):
        """As a dry run does: what a kill left stays for the run itself."""
        make_checkpoints(tmp_path, 1, 2)
        (tmp_path / "checkpoint-2").rename(tmp_path / ".checkpoint-2.replaced")
        before = names_of(tmp_path)
        assert choose_start(tmp_path, "auto").checkpoint == tmp_path / "checkpoint-1"
        assert names_of(tmp_path) == before
        start = agree_on_start(SimpleNamespace(output_dir=tmp_path, resume_from_checkpoint="auto"), ("",))
        assert start.checkpoint == tmp_path / "checkpoint-2" and names_of(tmp_path) == ["checkpoint-1", "checkpoint-2"]

    def test_auto_starts_where_there_is_none(self, tmp_path):
        start = choose_start(tmp_path / "out", "auto", ("policy", "value"))
        assert start.checkpoint is None and start.automatic and not start.passed_over


def die_at(number):
    """End this process, as a kill does, instead of the number-th change of a directory from now on."""
    left = number

    def watched(change):
        def call(*args, **more):
            nonlocal left
            left -= 1
            if left < 0:
                os._exit(9)
            return change(*args, **more)

        return call

    for owner, name in ((os, "replace"), (os, "fsync"), (os, "rmdir"), (os, "unlink"), (os, "mkdir")):
        setattr(owner, name, watched(getattr(owner, name)))


def status_of(work):
    """The exit status of a process that does ``work``: 0, or what that ends it with."""
    process = os.fork()
    if process == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def marked(text):
    return lambda files: files.add_text("trainer_state.json", text)


@pytest.mark.parametrize("parts", [("",), ("policy", "value")], ids=["one", "two"])
@pytest.mark.parametrize("step", [1, 2], ids=["replaced", "new"])
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path, parts, step):
    """Of a save that replaces checkpoint-1 or follows it: before each change of a directory in turn."""
    for number in range(100):
        output = tmp_path / str(number)
        make_writer(output, parts).save(1, {part: marked("old") for part in parts})

        def save_and_die(output=output, number=number):
            die_at(number)
            make_writer(output, parts, save_total_limit=1).save(step, {part: marked("new") for part in parts})

        status = status_of(save_and_die)
        found = agree_on_start(SimpleNamespace(output_dir=output, resume_from_checkpoint="auto"), parts)
        assert status in (0, 9) and found.checkpoint is not None and not found.passed_over
        whole = {(output / part / found.checkpoint.name / "trainer_state.json").read_text() for part in parts}
        assert whole in ({"old"}, {"new"}), number
        clear_leftovers(output, found, parts)
        assert all(names_of(output / part)[-1] == found.checkpoint.name for part in parts)
        assert not any(name.startswith(".") for part in parts for name in names_of(output / part))
        if status == 0:
            assert whole == {"new"} and number >= 10  # Pythons differ in how they remove a directory
            return
    raise AssertionError("it never ended")


def test_recover_changes_nothing_sound(tmp_path):
    make_checkpoints(tmp_path, 1, 2)
    recover(tmp_path, ("",))
    assert names_of(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def test_asynchronous_saving_writes_the_same_files(trained, tmp_path):
    engine = trained[0]
    for kind in (False, True):
        writer = make_writer(tmp_path / str(kind), use_async_save=kind, save_total_limit=1)
        for step in (1, 2):
            writer.save(step, {"": content_of(engine, step)})
        writer.finish()
        assert names_of(tmp_path / str(kind)) == ["checkpoint-2"] and writer.saved_step == 2
    one, other = (tmp_path / str(kind) / "checkpoint-2" for kind in (False, True))
    assert names_of(one) == names_of(other)
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes()
        assert path.stat().st_mode == (other / path.name).stat().st_mode


def test_what_is_saved_asynchronously_is_the_state_when_it_was_asked_for(tmp_path):
    engine = make_engine(make_model(tmp_path / "model"), 4, **CHANGES)
    train(engine, range(2))
    expected = load_file(save(engine, tmp_path / "out", 2) / "optimizer.safetensors")
    writer = make_writer(tmp_path / "async", use_async_save=True)
    writer.save(2, {"": content_of(engine, 2)})
    train(engine, range(2, 4))
    writer.finish()
    assert_same_bits(load_file(tmp_path / "async" / "checkpoint-2" / "optimizer.safetensors"), expected)
    assert (tmp_path / "async/checkpoint-2/model.safetensors").read_bytes() == (
        tmp_path / "out/checkpoint-2/model.safetensors"
    ).read_bytes()


@pytest.fixture
def small_disk(trained, tmp_path):
    """A file system with room for one checkpoint of ``trained`` and a half."""
    folder = tmp_path / "disk"
    folder.mkdir()
    pages = sum(-(-path.stat().st_size // 4096) for path in trained[1].iterdir())
    mount = ["mount", "-t", "tmpfs", "-o", f"size={pages * 6}k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("use_async_save", [False, True], ids=["sync", "async"])
def test_a_full_disk(trained, small_disk, use_async_save):
    engine = trained[0]
    writer = make_writer(small_disk, use_async_save=use_async_save)
    writer.save(1, {"": content_of(engine, 1)})
    writer.finish()
    message = "checkpoint-2: this checkpoint could not be written: No space left on device; checkpoint-1 before it is"
    with pytest.raises(RunError, match=message):
        writer.save(2, {"": content_of(engine, 2)})
        writer.wait()
    assert names_of(small_disk) == ["checkpoint-1"] and find_damage(small_disk / "checkpoint-1") is None


def test_a_full_disk_may_be_passed_over(trained, small_disk, capsys):
    engine = trained[0]
    writer = make_writer(small_disk, save_error="skip")
    for step in (1, 2):
        writer.save(step, {"": content_of(engine, step)})
    assert "notice: " in capsys.readouterr().out and names_of(small_disk) == ["checkpoint-1"]
    with pytest.raises(RunError, match="the run's last checkpoint could not be written; checkpoint-1 before it"):
        writer.finish()
    shutil.rmtree(small_disk / "checkpoint-1")
    writer.save(3, {"": content_of(engine, 3)})
    writer.finish()
    assert names_of(small_disk) == ["checkpoint-3"]
