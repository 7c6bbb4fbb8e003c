"""Checkpoints: exact resumption through files, nothing half-written, damage named in one line, the newest found."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from alignment.ppo.models.loading import load_policy
from alignment.ppo.models.placement import Placement
from alignment.ppo.models.saving import collect_model
from alignment.ppo.models.weights import add_index, part_name
from alignment.runtime.faults import RunError, UsageError
from alignment.runtime.files import Files
from alignment.training.best import BestTracker
from alignment.training.checkpoint import (
    OptimizerFiles,
    content,
    drop_old_checkpoints,
    list_checkpoints,
    load_training_state,
    recover,
)
from alignment.training.resume import choose_start, clear_leftovers
from alignment.training.sums import find_damage, measure, write_sums
from alignment.training.writer import CheckpointWriter
from tests.training.language_model import assert_same_bits, make_engine, make_model, train, weights_of

CHANGES = {"lr_scheduler_type": "cosine", "warmup_steps": 1, "max_grad_norm": 0.3}
STATE = {"kl_controller": {"coefficient": 0.1 + 0.2}, "moments": {"count": 3.0, "mean": 1 / 3}}


def make_writer(directory, parts=("",), **changes):
    values = {"save_total_limit": None, "use_async_save": False, "save_error": "stop", "metric_for_best_model": None}
    values |= {"greater_is_better": None, "early_stopping_patience": None, "load_best_model_at_end": False}
    args = SimpleNamespace(output_dir=directory, **values | changes)
    return CheckpointWriter(args, BestTracker(args), parts)


def content_of(engine, step):
    return content(lambda files: collect_model(engine.model, None, files), engine, step, STATE)


def save(engine, directory, step):
    make_writer(directory).save(step, {"": content_of(engine, step)})
    return directory / f"checkpoint-{step}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(an engine after two steps, its checkpoint); not to be changed."""
    directory = tmp_path_factory.mktemp("trained")
    engine = make_engine(make_model(directory / "model"), 4, **CHANGES)
    train(engine, range(2))
    return engine, save(engine, directory, 2)


@pytest.fixture
def checkpoint(trained, tmp_path):
    """A copy to damage."""
    return shutil.copytree(trained[1], tmp_path / "checkpoint-2")


def test_resumption_from_a_checkpoint_is_bit_for_bit_the_same(tmp_path):
    whole = make_engine(make_model(tmp_path / "model"), 4, **CHANGES)
    metrics = train(whole, range(4))[2:]
    first = make_engine(make_model(tmp_path / "model"), 4, **CHANGES)
    train(first, range(2))
    path = save(first, tmp_path / "out", 2)

    resumed = make_engine(load_policy(path), 4, **CHANGES)
    assert load_training_state(path, resumed) == {"step": 2, "schedule": first.scheduler.state_dict(), **STATE}
    assert train(resumed, range(2, 4)) == metrics
    assert_same_bits(weights_of(resumed.model), weights_of(whole.model))
    assert_same_bits(resumed.state_dict()[0], whole.state_dict()[0])


