"""One checkpoint: exact resumption through files, what is in them, damage named in one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from alignment.ppo.models.loading import load_policy
from alignment.ppo.models.placement import Placement
from alignment.ppo.models.weights import add_index, part_name
from alignment.runtime.faults import RunError, UsageError
from alignment.runtime.files import Files
from alignment.training.checkpoint import OptimizerFiles, load_training_state
from alignment.training.nonfinite import Guard
from alignment.training.resume import choose_start
from alignment.training.sums import find_damage
from tests.training.checkpoints import CHANGES, STATE, content_of, flip, make_writer, save
from tests.training.language_model import assert_same_bits, make_engine, make_model, train, weights_of


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
    assert load_training_state(path, resumed) == {
        "step": 2, "schedule": first.scheduler.state_dict(), "skipped_in_a_row": 0, **STATE,
    }  # fmt: skip
    assert train(resumed, range(2, 4)) == metrics
    assert_same_bits(weights_of(resumed.model), weights_of(whole.model))
    assert_same_bits(resumed.state_dict()[0], whole.state_dict()[0])


def test_a_resumed_run_counts_on_the_steps_left_out_in_a_row(checkpoint, tmp_path):
    first = make_engine(load_policy(checkpoint), 4, **CHANGES)
    load_training_state(checkpoint, first)
    first.guard = Guard("skip", limit=3)
    for _ in range(2):
        first.guard.refuse("a bad step")
    resumed = make_engine(load_policy(checkpoint), 4, **CHANGES)
    resumed.guard = Guard("skip", limit=3)
    load_training_state(save(first, tmp_path / "out", 2), resumed)
    with pytest.raises(RunError, match='"nonfinite_limit": 3 steps in a row'):
        resumed.guard.refuse("another")
    edit_state(checkpoint, lambda state: without(state, "skipped"))  # an older version's
    load_training_state(checkpoint, resumed)
    assert resumed.guard.in_a_row == 0


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
