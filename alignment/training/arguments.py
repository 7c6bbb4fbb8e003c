"""Arguments that every stage shares: PaddleNLP's TrainingArguments, narrowed and checked, and the data arguments."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from paddlenlp.trainer import TrainingArguments

from alignment.parallel.layout import least_processes, resolve_layout
from alignment.parallel.topology import join
from alignment.parallel.watchdog import start_watchdog
from alignment.ppo.models.lora import TARGETS as LORA_TARGETS
from alignment.runtime.argument_fields import argument
from alignment.runtime.bootstrap import configure_paddle
from alignment.runtime.console import say
from alignment.runtime.faults import UsageError, process_count
from alignment.runtime.writers import check_installed

SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "polynomial")
UNBUILT_DEGREES = (
    "sep_parallel_degree",
    "context_parallel_degree",
    "expert_parallel_degree",
    "expert_tensor_parallel_degree",
)


@dataclass
class StageArguments(TrainingArguments):
    """PaddleNLP's TrainingArguments for one stage; creating it sets the device and joins the launcher's processes.

    Without a GPU bf16 becomes False, with a notice. Raises UsageError where PaddleNLP refuses a value.
    """

    INHERITED: ClassVar[dict[str, tuple[str, ...]]] = {
        "Length of the run": ("max_steps", "num_train_epochs", "seed"),
        "Batches": (
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "per_device_eval_batch_size",
            "dataloader_drop_last",
        ),
        "Optimizer": (
            "learning_rate",
            "lr_scheduler_type",
            "warmup_ratio",
            "warmup_steps",
            "weight_decay",
            "adam_beta1",
            "adam_beta2",
            "adam_epsilon",
            "max_grad_norm",
        ),
        "Precision and memory": ("bf16", "fp16", "fp16_opt_level", "recompute"),
        "Evaluation": (
            "evaluation_strategy",
            "eval_steps",
            "metric_for_best_model",
            "greater_is_better",
            "load_best_model_at_end",
        ),
        "Output": (
            "output_dir",
            "logging_dir",
            "disable_tqdm",
            "save_strategy",
            "save_steps",
            "save_total_limit",
            "use_async_save",
            "overwrite_output_dir",
        ),
        "Parallelism": (
            "tensor_parallel_degree",
            "pipeline_parallel_degree",
            "sharding",
            "sharding_parallel_degree",
            "sharding_degree",
            "sequence_parallel",
            *UNBUILT_DEGREES,
        ),
    }
    LIMITS: ClassVar[dict[str, dict[str, Any]]] = {
        **{name: {"help": "More than 1 is not available yet."} for name in UNBUILT_DEGREES},
        "tensor_parallel_degree": {"help": "Processes that share each large matrix; -1: 1."},
        "pipeline_parallel_degree": {"help": "Processes that share the layers, one stage each; -1: 1."},
        "sharding": {
            "help": 'What processes with the same weights divide: "stage1" the optimizer, "stage2" also gradients, '
            '"stage3" also parameters; "": nothing.'
        },
        "sharding_parallel_degree": {"help": "Processes that divide it; -1: all that the other degrees leave."},
        "sharding_degree": {"help": "The same, by its old name."},
        "sequence_parallel": {"help": "Divide norms' activations over tensor-parallel processes by tokens."},
        "max_steps": {"ge": -1},
        "seed": {"ge": 0, "lt": 2**32},
        "per_device_train_batch_size": {"ge": 1},
        "gradient_accumulation_steps": {"ge": 1},
        "per_device_eval_batch_size": {"ge": 1},
        "learning_rate": {"gt": 0},
        "lr_scheduler_type": {"choices": SCHEDULES, "help": "Schedule of the learning rate."},
        "warmup_ratio": {"ge": 0, "le": 1},
        "warmup_steps": {"ge": 0},
        "weight_decay": {"ge": 0},
        "adam_beta1": {"ge": 0, "lt": 1},
        "adam_beta2": {"ge": 0, "lt": 1},
        "adam_epsilon": {"gt": 0},
        "max_grad_norm": {"ge": 0, "help": "Gradients are scaled down to this norm; 0 turns clipping off."},
        "num_train_epochs": {"gt": 0, "help": "Passes over the training data; max_steps replaces it."},
        "bf16": {"help": "Train in bfloat16; without a GPU, in float32."},
        "fp16": {"help": "Not available yet (it needs loss scaling); use bf16."},
        "fp16_opt_level": {"choices": ("O1", "O2"), "help": "16-bit training: O2 also keeps the weights in 16 bits."},
        "recompute": {"help": "Compute activations again in the backward pass to save memory."},
        "eval_steps": {"ge": 1},
        "metric_for_best_model": {
            "help": "Metric of an evaluation, by its name in metrics.jsonl (loss means eval/loss), that says which "
            "model is the best; its checkpoint is written at once and kept. Default where it is needed: loss."
        },
        "greater_is_better": {"help": "Of that metric; default: false if its name ends with loss."},
        "load_best_model_at_end": {
            "help": "Who loads the run's directory as a model gets the best checkpoint instead of the newest."
        },
        "save_steps": {"ge": 1},
        "save_total_limit": {"ge": 1, "help": "Keep so many checkpoints, and the best."},
        "use_async_save": {
            "help": "Training goes on while a checkpoint is written; until it is, its content takes memory once more."
        },
        "output_dir": {"help": "Directory for checkpoints, metrics.jsonl, samples.jsonl and run.json."},
        "logging_dir": {"help": "Directory of VisualDL and TensorBoard files; default: output_dir/runs."},
    }
    LEGACY: ClassVar[frozenset[str]] = frozenset(
        # keys of PaddleNLP's own argument files that are no fields of its TrainingArguments
        "use_flash_attention dataset_name_or_path task_name eval_with_do_generation save_generation_output lazy "
        "recompute_granularity recompute_use_reentrant tensor_parallel_output autotuner_benchmark benchmark "
        "use_fused_head_and_loss_fn fused_linear use_attn_mask_start_row_indices tokenizer_name_or_path "
        "min_learning_rate critic_min_learning_rate decay_steps critic_decay_steps critic_recompute_granularity "
        "kl_loss_coeff use_tgt_len_value per_device_rollout_batch_size eos_token use_rm_server chat_template stage "
        "actor_tokenizer_alpha reward_tokenizer_alpha reward_critic_tokenizer_alpha".split()
    )

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
    def validate(values: dict[str, Any]) -> None:
        """Checks combinations, before any instance exists, and settles defaults that depend on other arguments."""
        resolve_layout(values, planned_processes(values))
        refuse_unbuilt(values, {name: (-1, 1) for name in UNBUILT_DEGREES})
        refuse_unbuilt(
            values,
            {
                "do_train": (True,),
                "fp16": (False,),
            },
        )
        _settle_lora(values)
        if values["data_seed"] is None:
            values["data_seed"] = values["seed"]
        if "all" in values["report_to"]:
            values["report_to"] = ["visualdl", "tensorboard", *values["report_to"]]
        values["report_to"] = [name for name in dict.fromkeys(values["report_to"]) if name not in ("all", "none")]
        check_installed(values["report_to"])
        _validate_evaluation(values)
        _settle_best(values)
        if isinstance(values["resume_from_checkpoint"], bool):
            values["resume_from_checkpoint"] = "true" if values["resume_from_checkpoint"] else None


def planned_processes(values: Mapping[str, Any]) -> int:
    """Processes of the job; of a dry run that has only one, as many as the job's degrees ask for."""
    started = process_count()
    return least_processes(values) if values["dry_run"] and started == 1 else started