@pytest.mark.parametrize("stages", [2, 3])
def test_optimizer_states_change_between_a_whole_model_and_its_stages(tmp_path, stages):
    """Every stage takes its part of a whole model's; and a whole model takes what stages wrote in parts."""
    whole = make_engine(make_model(tmp_path / "model", num_hidden_layers=3), 4, **CHANGES)
    train(whole, range(2))
    path = save(whole, tmp_path / "out", 2)
    tensors, schedule = whole.state_dict()
    found = []
    for stage in range(stages):
        model = load_policy(path, placement=Placement(stages=stages, stage=stage))
        engine = make_engine(model, 4, **CHANGES)
        assert load_training_state(path, engine)["step"] == 2
        found.append(engine.state_dict()[0])
        assert found[-1] and engine.state_dict()[1] == schedule
        state = engine.optimizer.state_dict()
        for name, parameter in model.named_parameters():  # the copy of the tied embedding too
            for kind in ("moment1_0", "moment2_0"):
                np.testing.assert_array_equal(state[f"{parameter.name}_{kind}"].numpy(), tensors[f"{name}/{kind}"])
    assert sorted(key for part in found for key in part) == sorted(tensors)
    assert_same_bits({key: value for part in found for key, value in part.items()}, tensors)

    (path / OptimizerFiles.single).unlink()
    for stage, part in enumerate(found):
        save_file(part, path / part_name(OptimizerFiles.single, stage, stages))
    files = Files(path)
    add_index(files, OptimizerFiles.index, OptimizerFiles.single, [list(part) for part in found])
    files.check()
    other = make_engine(load_policy(path), 4, **CHANGES)
    load_training_state(path, other)
    assert_same_bits(other.state_dict()[0], tensors)
    (path / part_name(OptimizerFiles.single, 0, stages)).unlink()
    with pytest.raises(UsageError, match="cannot resume from it: .*no optimizer-00001-of-"):
        load_training_state(path, make_engine(load_policy(path), 4, **CHANGES))


def test_files(trained):
    """Nothing pickled; the model in a form other stacks load; the rest readable."""
    engine, path = trained
    assert path.name == "checkpoint-2"
    names = {file.name for file in path.iterdir()}
    assert names == {
        "model.safetensors", "config.json", "generation_config.json", "optimizer.safetensors", "trainer_state.json",
        "SHA256SUMS",
    }  # fmt: skip
    assert_same_bits(load_file(path / "optimizer.safetensors"), engine.state_dict()[0])
    with safe_open(str(path / "model.safetensors"), framework="np") as file:
        assert "model.layers.0.self_attn.q_proj.bias" in file.keys()  # noqa: SIM118
    assert json.loads((path / "trainer_state.json").read_text())["kl_controller"]["coefficient"] == 0.1 + 0.2


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def edit_state(path, change):
    state = json.loads((path / "trainer_state.json").read_text())
    (path / "trainer_state.json").write_text(json.dumps(change(state)))


def edit_optimizer(path, change):
    save_file(change(load_file(path / "optimizer.safetensors")), path / "optimizer.safetensors")


def without(content, part):
    return {key: value for key, value in content.items() if part not in key}


