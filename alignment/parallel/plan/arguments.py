"""What the plan reads: its own options, and those arguments of a stage that decide over memory and communication.

Names, defaults and limits are those of the stages; here they stand apart, because the stages' own classes load Paddle.
A test compares the two.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from alignment.parallel.layout import STAGES as SHARDING
from alignment.runtime.argument_fields import Argument, argument, arguments_of
from alignment.runtime.arguments import build_parser, read_json_object
from alignment.runtime.faults import UsageError

STAGES = ("ppo", "offline", "rm", "sft", "update")
ACTOR_STAGES = STAGES[:2]  # their policy is an actor beside other models
RAGGED = "prompts have as many answers as the data give them"
UPDATES, PAIRS = ("rjs", "rrhf", "dpo"), ("best_worst", "all")
OBJECTIVES = ("ppo", "apa", "awr", "bc", "ilql")
CRITIC_TRAINING = ("first", "joint", "none")
EVALUATION = ("no", "steps", "epoch")
EVAL_MODES = ("", "single", "tensor_parallel")
_SHAPES = ("model_config", "reward_model_config")  # options that an argument file may hold, for its dry run
_MISSPELT = 0.9  # likeness from which an unknown key is taken for a slip of the pen
_OWN, _MODEL, _BATCH, _MEMORY, _LAYOUT = "Plan", "Model", "Batches and lengths", "Memory", "Parallelism"


@dataclass(frozen=True)
class Options:
    """Options of the command itself."""

    processes: int = field(metadata={"help": "Processes of the job, one device each.", "group": _OWN, "ge": 1})
    device_memory_gb: float = argument(80.0, "Memory of one device, in GB of 1e9 bytes.", group=_OWN, gt=0)
    stage: str | None = argument(
        None,
        "Which script the file is for; default, if it names an actor: offline with that script's arguments, else ppo.",
        group=_OWN,
        choices=STAGES,
    )
    model_config: str | None = argument(
        None,
        "config.json, its directory, or a name in config/shapes, that stands for the model of the argument file.",
        group=_OWN,
    )
    reward_model_config: str | None = argument(
        None, "The same for the reward model (ppo), and for a critic that starts from it.", group=_OWN
    )
    markdown: bool = argument(False, "Print Markdown.", group=_OWN)


@dataclass(frozen=True)
class Sizes:
    """The stage's arguments that matter, as PaddleNLP and the stages name them."""

    model_name_or_path: str | None = argument(None, "sft, rm, update: the model.", group=_MODEL)
    actor_model_name_or_path: str | None = argument(None, "ppo, offline: the policy.", group=_MODEL)
    reward_model_name_or_path: str | None = argument(None, "ppo, offline: the reward model.", group=_MODEL)
    reward_critic_model_name_or_path: str | None = argument(None, "Where the critic starts.", group=_MODEL)
    judge_model_name_or_path: str | None = argument(None, "Judge of evaluations.", group=_MODEL)
    policy_loss: str | None = argument(
        None, "offline: bc and ilql have no critic; ilql has heads of its own.", group=_MODEL, choices=OBJECTIVES
    )
    critic_training: str = argument(
        "first", "offline: beside the policy, before it, or not at all.", group=_MODEL, choices=CRITIC_TRAINING
    )

    max_length: int = argument(2048, "Longest sample.", group=_BATCH, ge=2)
    max_prompt_len: int | None = argument(
        None, "ppo: longest prompt; default: max_length.", group=_BATCH, ge=1, aliases=("max_src_len",)
    )
    max_new_tokens: int | None = argument(
        None, "ppo: longest answer; default: max_length.", group=_BATCH, ge=1, aliases=("max_dec_len",)
    )
    per_device_train_batch_size: int = argument(8, "Rows of a micro-batch.", group=_BATCH, ge=1)
    gradient_accumulation_steps: int = argument(1, "Micro-batches of an optimizer step.", group=_BATCH, ge=1)
    per_device_eval_batch_size: int = argument(8, "Rows scored or evaluated at once.", group=_BATCH, ge=1)
    per_device_prompt_batch_size: int = argument(16, "ppo: prompts of an iteration.", group=_BATCH, ge=1)
    num_return_sequences: int = argument(1, "ppo: answers per prompt.", group=_BATCH, ge=1, aliases=("rollout_n",))
    rollout_batch_size: int = argument(64, "ppo: answers decoded at a time.", group=_BATCH, ge=1)
    evaluation_strategy: str = argument("no", "sft, rm, update: when to evaluate.", group=_BATCH, choices=EVALUATION)
    ptx_coeff: float = argument(0.0, "ppo: above 0, texts are learnt too.", group=_BATCH, ge=0)
    policy_update: str = argument("rjs", "update: which one.", group=_BATCH, choices=UPDATES)
    dpo_pairs: str = argument("best_worst", "update, dpo: which answers are compared.", group=_BATCH, choices=PAIRS)

    bf16: bool = argument(False, "Compute in bfloat16.", group=_MEMORY)
    fp16_opt_level: str = argument("O1", "O2 keeps the weights in bfloat16.", group=_MEMORY, choices=("O1", "O2"))
    recompute: bool = argument(False, "Keep only what layers hand on.", group=_MEMORY)
    critic_recompute: bool | None = argument(None, "Default: recompute.", group=_MEMORY)
    num_layers_unfrozen: int | None = argument(None, "Trained upper layers; -1: all.", group=_MEMORY, ge=-1)
    critic_num_layers_unfrozen: int | None = argument(None, "Default: num_layers_unfrozen.", group=_MEMORY, ge=-1)
    critic_shares_trunk: bool = argument(False, "ppo: the critic is a head on the policy.", group=_MEMORY)
    lora: bool = argument(False, "Not planned: of what adapters save nothing is counted.", group=_MEMORY)
    eval_mode: str | None = argument(
        None, "ppo: layout of a second copy of the actor that samples.", group=_MEMORY, choices=EVAL_MODES
    )

    tensor_parallel_degree: int = argument(-1, "Ranks that share each matrix.", group=_LAYOUT)
    pipeline_parallel_degree: int = argument(-1, "Ranks that share the layers.", group=_LAYOUT)
    sharding_parallel_degree: int = argument(-1, "Ranks that share the optimizer; -1: all left.", group=_LAYOUT)
    sharding_degree: int = argument(-1, "An older name of it.", group=_LAYOUT)
    sharding: str = argument("", "What they share (ZeRO).", group=_LAYOUT, choices=tuple(SHARDING))
    sequence_parallel: bool = argument(False, "Also split what lies between the matrices.", group=_LAYOUT)

    def sequences(self, stage: str) -> int | None:
        """What a sample consists of: two answers of a pair; None: as many as the data have."""
        if stage != "update":
            return 2 if stage == "rm" else 1
        if self.policy_update == "dpo" and self.dpo_pairs == "best_worst":
            return 2
        return 1 if self.policy_update == "rjs" else None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Sizes:
        """From all arguments of a stage, by name, as a run has them; those that the stage does not have stay unset."""
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})


