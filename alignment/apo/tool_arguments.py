"""Arguments of run_sample.py and run_score.py."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from dataclasses import dataclass
from typing import Any, ClassVar

from alignment.parallel.layout import resolve_layout
from alignment.parallel.topology import join
from alignment.parallel.watchdog import start_watchdog
from alignment.ppo.arguments import REWARDS, validate_rewards
from alignment.ppo.arguments import TrainingArguments as PPOArguments
from alignment.runtime.argument_fields import argument
from alignment.runtime.bootstrap import configure_paddle
from alignment.runtime.faults import UsageError, process_count
from alignment.runtime.run_record import resolved_arguments
from alignment.training.arguments import DataArguments, StageArguments


def like(owner: type, name: str) -> Any:
    """A field like another class's argument of that name."""
    field = owner.__dataclass_fields__[name]
    return dataclasses.field(
        default=field.default, default_factory=field.default_factory, metadata=field.metadata, kw_only=True
    )


@dataclass(kw_only=True)
class ToolArguments:
    """What both commands share; creating it sets the device and joins the launcher's processes.

    Raises: UsageError for a layout that the job cannot have, and for bfloat16 without a GPU.
    """

    WITHOUT_EFFECT: ClassVar[tuple[str, ...]] = (
        "output_file", "overwrite_output_file", "per_device_prompt_batch_size", "per_device_eval_batch_size",
        "rollout_batch_size", "use_fusemt", "tensor_parallel_degree", "pipeline_parallel_degree", "device",
        "disable_tqdm", "log_level", "watchdog_timeout", "reward_server_timeout", "reward_server_retries",
        "reward_server_token",
    )  # fmt: skip
    fp16_opt_level: ClassVar[str] = "O2"  # bf16: the weights themselves

    input_file: str | None = argument(None, "File to read: .json or .jsonl.", group="Data")
    query_file: str | None = argument(
        None, "File with the queries of golden answers that stand in input_file without theirs.", group="Data"
    )
    dataset_modules: list[str] = like(DataArguments, "dataset_modules")
    prompt_template: str = like(DataArguments, "prompt_template")
    truncation: str = argument(
        "prompt",
        "A prompt over max_prompt_len: prompt shortens its oldest part, drop leaves it out, error stops the run.",
        group="Data",
        choices=("prompt", "drop", "error"),
    )
    max_prompt_len: int = argument(2048, "Longest prompt, in tokens.", group="Data", ge=1, aliases=("max_src_len",))
    tensor_parallel_degree: int = argument(-1, "Processes that share each large matrix; -1: 1.", group="Parallelism")
    pipeline_parallel_degree: int = argument(
        -1, "Processes that share the layers, one stage each; -1: 1.", group="Parallelism"
    )
    bf16: bool = argument(False, "Compute in bfloat16; needs a GPU.", group="Precision and memory")
    device: str = like(StageArguments, "device")
    output_file: str = argument(dataclasses.MISSING, "File to write: .json or .jsonl.", group="Output")
    overwrite_output_file: bool = argument(
        False, "Replace output_file, and what an unfinished run with other arguments has done for it.", group="Output"
    )
    disable_tqdm: bool = argument(False, "No progress bar.", group="Output")
    log_level: str = like(StageArguments, "log_level")
    watchdog_timeout: float = like(StageArguments, "watchdog_timeout")

    def __post_init__(self) -> None:
        device = configure_paddle(self.device, debug=self.log_level == "debug")
        if device == "cpu" and self.bf16:
            raise UsageError('"bf16": true needs a GPU: Paddle has no 16-bit kernels for the CPU; set it to false')
        self.device = device.split(":")[0]
        self.layout = resolve_layout(_layout_values(vars(self)), process_count())
        quiet = contextlib.nullcontext() if self.log_level == "debug" else contextlib.redirect_stderr(io.StringIO())
        with quiet:
            join(self.layout)
            start_watchdog(self.watchdog_timeout)

    @staticmethod
    def validate(values: dict[str, Any]) -> None:
        """Checks combinations, before any instance exists."""
        resolve_layout(_layout_values(values), process_count())

    def asked(self) -> dict[str, Any]:
        """The arguments, by name, that results depend on (but for rounding)."""
        values = resolved_arguments([self])
        return {name: value for name, value in values.items() if name not in self.WITHOUT_EFFECT}