def _settle_lora(values: dict[str, Any]) -> None:
    values["lora_alpha"] = values["lora_alpha"] or 2 * values["lora_rank"]
    values["lora_target_modules"] = list(dict.fromkeys(values["lora_target_modules"])) or list(LORA_TARGETS)
    for name in ("num_layers_unfrozen", "critic_num_layers_unfrozen"):
        if values["lora"] and values.get(name) not in (None, -1):
            raise UsageError(f'"{name}": {values[name]} does not go with "lora": true; set it to null')


def _validate_evaluation(values: dict[str, Any]) -> None:
    if values["eval_datasets"] and values["eval_split_ratio"]:
        raise UsageError('"eval_split_ratio": give it or "eval_datasets", not both')
    has_data = values["eval_datasets"] or values["eval_split_ratio"]
    strategy = getattr(values["evaluation_strategy"], "value", values["evaluation_strategy"])
    if strategy != "no" and not has_data:
        raise UsageError(
            f'"evaluation_strategy": "{strategy}" needs held-out data: set "eval_datasets" or "eval_split_ratio"'
        )
    if strategy == "steps" and values["eval_steps"] is None:
        raise UsageError('"evaluation_strategy": "steps" needs "eval_steps"')


def _settle_best(values: dict[str, Any]) -> None:
    wanted = [name for name in ("load_best_model_at_end", "early_stopping_patience") if values[name]]
    name = values["metric_for_best_model"] or ("loss" if wanted else None)
    if name is None:
        return
    if getattr(values["evaluation_strategy"], "value", values["evaluation_strategy"]) == "no":
        key = "metric_for_best_model" if values["metric_for_best_model"] else wanted[0]
        raise UsageError(f'"{key}": needs evaluations to compare; set "evaluation_strategy"')
    values["metric_for_best_model"] = name = name if "/" in name else f"eval/{name.removeprefix('eval_')}"
    if values["greater_is_better"] is None:
        values["greater_is_better"] = not name.endswith("loss")


def refuse_unbuilt(values: Mapping[str, Any], built: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises UsageError for the first argument whose value is not among those that work today."""
    for name, allowed in built.items():
        if values[name] not in allowed:
            works = " or ".join(map(json.dumps, allowed))
            raise UsageError(f'"{name}": {json.dumps(values[name])} is not available yet; what works today is {works}')


@dataclass
class DataArguments:
    """Which samples a stage reads, and how they become token ids."""

    train_datasets: str | dict[str, Any] = argument(
        "",
        'Data sets to train on: "name[:proportion[:path]], ..." or a mapping {"name": proportion}.',
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
