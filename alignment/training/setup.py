"""What every stage does before its loop: output directory, precision, lengths, data sets."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import paddle

from alignment.ppo.models.adapters import ADAPTERS, is_adapter, resume_adapters
from alignment.ppo.models.freezing import set_trainable_layers
from alignment.ppo.models.loading import resolve_model_directory
from alignment.ppo.models.lora import Base, LoRASettings, add_adapters
from alignment.ppo.models.weights import weights_sha256
from alignment.runtime.console import say
from alignment.runtime.faults import UsageError
from alignment.runtime.lock import lock
from alignment.runtime.metrics import METRICS_FILE, is_main_process, keep_steps
from alignment.training.checkpoint import list_checkpoints, remove_checkpoint, step_of
from alignment.training.health import ALERTS_FILE
from alignment.training.resume import Start, clear_leftovers
from alignment.training.same_data import check_same_data
from data import load_dataset_modules

SAMPLES_FILE = "samples.jsonl"
RUN_FILES = (METRICS_FILE, SAMPLES_FILE, ALERTS_FILE)  # rows by step
LOCK_FILE = ".lock"


def take_output(args: Any) -> AbstractContextManager:
    """Make output_dir where it is not there yet; within what this returns no other run may work in it.

    Raises: UsageError if one does, or if it cannot be written.
    """
    output_dir = Path(args.output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        return lock(output_dir / LOCK_FILE) if is_main_process() else nullcontext()
    except OSError as fault:
        raise UsageError(f'"output_dir": {output_dir} cannot be written: {fault.strerror}') from None


def check_output(args: Any, start: Start, parts: tuple[str, ...] = ("",)) -> None:
    """Refuse to mix with an earlier run in output_dir, or to destroy it unasked.

    Args: start: what the run goes on from; parts: sub-directories of output_dir that hold checkpoints ("policy",
        "value"), or "" for itself.
    Raises: UsageError if output_dir holds what this run neither continues nor may overwrite.
    """
    earlier = _superseded(args, start, parts)
    if earlier and not (args.overwrite_output_dir or start.automatic):
        if start.checkpoint is None:
            problem = 'holds an earlier run; name another, or set "resume_from_checkpoint": "auto" to go on with it'
        else:
            problem = f"holds later checkpoints than the one to resume from ({earlier[0].name}); name another"
        raise UsageError(f'"output_dir": {args.output_dir} {problem} or "overwrite_output_dir": true to replace it')


def clear_output(args: Any, start: Start, parts: tuple[str, ...] = ("",)) -> None:
    """Remove what ``check_output`` found in the way, now that the new run can start, and what killed runs left."""
    if is_main_process():
        clear_leftovers(args.output_dir, start, parts)
        for path in _superseded(args, start, parts):
            remove_checkpoint(path) if path.is_dir() else path.unlink()
        if start.checkpoint is not None:
            keep_steps(Path(args.output_dir) / ALERTS_FILE, step_of(start.checkpoint))


def _superseded(args: Any, start: Start, parts: tuple[str, ...]) -> list[Path]:
    """Files of an earlier run; of one that is resumed, only its checkpoints after the one to go on from. Rank 0's."""
    if not is_main_process():
        return []
    output_dir = Path(args.output_dir)
    whole = [path for path in list_checkpoints(output_dir / parts[0]) if path not in start.passed_over]
    names = {path.name for path in whole}
    found = [path for part in parts for path in list_checkpoints(output_dir / part) if path.name in names]
    if start.is_inside(output_dir):
        return [path for path in found if step_of(path) > step_of(start.checkpoint)]
    return [path for name in RUN_FILES if (path := output_dir / name).exists()] + found


def weight_dtype(args: Any) -> str:
    """Type of the weights in memory; the optimizer keeps a float32 copy of 16-bit ones."""
    return "bfloat16" if args.bf16 and args.fp16_opt_level == "O2" else "float32"


def mixed_precision(args: Any) -> AbstractContextManager:
    """Matrix products in bfloat16 with float32 weights (bf16 at O1); otherwise changes nothing."""
    return paddle.amp.auto_cast(enable=args.bf16 and args.fp16_opt_level == "O1", dtype="bfloat16", level="O1")


