"""Writers of checkpoints, real ones and ones of nothing but a state, for the tests of checkpoints."""

from __future__ import annotations

from types import SimpleNamespace

from alignment.ppo.models.saving import collect_model
from alignment.training.best import BestTracker
from alignment.training.checkpoint import content
from alignment.training.sums import measure, write_sums
from alignment.training.writer import CheckpointWriter

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


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
