"""Checkpoints: exact resumption through files, nothing half-written, damage named in one line, the newest found."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from alignment.ppo.models.loading import load_policy
from alignment.ppo.models.placement import Placement
from alignment.ppo.models.saving import save_model
from alignment.ppo.models.weights import part_name, write_index
from alignment.runtime.faults import UsageError
from alignment.training.checkpoint import (
    OptimizerFiles,
    drop_old_checkpoints,
    find_checkpoint,
    list_checkpoints,
    load_training_state,
    save_checkpoint,
    write_directory,
)
from tests.training.language_model import assert_same_bits, make_engine, make_model, train, weights_of

CHANGES = {"lr_scheduler_type": "cosine", "warmup_steps": 1, "max_grad_norm": 0.3}
STATE = {"kl_controller": {"coefficient": 0.1 + 0.2}, "moments": {"count": 3.0, "mean": 1 / 3}}


def save(engine, directory, step, state=None):
    return save_checkpoint(directory, step, lambda path: save_model(engine.model, None, path), engine, state or STATE)


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
    write_index(path / OptimizerFiles.index, OptimizerFiles.single, [list(part) for part in found])
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
        "model.safetensors", "config.json", "generation_config.json", "optimizer.safetensors", "trainer_state.json"
    }  # fmt: skip
    assert_same_bits(load_file(path / "optimizer.safetensors"), engine.state_dict()[0])
    with safe_open(str(path / "model.safetensors"), framework="np") as file:
        assert "model.layers.0.self_attn.q_proj.bias" in file.keys()  # noqa: SIM118
    assert json.loads((path / "trainer_state.json").read_text())["kl_controller"]["coefficient"] == 0.1 + 0.2


class Killed(BaseException):
    """What no code catches, as if the process were gone."""


def interrupted(path):
    (path / "model.safetensors").write_bytes(b"half")
    raise Killed


def test_an_interrupted_write_leaves_nothing_that_looks_whole(trained, tmp_path):
    with pytest.raises(Killed):
        save_checkpoint(tmp_path, 3, interrupted, trained[0], STATE)
    assert not (tmp_path / "checkpoint-3").exists() and list_checkpoints(tmp_path) == []
    path = save(trained[0], tmp_path, 3)  # what the first attempt left is in nobody's way
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-3"] and list_checkpoints(tmp_path) == [path]
    assert load_file(path / "model.safetensors")


def test_an_interrupted_write_leaves_the_old_directory(tmp_path):
    directory = tmp_path / "best"
    write_directory(directory, lambda path: (path / "file").write_text("old"))
    with pytest.raises(Killed):
        write_directory(directory, interrupted)
    assert [file.name for file in directory.iterdir()] == ["file"]
    write_directory(directory, lambda path: (path / "other").write_text("new"))
    assert [file.name for file in directory.iterdir()] == ["other"]  # replaced, not mixed


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
    for step in steps:
        (directory / f"checkpoint-{step}").mkdir(parents=True)
        (directory / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    return directory


def test_checkpoints_are_listed_by_step(tmp_path):
    make_checkpoints(tmp_path, 10, 9, 100, 2)
    make_checkpoints(tmp_path, "best", "7-copy")  # a person's own
    (tmp_path / "checkpoint-200").mkdir()  # never completed
    (tmp_path / "checkpoint-300").write_text("a file")
    (tmp_path / ".checkpoint-400.partial").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"checkpoint-{n}" for n in (2, 9, 10, 100)]
    assert list_checkpoints(tmp_path / "missing") == []


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 9, None, 0, -1])
def test_save_total_limit(tmp_path, limit):
    kept = {1: [11], 2: [9, 11]}.get(limit, [5, 9, 11])
    make_checkpoints(tmp_path, 9, 5, 11)
    make_checkpoints(tmp_path, "best")
    drop_old_checkpoints(tmp_path, limit)
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"checkpoint-{n}" for n in kept]
    assert (tmp_path / "checkpoint-best").is_dir()


class TestFindCheckpoint:
    @pytest.mark.parametrize("asked", [None, "", "false", "False"])
    def test_start_afresh(self, tmp_path, asked):
        assert find_checkpoint(make_checkpoints(tmp_path, 1), asked) is None

    @pytest.mark.parametrize("asked", ["true", "True"])
    def test_newest(self, tmp_path, asked):
        make_checkpoints(tmp_path / "policy", 3, 12)
        assert find_checkpoint(tmp_path / "policy", asked) == tmp_path / "policy" / "checkpoint-12"
        assert find_checkpoint(tmp_path, asked, "policy") == tmp_path / "policy" / "checkpoint-12"

    def test_a_path_wherever_it_is(self, tmp_path):
        make_checkpoints(tmp_path / "elsewhere", 3, 12)
        path = tmp_path / "elsewhere" / "checkpoint-3"
        assert find_checkpoint(tmp_path / "out", str(path)) == path
        assert find_checkpoint(tmp_path / "out", f"{path}/") == path

    def test_a_path_to_one_of_several_models_names_all(self, tmp_path, monkeypatch):
        for part in ("policy", "value"):
            make_checkpoints(tmp_path / part, 3, 12)
        asked = str(tmp_path / "policy" / "checkpoint-3")
        for part in ("policy", "value"):
            assert find_checkpoint(tmp_path / "out", asked, part) == tmp_path / part / "checkpoint-3"
        monkeypatch.chdir(tmp_path)
        found = find_checkpoint(tmp_path, "policy/checkpoint-3", "value")
        assert found.resolve() == tmp_path / "value" / "checkpoint-3"

    @pytest.mark.parametrize(
        ("asked", "part", "message"),
        [
            ("true", "", '"resume_from_checkpoint": no checkpoint in '),
            ("true", "value", r'"resume_from_checkpoint": no checkpoint in .*value'),
            ("out/checkpoint-5", "", "out/checkpoint-5 is not a checkpoint"),
            ("policy/checkpoint-3", "value", "value/checkpoint-3 is not a checkpoint"),
        ],
    )
    def test_what_is_not_there(self, tmp_path, monkeypatch, asked, part, message):
        monkeypatch.chdir(make_checkpoints(tmp_path / "policy", 3).parent)
        with pytest.raises(UsageError, match=message):
            find_checkpoint(tmp_path / "out", asked, part)
