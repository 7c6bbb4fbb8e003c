"""The optimizer step against AdamW in NumPy; accumulation, schedules, faults and exact resumption."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from alignment.ppo.models.freezing import set_trainable_layers
from alignment.ppo.models.loading import load_policy
from alignment.ppo.models.placement import WHOLE, Placement
from alignment.runtime.faults import RunError
from alignment.training.engine import OptimizerSettings, TrainingEngine
from tests.training.language_model import (
    ROWS,
    accumulate,
    assert_same_bits,
    make_engine,
    make_model,
    make_settings,
    micro_batch,
    optimizer_files,
    train,
    weights_of,
)


@pytest.fixture
def model(tmp_path):
    return make_model(tmp_path / "model")


class NumpyAdamW:
    """Loshchilov & Hutter 2019 (arXiv:1711.05101), algorithm 2, in float64, with global-norm clipping before."""

    def __init__(self, weights: dict[str, np.ndarray], settings: OptimizerSettings) -> None:
        self.weights = {name: value.astype(np.float64) for name, value in weights.items()}
        self.first, self.second = ({name: np.zeros(w.shape) for name, w in weights.items()} for _ in range(2))
        self.settings, self.steps = settings, 0

    def step(self, gradients: dict[str, np.ndarray], lr: float) -> float:
        s = self.settings
        self.steps += 1
        norm = math.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradients.values()))
        scale = min(1.0, s.max_grad_norm / norm) if s.max_grad_norm > 0 else 1.0
        for name, gradient in gradients.items():
            gradient = gradient.astype(np.float64) * scale
            self.first[name] = s.adam_beta1 * self.first[name] + (1 - s.adam_beta1) * gradient
            self.second[name] = s.adam_beta2 * self.second[name] + (1 - s.adam_beta2) * gradient**2
            first = self.first[name] / (1 - s.adam_beta1**self.steps)
            second = self.second[name] / (1 - s.adam_beta2**self.steps)
            decay = 0.0 if name.endswith(("norm.weight", ".bias")) else s.weight_decay
            self.weights[name] -= lr * (first / (np.sqrt(second) + s.adam_epsilon) + decay * self.weights[name])
        return norm


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.05, 1e6])
def test_a_step_is_adamw(model, max_grad_norm):
    settings = make_settings(max_grad_norm=max_grad_norm, lr_scheduler_type="linear", warmup_steps=2)
    engine = TrainingEngine(model, settings, 5, "actor")
    expected = NumpyAdamW(weights_of(model), settings)
    assert sum(name.endswith(".bias") for name in expected.weights) == 6
    for step in range(4):
        accumulate(engine, step)
        gradients = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
        metrics = engine.step()
        assert metrics["grad_norm"] == pytest.approx(expected.step(gradients, metrics["lr"]), rel=1e-5)
        assert 0.05 < metrics["grad_norm"] < 1e6  # so the three limits are off, on, and out of reach
        for name, value in weights_of(model).items():
            np.testing.assert_allclose(value, expected.weights[name], atol=2e-6, err_msg=name)
        assert all(p.grad is None or not p.grad.numpy().any() for p in model.parameters())


def test_weight_decay_alone_shrinks_matrices_and_neither_norms_nor_biases(model):
    engine = make_engine(model, weight_decay=0.5, learning_rate=0.1)
    before = weights_of(model)
    accumulate(engine, 0, scale=0.0)
    engine.step()
    for name, value in weights_of(model).items():
        kept = name.endswith(("norm.weight", ".bias"))
        np.testing.assert_allclose(value, before[name] * (1.0 if kept else 0.95), rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_accumulation_gives_the_same_step(tmp_path, parts):
    whole, split = make_model(tmp_path / "whole"), make_model(tmp_path / "split")
    engines = make_engine(whole), make_engine(split)
    for step in range(2):
        (loss,), losses = accumulate(engines[0], step), accumulate(engines[1], step, parts)
        assert len(losses) == parts and sum(losses) == pytest.approx(loss, rel=1e-5)
        norms = [engine.step()["grad_norm"] for engine in engines]
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    # Compared are moments, not weights: Adam makes a full step of any gradient, of rounding noise too.
    (first, _), (second, _) = (engine.state_dict() for engine in engines)
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_allclose(second[name], value, atol=1e-5 * abs(value).max() + 1e-9, err_msg=name)


def test_only_trainable_parameters_move(model):
    set_trainable_layers(model, 1)
    before, engine = weights_of(model), make_engine(model)
    train(engine, range(2))
    moved = {name for name, value in weights_of(model).items() if (value != before[name]).any()}
    assert moved == {name for name in before if name.startswith(("qwen2.layers.1.", "qwen2.norm."))}
    assert {key.split("/")[0] for key in engine.state_dict()[0]} == moved


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stops_the_run_and_leaves_the_weights(model, bad):
    engine = make_engine(model)
    train(engine, range(1))
    before, state = weights_of(model), engine.state_dict()[0]
    accumulate(engine, 1, scale=bad)
    with pytest.raises(RunError, match="the gradient of the actor is not finite"):
        engine.step()
    assert_same_bits(weights_of(model), before)
    assert_same_bits(engine.state_dict()[0], state)


def test_a_loss_without_gradient_adds_nothing(model):
    engine = make_engine(model, weight_decay=0.0)
    before = weights_of(model)
    one = micro_batch(model, 0)
    assert engine.accumulate([one._replace(finish=lambda _: (paddle.to_tensor(3.0), "report"))]) == ["report"]
    assert engine.step()["grad_norm"] == 0.0
    assert engine.accumulate([]) == []  # a process whose share is empty
    assert engine.step()["grad_norm"] == 0.0
    assert_same_bits(weights_of(model), before)


def test_a_forward_pass_gives_the_reports_and_learns_nothing(model):
    engine, before = make_engine(model, weight_decay=0.0), weights_of(model)
    (loss,) = accumulate(engine, 0)
    engine.discard()
    reports = engine.pipeline.forward([micro_batch(model, 0, slice(3)), micro_batch(model, 0, slice(3, ROWS))])
    assert len(reports) == 2 and sum(reports) == pytest.approx(loss, rel=1e-5)
    assert not model.training
    assert engine.step()["grad_norm"] == 0.0
    assert_same_bits(weights_of(model), before)
    accumulate(engine, 0)
    assert model.training


def test_discarded_gradients_do_not_count(tmp_path):
    clean, other = make_model(tmp_path / "clean"), make_model(tmp_path / "other")
    engines = make_engine(clean), make_engine(other)
    accumulate(engines[1], 5)
    engines[1].discard()
    for engine in engines:
        train(engine, range(2))
    assert_same_bits(weights_of(clean), weights_of(other))


TOTAL, PEAK, END = 8, 1e-2, 1e-7
AFTER_WARMUP = {  # share of the peak, by the share of the steps after warm-up that are done
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "constant_with_warmup": lambda done: 1.0,
    "polynomial": lambda done: (1 - done) * (1 - END / PEAK) + END / PEAK,
}


@pytest.mark.parametrize("kind", AFTER_WARMUP)
@pytest.mark.parametrize(("ratio", "steps", "warmup"), [(0.0, 0, 0), (0.3, 0, 3), (0.0, 2, 2), (0.9, 2, 2)])
def test_schedule(model, kind, ratio, steps, warmup):
    """The ratio is rounded up; a number of steps wins over it."""
    engine = make_engine(model, TOTAL, lr_scheduler_type=kind, warmup_ratio=ratio, warmup_steps=steps)
    rates = [engine.step()["lr"] for _ in range(TOTAL)]
    shares = [i / warmup if i < warmup else AFTER_WARMUP[kind]((i - warmup) / (TOTAL - warmup)) for i in range(TOTAL)]
    np.testing.assert_allclose(rates, np.array(shares) * PEAK, rtol=1e-9, atol=1e-15)


def test_constant_schedule_has_no_warmup(model):
    engine = make_engine(model, TOTAL, warmup_steps=3)
    assert [engine.step()["lr"] for _ in range(TOTAL)] == [PEAK] * TOTAL


def test_settings_from_arguments():
    args = SimpleNamespace(**vars(make_settings(warmup_steps=7, warmup_ratio=0.1)))
    args.critic_learning_rate, args.critic_weight_decay, args.critic_warmup_ratio = 5e-3, None, None
    assert OptimizerSettings.from_arguments(args) == make_settings(warmup_steps=7, warmup_ratio=0.1)
    critic = OptimizerSettings.from_arguments(args, "critic_")
    assert critic == make_settings(learning_rate=5e-3, warmup_steps=7, warmup_ratio=0.1)
    args.critic_warmup_ratio, args.critic_weight_decay = 0.0, 0.0  # zero is set, None is not
    critic = OptimizerSettings.from_arguments(args, "critic_")
    assert critic == make_settings(learning_rate=5e-3, weight_decay=0.0)


def test_a_resumed_run_is_bit_for_bit_the_same(tmp_path):
    changes = {"lr_scheduler_type": "cosine", "warmup_ratio": 0.5, "max_grad_norm": 0.3}
    model = make_model(tmp_path / "model")
    engine = make_engine(model, 4, **changes)
    train(engine, range(2))
    tensors, schedule = engine.state_dict()
    files, schedule = optimizer_files(tmp_path / "state", tensors), json.dumps(schedule)
    halfway = weights_of(model)
    metrics = train(engine, range(2, 4))

    fresh = make_model(tmp_path / "fresh", seed=9)
    for name, parameter in fresh.named_parameters():
        parameter.set_value(halfway[name])
    resumed = make_engine(fresh, 4, **changes)
    resumed.load_state_dict(files, json.loads(schedule))
    assert train(resumed, range(2, 4)) == metrics
    assert_same_bits(weights_of(fresh), weights_of(model))
    assert_same_bits(resumed.state_dict()[0], engine.state_dict()[0])
    assert resumed.state_dict()[1] == engine.state_dict()[1]
    assert not any((halfway[name] == value).all() for name, value in weights_of(model).items())


def test_state_has_structured_names(model):
    """Names that another process, whose layers Paddle numbers otherwise, finds again."""
    engine = make_engine(model)
    train(engine, range(1))
    kinds = ("moment1_0", "moment2_0", "beta1_pow_acc_0", "beta2_pow_acc_0")
    assert engine.state_dict()[0].keys() == {f"{name}/{kind}" for name in weights_of(model) for kind in kinds}


def test_the_state_before_the_first_step_is_taken_back(tmp_path):
    states = [make_engine(make_model(tmp_path / name), warmup_steps=2, lr_scheduler_type="linear") for name in "ab"]
    tensors, schedule = states[0].state_dict()
    assert tensors == {}
    states[1].load_state_dict(optimizer_files(tmp_path / "state", tensors), schedule)
    metrics = [train(engine, range(2)) for engine in states]
    assert metrics[0] == metrics[1]


def without(tensors, part):
    return {key: value for key, value in tensors.items() if part not in key}


WRONG = {
    "unknown parameter": (lambda t: t | {"qwen2.layers.7.bias/moment1_0": np.zeros(2)}, "differ: qwen2.layers.7.bias"),
    "no such form": (lambda t: t | {"moment": np.zeros(2)}, "differ"),
    "missing parameter": (lambda t: without(t, "qwen2.norm.weight"), "differ: qwen2.norm.weight"),
    "other shape": (
        lambda t: t | {"qwen2.norm.weight/moment1_0": np.zeros(31, np.float32)},
        r"qwen2.norm.weight/moment1_0 has shape \[31\], its parameter \[32\]",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_state_of_other_parameters_is_refused_and_nothing_changed(tmp_path, case):
    change, message = WRONG[case]
    engine, other = make_engine(make_model(tmp_path / "a")), make_engine(make_model(tmp_path / "b"))
    train(engine, range(2))
    train(other, range(1))
    tensors, schedule = engine.state_dict()
    before = {key: value.copy() for key, value in other.state_dict()[0].items()}
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(optimizer_files(tmp_path / "state", change(tensors)), schedule)
    assert_same_bits(other.state_dict()[0], before)
    assert other.state_dict()[1]["last_epoch"] == 1


@pytest.mark.parametrize(("stage", "unfrozen"), [(0, 1), (1, 0)])
def test_a_stage_refuses_a_state_without_its_parameters(tmp_path, stage, unfrozen):
    """As the whole model does: more layers are trained now than when the state was saved."""
    saved = make_model(tmp_path / "model")
    set_trainable_layers(saved, unfrozen)
    engine = make_engine(saved)
    train(engine, range(1))
    files, schedule = optimizer_files(tmp_path / "state", engine.state_dict()[0]), engine.state_dict()[1]
    for placement in (WHOLE, Placement(stages=2, stage=stage)):
        with pytest.raises(ValueError, match="parameters trained then and now differ"):
            make_engine(load_policy(tmp_path / "model", placement=placement)).load_state_dict(files, schedule)


@pytest.mark.parametrize("schedule", [None, {}, {"last_epoch": 2}, [1, 2]])
def test_a_state_without_schedule_is_refused(model, schedule, tmp_path):
    with pytest.raises(ValueError, match="no state of the learning-rate schedule"):
        make_engine(model).load_state_dict(optimizer_files(tmp_path, {}), schedule)
