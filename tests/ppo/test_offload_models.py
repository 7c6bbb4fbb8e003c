"""Models and optimizers whose memory offload_level takes: the same learning, nothing left on the device, resuming."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from alignment.ppo.models.policy import passes_of
from alignment.ppo.offload import Offload
from alignment.ppo.offload_storage import file_system
from alignment.runtime.files import Files
from alignment.runtime.timing import PhaseTimer
from alignment.training.checkpoint import content, load_training_state
from alignment.training.engine import TrainingEngine
from tests.training.language_model import (
    accumulate,
    assert_same_bits,
    make_engine,
    make_model,
    micro_batch,
    weights_of,
)

ALL = ("freeze_model", "optimizer", "train_model")


@pytest.fixture
def model_of(tmp_path):
    """model_of() -> the same model each time."""
    return lambda: make_model(tmp_path / "model")


def learn(engine: TrainingEngine, *steps: int) -> None:
    for step in steps:
        with engine.learning():
            accumulate(engine, step)
            engine.step()


def state_of(engine: TrainingEngine) -> dict:
    with engine.shards.whole_model():
        weights = weights_of(engine.model)
    return weights | engine.state_dict()[0]


@pytest.mark.parametrize("levels", [("optimizer",), ("train_model",), ALL])
def test_an_engine_learns_the_same_and_keeps_nothing_on_the_device(model_of, tmp_path, levels):
    plain, engine = make_engine(model_of()), make_engine(model_of())
    Offload(levels, tmp_path, PhaseTimer()).add_trained(engine)
    for one in (plain, engine):
        learn(one, 0, 1)
    tensors = {"train_model": engine.model.parameters(), "optimizer": engine.optimizer_tensors()}
    for level, part in tensors.items():
        assert [tensor._is_initialized() for tensor in part] == [level not in levels] * len(part)
    assert_same_bits(state_of(engine), state_of(plain))
    learn(plain, 2), learn(engine, 2)
    assert_same_bits(state_of(engine), state_of(plain))


def test_gradients_do_not_outlast_learning(model_of):
    engine = make_engine(model_of())
    with pytest.raises(RuntimeError), engine.learning():
        accumulate(engine, 0)
        assert any(p.grad is not None for p in engine.parameters)
        raise RuntimeError
    assert all(p.grad is None for p in engine.parameters)


def test_optimizer_state_round_trip(model_of, tmp_path):
    engine, resumed = make_engine(model_of()), make_engine(model_of())
    for one in (engine, resumed):
        Offload(ALL, tmp_path, PhaseTimer()).add_trained(one)
    learn(engine, 0, 1)
    content(lambda files: None, engine, 2, {})(Files(tmp_path))
    load_training_state(tmp_path, resumed)
    assert not any(tensor._is_initialized() for tensor in resumed.optimizer_tensors())
    assert_same_bits(resumed.state_dict()[0], engine.state_dict()[0])
    with engine.shards.whole_model(), resumed.shards.home(True):
        for own, other in zip(resumed.model.parameters(), engine.model.parameters(), strict=True):
            own.set_value(other)
    learn(engine, 2), learn(resumed, 2)
    assert_same_bits(state_of(resumed), state_of(engine))


def test_frozen_models_are_there_for_passes_only(model_of, tmp_path):
    passes, timer = passes_of(model_of()), PhaseTimer()
    expected = passes.forward([micro_batch(passes.model, 0)])
    Offload(("freeze_model",), tmp_path, timer).add_frozen(passes)
    for _ in range(2):
        assert not any(parameter._is_initialized() for parameter in passes.model.parameters())
        assert passes.forward([micro_batch(passes.model, 0)]) == expected
    assert timer.pop()["timing_s/offload"] > 0


def test_what_is_not_named_stays(model_of, tmp_path):
    passes, engine, offload = passes_of(model_of()), make_engine(model_of()), Offload((), tmp_path, PhaseTimer())
    offload.add_frozen(passes)
    offload.add_trained(engine)
    learn(engine, 0)
    for tensor in (*passes.model.parameters(), *engine.model.parameters(), *engine.optimizer_tensors()):
        assert tensor._is_initialized()
    assert offload.timer.pop() == {}


def test_the_models_of_an_iteration_follow_each_other(model_of, tmp_path):
    offload = Offload(ALL, tmp_path, PhaseTimer())
    offload.add_frozen(passes_of(model_of()))
    judge = passes_of(model_of())
    offload.add_frozen(judge, in_turn=False)  # which most iterations do without: nothing fetches it ahead
    assert not any(parameter._is_initialized() for parameter in judge.model.parameters())
    for _ in range(2):
        offload.add_trained(make_engine(model_of()))
    reference, critic, actor = offload.models
    assert [one.following for one in offload.models] == [critic, actor, reference]


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm")
def test_memory_that_looks_like_a_disk_is_noticed(tmp_path, capsys):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        assert file_system(Path(folder)) == "tmpfs"
        Offload(("optimizer",), Path(folder), PhaseTimer())
    assert "frees nothing" in capsys.readouterr().out