def load_named(key: str, load: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``load(*args, **kwargs)``, its UsageError led by the argument that is to blame."""
    try:
        return load(*args, **kwargs)
    except UsageError as fault:
        raise UsageError(f'"{key}": {fault}') from fault


def model_source(args: Any, name: str, checkpoint: Path | None) -> str | Path:
    """What a supervised stage's weights are read from: ``name``; to resume without LoRA, the checkpoint.

    Raises: UsageError if ``checkpoint`` was written with LoRA and the run is without, or the other way round.
    """
    check_resumes_alike(args, checkpoint)
    return name if args.lora or checkpoint is None else checkpoint


def check_resumes_alike(args: Any, checkpoint: Path | None) -> None:
    """Raises UsageError unless the run to resume (None: none) had adapters as this one has."""
    if checkpoint is not None and is_adapter(checkpoint / ADAPTERS) != args.lora:
        now, then = json.dumps(args.lora), json.dumps(not args.lora)
        raise UsageError(f'"lora": {now}, but {checkpoint} was trained with {then}')


def set_trained(model: paddle.nn.Layer, args: Any, name: str, checkpoint: Path | None) -> None:
    """Have a supervised stage's model train what the arguments say: adapters, or all or the upper of its own layers.

    Args: name: the model it was read from without a checkpoint; checkpoint: what to resume from, or None.
    """
    settings = LoRASettings.from_arguments(args)
    if settings is None:
        load_named("num_layers_unfrozen", set_trainable_layers, model, args.num_layers_unfrozen)
        return
    directory = resolve_model_directory(name)
    add_adapters(model, settings, Base(directory, weights_sha256(directory)), args.seed)
    if checkpoint is not None:
        load_named("resume_from_checkpoint", resume_adapters, model, checkpoint)


def check_positions(key: str, model: paddle.nn.Layer, tokens: int) -> None:
    """Raises UsageError if sequences may grow to more ``tokens`` than the model has positions."""
    limit = model.config.max_position_embeddings
    if tokens > limit:
        raise UsageError(f'"{key}": sequences of {tokens} tokens are more than the model\'s {limit} positions')


def load_dataset(
    kind: Callable[..., Any], datasets: Any, data_args: Any, args: Any, tokenizer: Any, max_length: int | None = None
) -> Any:
    """A tokenised data set of ``kind`` (data.SupervisedDataset, ...) over ``datasets``, by the stage's arguments.

    Args: max_length: tokens; default: the argument of that name.
    """
    return kind(
        datasets,
        tokenizer,
        max_length=max_length or data_args.max_length,
        template=data_args.prompt_template,
        truncation=data_args.truncation,
        seed=args.data_seed,
    )


def load_data(
    kind: Callable[..., Any],
    data_args: Any,
    args: Any,
    tokenizer: Any,
    checkpoint: Path | None,
    max_length: int | None = None,
) -> tuple[Any, Any]:
    """Training and held-out data sets, each as ``load_dataset`` gives it; held-out None where none is asked.

    Raises: UsageError if ``checkpoint``, which the run goes on from, is of a run with other samples.
    """
    load_dataset_modules(data_args.dataset_modules)
    how = (data_args, args, tokenizer, max_length)
    train_set, eval_set = load_dataset(kind, data_args.train_datasets, *how), None
    say(train_set.report.summary())
    if data_args.eval_datasets:
        eval_set = load_dataset(kind, data_args.eval_datasets, *how)
        say(f"held out: {eval_set.report.summary()}")
    elif data_args.eval_split_ratio:
        train_set, eval_set = train_set.split_train_test(data_args.eval_split_ratio, seed=args.data_seed)
        say(f"held out: {len(eval_set)} of them")
    check_same_data({"train_datasets": train_set, "eval_datasets": eval_set}, checkpoint)
    return train_set, eval_set


def total_steps(args: Any, steps_per_epoch: int) -> int:
    """Length of the run: max_steps, or num_train_epochs passes over the data."""
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)


def is_due(strategy: Any, every: int | None, step: int, steps_per_epoch: int) -> bool:
    """Whether something of evaluation_strategy or save_strategy ("no", "steps", "epoch") happens after ``step``."""
    name = getattr(strategy, "value", strategy)
    return step % every == 0 if name == "steps" else name == "epoch" and step % steps_per_epoch == 0
