"""A tiny language model to train on a fixed batch, for the tests of the engine and of checkpoints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import paddle
from safetensors.numpy import save_file

from alignment.parallel.pipeline import MicroBatch
from alignment.ppo.models.policy import Packed, target_log_probs
from alignment.training.checkpoint import OptimizerFiles
from alignment.training.engine import OptimizerSettings, TrainingEngine
from tests.models.tiny import tiny_policy

ROWS, WIDTH = 8, 7


def make_settings(**changes) -> OptimizerSettings:
    values = {
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0.0,
        "warmup_steps": 0,
    }
    return OptimizerSettings(**values | changes)


def make_model(directory: Path, **changes) -> paddle.nn.Layer:
    """Qwen2: its attention has biases."""
    return tiny_policy(directory, "qwen2", tied=True, **{"num_hidden_layers": 2, **changes}).model


def make_engine(model: paddle.nn.Layer, total_steps: int = 10, **changes) -> TrainingEngine:
    return TrainingEngine(model, make_settings(**changes), total_steps, "actor")


def micro_batch(model: paddle.nn.Layer, step: int, rows=slice(None), scale: float = 1.0) -> MicroBatch:
    """Some rows of the batch of ``step``: their cross-entropy, divided by the tokens of the whole batch.

    Its report is that number; what is learnt is ``scale`` times it.
    """
    ids = paddle.to_tensor(np.random.default_rng(step).integers(4, 48, [ROWS, WIDTH])[rows])
    everything = paddle.ones(ids.shape, dtype="bool")

    def finish(hidden: paddle.Tensor) -> tuple[paddle.Tensor, float]:
        log_probs = target_log_probs(model, hidden, Packed(ids, everything, everything))
        loss = -log_probs.sum() / (ROWS * (WIDTH - 1))
        return scale * loss, float(loss)

    return MicroBatch(ids, everything, finish)


def accumulate(engine: TrainingEngine, step: int, parts: int = 1, scale: float = 1.0) -> list[float]:
    """Add the gradients of the batch of ``step`` in so many micro-batches; returns their losses."""
    rows = [slice(i * ROWS // parts, (i + 1) * ROWS // parts) for i in range(parts)]
    return engine.accumulate([micro_batch(engine.model, step, part, scale) for part in rows])


def train(engine: TrainingEngine, steps) -> list[dict[str, float]]:
    metrics = []
    for step in steps:
        accumulate(engine, step)
        metrics.append(engine.step())
    return metrics


def optimizer_files(directory: Path, tensors: dict[str, np.ndarray]) -> OptimizerFiles:
    """A checkpoint's optimizer file with these tensors."""
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / OptimizerFiles.single)
    return OptimizerFiles(directory)


def weights_of(model: paddle.nn.Layer) -> dict[str, np.ndarray]:
    return {name: parameter.numpy().copy() for name, parameter in model.named_parameters()}


def assert_same_bits(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype and value.tobytes() == second[name].tobytes(), name