def read_arguments(argv: Sequence[str], program: str | None = None) -> tuple[Options, Sizes]:
    """From `ARGUMENTS.json --key value ...`; the command line wins.

    Other keys of the file are left to the run, which checks them all; on the command line they are refused.

    Raises: UsageError in one line: where, key, value, what is allowed.
    """
    words = list(argv)
    file = words.pop(0) if words and not words[0].startswith("-") else None
    options, sizes = ({a.name: a for a in arguments_of(kind)} for kind in (Options, Sizes))
    known = options | sizes
    given = _read_file(file, sizes | {name: options[name] for name in _SHAPES}) if file else {}
    parsed, rest = build_parser(known, program).parse_known_args(words)
    if rest:
        raise UsageError(f"command line: {rest[0]}: nothing that the plan reads; --help lists what it does")
    given |= {name: (f"command line: --{name}", known[name].read_text(raw)) for name, raw in vars(parsed).items()}
    values = {name: _check(known[name], value, source) for name, (source, value) in given.items()}
    if "critic_training" in values or values.get("policy_loss") in ("bc", "ilql"):
        values.setdefault("stage", "offline")
    if "processes" not in values:
        raise UsageError(f"command line: --processes: required ({options['processes'].help})")
    return Options(**{n: v for n, v in values.items() if n in options}), Sizes.of(values)


def _read_file(file: str, known: Mapping[str, Argument]) -> dict[str, tuple[str, Any]]:
    """{name: (where it was given, value)} of the known keys; a key that nearly is one is an error, not another key."""
    names = {alias: argument.name for argument in known.values() for alias in (argument.name, *argument.aliases)}
    given = {}
    for key, value in read_json_object(file).items():
        source = f'{file}: "{key}"'
        if key in names:
            given[names[key]] = (source, value)
        elif near := difflib.get_close_matches(key, names, n=1, cutoff=_MISSPELT):
            raise UsageError(f'{source}: unknown key (did you mean "{near[0]}"?)')
    return given


def _check(argument: Argument, value: Any, source: str) -> Any:
    try:
        return argument.check(value)
    except ValueError as fault:
        raise UsageError(f"{source}: {fault}") from None