DAMAGE = {
    "no optimizer file": (lambda path: (path / "optimizer.safetensors").unlink(), "optimizer.safetensors"),
    "truncated optimizer file": (lambda path: truncate(path / "optimizer.safetensors"), "cannot resume"),
    "empty optimizer file": (lambda path: (path / "optimizer.safetensors").write_bytes(b""), "cannot resume"),
    "no state file": (lambda path: (path / "trainer_state.json").unlink(), "trainer_state.json"),
    "truncated state file": (lambda path: truncate(path / "trainer_state.json"), "cannot resume"),
    "binary state file": (lambda path: (path / "trainer_state.json").write_bytes(b"\xff\xfe"), "cannot resume"),
    "state is no object": (lambda path: edit_state(path, lambda _: [1]), "schedule"),
    "state without schedule": (lambda path: edit_state(path, lambda s: without(s, "schedule")), "schedule"),
    "empty schedule": (lambda path: edit_state(path, lambda s: s | {"schedule": {}}), "schedule"),
    "other parameters": (lambda path: edit_optimizer(path, lambda t: without(t, "layers.1.")), "qwen2.layers.1"),
    "other shapes": (lambda path: edit_optimizer(path, lambda t: {k: v[:1] for k, v in t.items()}), "has shape"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named_in_one_line(checkpoint, tmp_path, case):
    damage, message = DAMAGE[case]
    damage(checkpoint)
    engine = make_engine(make_model(tmp_path / "model"), 4, **CHANGES)
    with pytest.raises(UsageError, match=message) as caught:
        load_training_state(checkpoint, engine)
    assert str(checkpoint) in str(caught.value) and "\n" not in str(caught.value)
    assert engine.state_dict() == ({}, {"last_epoch": 0, "last_lr": 0.0})  # as new


def make_checkpoints(directory, *steps):
    """Sound ones, of nothing but a state."""
    for step in steps:
        path = directory / f"checkpoint-{step}"
        path.mkdir(parents=True)
        (path / "trainer_state.json").write_text("{}")
        write_sums(path, {"trainer_state.json": measure(path / "trainer_state.json")})
    return directory


def names_of(directory):
    return sorted(path.name for path in directory.iterdir())


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

    def test_auto_starts_where_there_is_none(self, tmp_path):
        start = choose_start(tmp_path / "out", "auto", ("policy", "value"))
        assert start.checkpoint is None and start.automatic and not start.passed_over


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


CORRUPTIONS = {"is altered": flip, "is truncated": lambda path: os.truncate(path, path.stat().st_size // 2)}
CORRUPTIONS["is missing"] = lambda path: path.unlink()


@pytest.fixture(scope="module")
def run_with_two_models(trained, tmp_path_factory):
    """An output directory with two checkpoints of both parts, the policy's with a sub-directory."""
    engine, output = trained[0], tmp_path_factory.mktemp("run")

    def collect(files):
        content_of(engine, 1)(files)
        files.add_text("adapters/lora_config.json", "{}")

    for step in (1, 2):
        make_writer(output, ("policy", "value")).save(step, {"value": content_of(engine, step), "policy": collect})
    return output


@pytest.mark.parametrize("what", CORRUPTIONS)
def test_every_damaged_file_is_named_and_auto_goes_back(run_with_two_models, tmp_path, what):
    """Each file of both parts in turn, bit-flipped, cut short or removed."""
    output, parts = run_with_two_models, ("policy", "value")
    files = [path for part in parts for path in (output / part / "checkpoint-2").rglob("*") if path.is_file()]
    assert len(files) == 13 and choose_start(output, "true", parts).checkpoint.name == "checkpoint-2"
    for path in files:
        kept = path.read_bytes()
        CORRUPTIONS[what](path)
        own_sums = path.parent.parent.name == "policy" and path.name == "SHA256SUMS"
        words = "is truncated or altered" if own_sums and what != "is missing" else what
        try:
            with pytest.raises(UsageError) as caught:
                choose_start(output, "true", parts)
            assert f"{path} {words}" in str(caught.value) and '"auto"' in str(caught.value)
            start = choose_start(output, "auto", parts)
            assert start.checkpoint == output / "policy" / "checkpoint-1"
            assert f"{path} {words}" in start.passed_over[output / "policy" / "checkpoint-2"]
        finally:
            path.write_bytes(kept)
    assert choose_start(output, "true", parts).checkpoint.name == "checkpoint-2"


def test_sums_are_what_sha256sum_reads(run_with_two_models):
    folder = run_with_two_models / "policy" / "checkpoint-2"
    checked = subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout.count(": OK") == 7 and "../../value/checkpoint-2/SHA256SUMS: OK" in checked.stdout
    (folder / "model-00003-of-00003.safetensors").write_bytes(b"")
    try:
        assert "model-00003-of-00003.safetensors is not named in SHA256SUMS" in find_damage(folder)
    finally:
        (folder / "model-00003-of-00003.safetensors").unlink()


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
        found = choose_start(output, "auto", parts)
        assert status in (0, 9) and found.checkpoint is not None and not found.passed_over
        whole = {(output / part / found.checkpoint.name / "trainer_state.json").read_text() for part in parts}
        assert whole in ({"old"}, {"new"}), number
        clear_leftovers(output, found, parts)
        assert all(names_of(output / part)[-1] == found.checkpoint.name for part in parts)
        assert not any(name.startswith(".") for part in parts for name in names_of(output / part))
        if status == 0:
            assert whole == {"new"} and number > 10
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