def _layout_values(values: dict[str, Any]) -> dict[str, Any]:
    undivided = {"sharding": "", "sharding_parallel_degree": -1, "sharding_degree": -1, "sequence_parallel": False}
    return values | undivided


@dataclass(kw_only=True)
class SampleArguments(ToolArguments):
    """Of run_sample.py."""

    model_name_or_path: str = argument(
        "smollm2-135m-instruct",
        "Policy that answers: local directory, hub name, or the embedded smollm2-135m-instruct.",
        group="Model",
    )
    datasets: str | dict[str, Any] | None = argument(
        None,
        'Instead of input_file, registered data sets whose prompts are answered: "name[:proportion[:path]], ...".',
        group="Data",
    )
    data_seed: int = argument(42, "Seed of what a proportion of a data set takes.", group="Data", ge=0, lt=2**32)
    seed: int = argument(42, "Seed of the answers.", group="Sampling", ge=0, lt=2**32)
    num_return_sequences: int = argument(4, "Answers a query.", group="Sampling", ge=1)
    temperature: float = argument(1.0, "Sampling temperature; 0: always the likeliest token.", group="Sampling", ge=0)
    top_p: float = argument(1.0, "Sample from the likeliest tokens of this mass.", group="Sampling", gt=0, le=1)
    top_k: int = argument(0, "Sample from this many likeliest tokens; 0: all.", group="Sampling", ge=0)
    repetition_penalty: float = argument(1.0, "Divides the logits of tokens seen before.", group="Sampling", gt=0)
    min_new_tokens: int = argument(1, "Shortest answer, its end included.", group="Sampling", ge=1)
    max_new_tokens: int = argument(256, "Longest answer.", group="Sampling", ge=1)
    stop_strings: list[str] | None = argument(
        None, "Texts that end an answer, beside the model's end tokens; the answer ends before them.", group="Sampling"
    )
    per_device_prompt_batch_size: int = argument(
        32, "Queries a device answers between two writes to the disk.", group="Batches", ge=1
    )
    rollout_batch_size: int = like(PPOArguments, "rollout_batch_size")
    use_fusemt: bool = like(PPOArguments, "use_fusemt")

    @staticmethod
    def validate(values: dict[str, Any]) -> None:
        """See ToolArguments.validate."""
        ToolArguments.validate(values)
        if bool(values["input_file"]) == bool(values["datasets"]):
            raise UsageError('give either "input_file" or "datasets", where the queries come from')
        if values["query_file"] and not values["input_file"]:
            raise UsageError(f'"query_file": {values["query_file"]} needs golden answers in "input_file"')
        if "" in (values["stop_strings"] or ()):
            raise UsageError('"stop_strings": "" would end every answer at once')
        if values["temperature"] == 0 and values["num_return_sequences"] > 1:
            raise UsageError(
                f'"temperature": 0 gives "num_return_sequences": {values["num_return_sequences"]} equal answers; set '
                "one of them to another value"
            )


@dataclass(kw_only=True)
class ScoreArguments(ToolArguments):
    """Of run_score.py."""

    reward_model_name_or_path: str | None = argument(None, "Reward model.", group="Reward")
    actor_model_name_or_path: str | None = argument(
        None,
        "Policy whose tokenizer and chat template write the prompts, as in PPO; default: the reward model.",
        group="Reward",
    )
    reward_function: str | None = like(PPOArguments, "reward_function")
    reward_server: str | None = like(PPOArguments, "reward_server")
    reward_server_timeout: float = like(PPOArguments, "reward_server_timeout")
    reward_server_retries: int = like(PPOArguments, "reward_server_retries")
    reward_server_token: str | None = like(PPOArguments, "reward_server_token")
    reward_weights: list[float] | None = like(PPOArguments, "reward_weights")
    per_device_eval_batch_size: int = argument(8, "Answers of one forward pass.", group="Batches", ge=1)

    @staticmethod
    def validate(values: dict[str, Any]) -> None:
        """See ToolArguments.validate."""
        ToolArguments.validate(values)
        if not values["input_file"]:
            raise UsageError('"input_file": required; name the file whose answers are scored')
        validate_rewards(values)
        if not (values["actor_model_name_or_path"] or values["reward_model_name_or_path"]):
            raise UsageError(
                f'"actor_model_name_or_path": required, for no reward model is among {", ".join(REWARDS)} and a '
                "tokenizer must write the prompts"
            )
