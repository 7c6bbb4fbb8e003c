"""Arguments that every stage shares: PaddleNLP's TrainingArguments, narrowed and checked, and the data arguments."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from paddlenlp.trainer import TrainingArguments

from alignment.parallel.layout import resolve_layout
from alignment.parallel.topology import join
from alignment.parallel.watchdog import start_watchdog
from alignment.ppo.models.lora import TARGETS as LORA_TARGETS
from alignment.runtime.argument_fields import argument
from alignment.runtime.bootstrap import configure_paddle
from alignment.runtime.console import say
from alignment.runtime.faults import UsageError, process_count
from alignment.runtime.writers import check_installed
from alignment.training.argument_checks import (
    planned_processes,
    refuse_unbuilt,
    settle_best,
    settle_lora,
    validate_evaluation,
)
from alignment.training.inherited_arguments import INHERITED, LEGACY, LIMITS, UNBUILT_DEGREES


@dataclass
class StageArguments(TrainingArguments):
    """PaddleNLP's TrainingArguments for one stage; creating it sets the device and joins the launcher's processes.

    Without a GPU bf16 becomes False, with a notice. Raises UsageError where PaddleNLP refuses a value.
    """

    INHERITED: ClassVar[dict[str, tuple[str, ...]]] = INHERITED
    LIMITS: ClassVar[dict[str, dict[str, Any]]] = LIMITS
    LEGACY: ClassVar[frozenset[str]] = LEGACY

    data_seed: int | None = argument(
        None, "Seed of the order of the data; default: seed.", group="Length of the run", ge=0, lt=2**32
    )
    num_layers_unfrozen: int | None = argument(
        None,
        "Train only this many upper layers (and final norm and head); -1 or null: everything.",
        group="Precision and memory",
        ge=-1,
    )
    lora: bool = argument(
        False,
        "Keep the model's own weights and train low-rank adapters beside them; PPO's models then share those weights.",
        group="LoRA",
    )
    lora_rank: int = argument(8, "Rank of the adapters.", group="LoRA", ge=1)
    lora_alpha: int | None = argument(
        None, "Adapters count lora_alpha / lora_rank times; default: 2 * lora_rank.", group="LoRA", ge=1
    )
    lora_target_modules: list[str] = argument(
        list, "Linear layers that get adapters; default: all of these.", group="LoRA", choices=LORA_TARGETS
    )
    device: str = argument(
        "auto",
        "Where to compute; auto takes the GPU if there is one.",
        group="Precision and memory",
        choices=("auto", "cpu", "gpu"),
    )
    resume_from_checkpoint: str | bool | None = argument(
        None,
        'Go on from this checkpoint-N directory (ppo: policy/checkpoint-N); "true": from the newest of output_dir; '
        '"auto": from its newest sound one, or start where it has none.',
        group="Output",
    )
    save_error: str = argument(
        "stop",
        "When a checkpoint cannot be written, as on a full disk: end the run, or go on without it; the last one of a "
        "run must be written.",
        group="Output",
        choices=("stop", "skip"),
    )
    early_stopping_patience: int | None = argument(
        None, "End the run after so many evaluations in a row without a better one.", group="Evaluation", ge=1
    )
    logging_steps: int = argument(1, "Write metrics every so many steps.", group="Output", ge=1)
    nonfinite: str = argument(
        "stop",
        "A loss, gradient, reward or log-probability that is not finite: stop ends the run; skip leaves the optimizer "
        "step (for a reward the iteration's update) out.",
        group="Guards",
        choices=("stop", "skip"),
    )
    nonfinite_limit: int = argument(
        10, "skip: so many steps left out in a row end the run after all.", group="Guards", ge=1
    )
    watchdog_timeout: float = argument(
        300.0,
        "Several processes: one that does not answer for so many seconds, or all waiting for each other that long, "
        "ends the run with a line that says who; 0: never.",
        group="Guards",
        ge=0,
    )
    report_to: list[str] = argument(
        list,
        "Writers beside metrics.jsonl; all: visualdl and tensorboard; wandb must be installed.",
        group="Output",
        choices=("visualdl", "tensorboard", "wandb", "all", "none"),
    )
    log_level: str = argument(
        "info",
        "debug shows the messages of third-party libraries.",
        group="Output",
        choices=("info", "debug"),
    )
    dry_run: bool = argument(
        False,
        "Check the arguments, plan the memory, run one step of a small random model of the same shape, and remove it "
        "all again: output_dir stays as it is.",
        group="Dry run",
    )
    model_config: str | None = argument(
        None,
        "config.json, its directory, or a name in config/shapes: what a dry run takes for the shape of a model that "
        "is not on this machine.",
        group="Dry run",
    )
    do_train: bool = argument(True, "Training always runs; false is not available.", group="Length of the run")

    def __post_init__(self) -> None:
        log_level, report_to, loads_best = self.log_level, list(self.report_to), self.load_best_model_at_end
        self.load_best_model_at_end = False  # PaddleNLP would want evaluations and checkpoints at the same steps
        # without a date, as PaddleNLP would add, so that a resumed run goes on with the same files
        self.logging_dir = self.logging_dir or str(Path(self.output_dir) / "runs")
        device = configure_paddle(self.device, debug=log_level == "debug")
        if device == "cpu" and self.bf16:
            self.bf16 = False
            say('notice: "bf16": true needs a GPU; on this CPU everything is computed in float32')
        self.device = device.split(":")[0]
        # PaddleNLP joins the launcher's processes here, and Paddle writes a banner of flags to stderr while it does
        quiet = contextlib.nullcontext() if log_level == "debug" else contextlib.redirect_stderr(io.StringIO())
        self.layout = resolve_layout(vars(self), process_count())
        with quiet:
            join(self.layout, self.seed)
            start_watchdog(self.watchdog_timeout)
            try:
                super().__post_init__()
            except (ValueError, AssertionError) as fault:
                raise UsageError(f"arguments: {fault}") from fault
        # PaddleNLP resets these two: the first to -1, the second to VisualDL where it is empty
        self.log_level, self.report_to = log_level, report_to
        self.load_best_model_at_end = loads_best

    @staticmethod
    def validate(values: dict[str, Any], metrics: Sequence[str] = ("loss", "perplexity")) -> None:
        """Checks combinations, before any instance exists, and settles defaults that depend on other arguments.

        Args:
            metrics: names, after "eval/", of what the stage's evaluations measure, the default of
                metric_for_best_model first; without those that depend on data sets or reward sources.
        """
        resolve_layout(values, planned_processes(values))
        refuse_unbuilt(values, {name: (-1, 1) for name in UNBUILT_DEGREES})
        refuse_unbuilt(values, {"do_train": (True,), "fp16": (False,)})
        settle_lora(values)
        if values["data_seed"] is None:
            values["data_seed"] = values["seed"]
        if "all" in values["report_to"]:
            values["report_to"] = ["visualdl", "tensorboard", *values["report_to"]]
        values["report_to"] = [name for name in dict.fromkeys(values["report_to"]) if name not in ("all", "none")]
        check_installed(values["report_to"])
        validate_evaluation(values)
        settle_best(values, metrics)
        if isinstance(values["resume_from_checkpoint"], bool):
            values["resume_from_checkpoint"] = "true" if values["resume_from_checkpoint"] else None


@dataclass
class DataArguments:
    """Which samples a stage reads, and how they become token ids."""

    train_datasets: str | dict[str, Any] = argument(
        "",
        'Data sets to train on (required): "name[:proportion[:path]], ..." or a mapping {"name": proportion}.',
        group="Data",
    )
    eval_datasets: str | dict[str, Any] | None = argument(
        None, "Held-out data sets, written as train_datasets is.", group="Data"
    )
    eval_split_ratio: float | None = argument(
        None, "Hold out this part of the training data instead of eval_datasets.", group="Data", gt=0, lt=1
    )
    dataset_modules: list[str] = argument(
        list, "Modules or .py files imported first, so that data sets in them register.", group="Data"
    )
    max_length: int = argument(2048, "Longest prompt with its answer, in tokens.", group="Data", ge=2)
    prompt_template: str = argument(
        "chat", "chat (the tokenizer's own template), pku, hh, plain, or a registered name.", group="Data"
    )
    truncation: str = argument(
        "prompt",
        "A sample over max_length: prompt shortens its oldest part, drop leaves it out, error stops the run.",
        group="Data",
        choices=("prompt", "drop", "error"),
    )

    @staticmethod
    def validate(values: dict[str, Any]) -> None:
        """Raises UsageError when there is nothing to train on."""
        if not values["train_datasets"]:
            raise UsageError('"train_datasets": required; name at least one data set')


@dataclass
class ModelArguments:
    """The one model a supervised stage starts from."""

    model_name_or_path: str = argument(
        "smollm2-135m-instruct", "Local directory, hub name, or the embedded smollm2-135m-instruct.", group="Model"
    )
