"""Runs training scenarios one after the other in the layout that the command line asks for, and keeps what happened.

    python -m paddle.distributed.launch --nproc_per_node 4 tests/parallel/trajectories.py PROJECT OUT SET \
        --tensor_parallel_degree 2 --pipeline_parallel_degree 2

One process group serves all scenarios of a SET (a key of SETS), for importing Paddle costs more than training these
models. OUT/<scenario> is an ordinary output directory and, for RL, rollouts.npz: the sampled tokens of each iteration.
"""

from __future__ import annotations

import json
import os
import sys
from itertools import combinations
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path[0] = str(CHECKOUT)

import numpy as np  # noqa: E402

from alignment.apo.run_update import build_trainer as build_update  # noqa: E402
from alignment.apo.update_arguments import GROUPS as UPDATE_GROUPS  # noqa: E402
from alignment.parallel.topology import topology  # noqa: E402
from alignment.ppo.arguments import GROUPS as PPO_GROUPS  # noqa: E402
from alignment.ppo.arguments import OFFLOAD_LEVELS  # noqa: E402
from alignment.ppo.build import build_trainer as build_ppo  # noqa: E402
from alignment.ppo.offline.arguments import GROUPS as OFFLINE_GROUPS  # noqa: E402
from alignment.ppo.offline.build import build_trainer as build_offline  # noqa: E402
from alignment.ppo.trainer import PARTS  # noqa: E402
from alignment.rm.arguments import GROUPS as RM_GROUPS  # noqa: E402
from alignment.rm.run_reward import build_trainer as build_rm  # noqa: E402
from alignment.runtime.arguments import parse  # noqa: E402
from alignment.runtime.faults import run_main  # noqa: E402
from alignment.runtime.metrics import is_main_process  # noqa: E402
from alignment.sft.arguments import GROUPS as SFT_GROUPS  # noqa: E402
from alignment.sft.run_sft import build_trainer as build_sft  # noqa: E402
from alignment.training.stage import run_stage  # noqa: E402
from tests.parallel import mistakes  # noqa: E402
from tests.stages import ARGUMENTS, write_adapted_reward_model, write_project, write_reward_model, write_tiny_model  # noqa: E402

GLOBAL_BATCH, PROMPTS = 8, 4
# 4 optimizer steps; 21 and 7 samples leave an uneven last batch in each epoch.
# Adam moves a weight by up to learning_rate / adam_epsilon times the rounding of its gradient (1e-8 and more).
SAVED = {"save_strategy": "steps", "learning_rate": 5e-3, "adam_epsilon": 1e-3}
SUPERVISED = SAVED | {"train_datasets": "animals:21/-1", "max_steps": 4, "save_steps": 2}
ONLINE = SAVED | {"train_datasets": "animals:7/-1", "max_steps": 2, "save_steps": 1, "eval_steps": 1}
LOGGED = SAVED | {"train_datasets": "animals:11/-1", "max_steps": 2, "save_steps": 1, "eval_steps": 1}  # 22 answers
# A larger rate diverges, and divergence enlarges differences of rounding; so does Adam those of the small gradients
# that a new head gives.
REWARD = SUPERVISED | {"learning_rate": 1e-3, "adam_epsilon": 1e-2}
GAME = REWARD | {
    "train_datasets": "animals:9/-1, games:12/-1",
    "eval_datasets": "animals:4/-1, games:5/-1",
    "apo_loss_coeff": 0.6,
    "apo_sample_num": 2,
    "rm_kl_coeff": 0.8,
}
MODELS = {  # 292 tokens divide by 2 and 4; 289, what the tokenizer has, do not: every process then has all logits
    "llama_tied": {"family": "llama", "tied": True, "vocab_size": 292},
    "llama_untied": {"family": "llama", "tied": False, "vocab_size": 292},
    "qwen2_tied": {"family": "qwen2", "tied": True, "vocab_size": 292},
    "qwen2_untied": {"family": "qwen2", "tied": False, "vocab_size": 289},
}
JUDGED = {"judge_model_name_or_path": "judge"}
LORA = {"lora": True, "lora_rank": 2, "learning_rate": 2e-2}
SHARED_TRUNK = {
    "critic_shares_trunk": True,
    "value_loss_coeff": 0.5,
    "score_centering": "reference",
    "score_scaling": "running",
    "normalize_reward": False,
}
ILQL = {
    "policy_loss": "ilql",
    "ilql_awac_beta": 0.5,
    "ilql_alpha": 0.3,
    "steps_for_target_q_sync": 2,
    "ilql_decoding_beta": [2, 0],
}
SCORED = SUPERVISED | {"train_datasets": "scored-animals:21/-1", "eval_datasets": "scored-animals:6/-1"}
VARIANTS = {  # name: (stage, arguments)
    "sft": ("sft", SUPERVISED),
    "sft_frozen": ("sft", SUPERVISED | {"num_layers_unfrozen": 1}),
    "rm": ("rm", REWARD),
    "rm_tokens": ("rm", REWARD | {"loss_type": "token-wise"}),
    "rm_apo": ("rm", GAME | {"pooling_type": "average", "add_sep_token": True, "calibrate_scores": True}),
    "rm_diff": ("rm", GAME | {"apo_loss_type": "diff", "sampling_weights": {"animals": 1, "games": 2}}),
    "ppo": ("ppo", ONLINE | JUDGED | {"reward_model_name_or_path": "reward_model", "critic_num_layers_unfrozen": 2}),
    "apa": ("ppo", ONLINE | {"policy_loss": "apa", "kl_controller": "adaptive", "kl_target": 0.01, "kl_horizon": 50}),
    "sft_lora": ("sft", SUPERVISED | LORA),
    "rm_lora": ("rm", REWARD | LORA),
    "ppo_lora": ("ppo", ONLINE | LORA | JUDGED | {"reward_model_name_or_path": "adapted_reward_model"}),
    "apa_lora": ("ppo", ONLINE | LORA | {"policy_loss": "apa", "lora_target_modules": ["q_proj", "down_proj"]}),
    "awr": ("ppo", ONLINE | {"policy_loss": "awr", "awr_weight_clip": 2.0}),
    "ppo_trunk": ("ppo", ONLINE | SHARED_TRUNK | {"num_layers_unfrozen": 2}),
    "offline_apa": (
        "offline",
        LOGGED | {"apa_lambda": 1.0, "critic_refresh": 1, "reward_model_name_or_path": "reward_model"},
    ),
    "offline_awr": (
        "offline",
        LOGGED | {"policy_loss": "awr", "critic_training": "first", "critic_epochs": 0.5, "num_layers_unfrozen": 2},
    ),
    "offline_bc": ("offline", LOGGED | LORA | {"policy_loss": "bc", "eval_datasets": None, "eval_split_ratio": 0.2}),
    "offline_ilql": ("offline", LOGGED | ILQL),
    "rjs": ("update", SCORED | {"policy_update": "rjs"}),
    "rrhf": ("update", SCORED | {"policy_update": "rrhf", "rrhf_sft_coeff": 0.5}),
    "dpo": ("update", SUPERVISED),
    "dpo_all": ("update", SCORED | {"dpo_pairs": "all", "label_smoothing": 0.1, "num_layers_unfrozen": 2}),
    "ipo_lora": ("update", SCORED | LORA | {"dpo_loss_type": "ipo", "dpo_beta": 0.5}),
    "apa_trunk": ("ppo", ONLINE | SHARED_TRUNK | {"policy_loss": "apa", "apa_anchor": "old"}),
}
LEVELS = [" ".join(words) for n in range(len(OFFLOAD_LEVELS) + 1) for words in combinations(OFFLOAD_LEVELS, n)]
OFFLOADED = {f"offload{i}": ("ppo", VARIANTS["ppo"][1] | {"offload_level": words}) for i, words in enumerate(LEVELS)}
OFFLOADED_LORA = {"ppo_lora_offload": ("ppo", VARIANTS["ppo_lora"][1] | {"offload_level": LEVELS[-1]})}
SETS = {
    "fast": [
        "sft-llama_tied",
        "sft_frozen-llama_untied",
        "rm-qwen2_tied",
        "rm_tokens-llama_tied",
        "ppo-llama_tied",
        "apa-qwen2_untied",
    ],
    "full": [f"{variant}-{model}" for variant in VARIANTS for model in MODELS if variant != "offline_ilql"],
    "lora": ["sft_lora-llama_tied", "rm_lora-qwen2_untied", "ppo_lora-llama_tied", "apa_lora-qwen2_tied"],
    "rl": ["ppo-llama_tied"],
    "offline": ["offline_apa-llama_tied", "offline_awr-qwen2_untied", "offline_bc-llama_tied"],
    "ilql": ["offline_ilql-llama_tied", "offline_ilql-qwen2_untied"],
    "update": ["dpo-llama_tied"],
    "trunk": ["ppo_trunk-llama_tied", "apa_trunk-qwen2_untied"],
    "apo": ["rm_apo-llama_tied", "rm_diff-qwen2_untied"],
    "supervised": ["sft-llama_tied"],
    "offload": [f"{variant}-llama_tied" for variant in OFFLOADED],
    "offload_lora": ["ppo_lora-llama_tied", "ppo_lora_offload-llama_tied"],
    "offload_all": ["offload0-llama_tied", f"offload{len(LEVELS) - 1}-llama_tied"],
}
BUILDERS = {
    "sft": (build_sft, SFT_GROUPS, ("",)),
    "rm": (build_rm, RM_GROUPS, ("",)),
    "ppo": (build_ppo, PPO_GROUPS, PARTS),
    "offline": (build_offline, OFFLINE_GROUPS, PARTS),
    "update": (build_update, UPDATE_GROUPS, ("",)),
}


def write_models(folder: Path) -> Path:
    """A user's project (tests.stages) with every model of MODELS, reward models (whole, adapters) and a judge."""
    write_project(folder)
    for name, options in MODELS.items():
        write_tiny_model(folder / name, num_hidden_layers=3, **options)
        write_tiny_model(folder / f"{name}_wide", num_hidden_layers=3, scale=1.0, **options)
    write_reward_model(folder / "reward_model", num_hidden_layers=3, **MODELS["llama_tied"])
    write_adapted_reward_model(folder / "adapted_reward_model", folder / "llama_tied")
    write_reward_model(folder / "judge", num_hidden_layers=3, **MODELS["qwen2_untied"])
    return folder


def arguments_of(scenario: str, out: Path) -> tuple[str, dict]:
    """Stage and arguments of "<variant>-<model>", but for batch sizes and layout."""
    variant, model = scenario.split("-")
    stage, changes = (VARIANTS | OFFLOADED | OFFLOADED_LORA)[variant]
    key = "actor_model_name_or_path" if stage in ("ppo", "offline") else "model_name_or_path"
    if stage == "rm":  # whose scores differ: they are normalised by their deviation, and rounding with them
        model += "_wide"
    return stage, ARGUMENTS[stage] | changes | {key: model, "output_dir": str(out / scenario)}


def run_scenario(
    scenario: str, out: Path, overrides: list[str], data_size: int, accumulation: int, resume: Path | None
) -> None:
    """One scenario with the same global batch in every layout; ``resume``: the OUT of the run to go on with."""
    stage, arguments = arguments_of(scenario, out)
    build, groups, parts = BUILDERS[stage]
    if resume:
        part, saved = (PARTS[0], ONLINE["save_steps"]) if len(parts) > 1 else ("", SUPERVISED["save_steps"])
        arguments["resume_from_checkpoint"] = str(resume / scenario / part / f"checkpoint-{saved}")
    arguments |= {
        "per_device_train_batch_size": max(1, GLOBAL_BATCH // data_size // accumulation),
        "gradient_accumulation_steps": accumulation,
    }
    if stage == "ppo":
        arguments["per_device_prompt_batch_size"] = PROMPTS // data_size
    file = out / f"{scenario}.{os.environ.get('PADDLE_TRAINER_ID', 0)}.json"
    file.write_text(json.dumps(arguments))
    rollouts: list[dict[str, np.ndarray]] = []

    def build_recorded(*parsed: object) -> object:
        trainer = build(*parsed)
        if stage == "ppo":
            sample = trainer.rollout

            def rollout(iteration: int) -> object:
                collected = sample(iteration)
                rollouts.append(vars(collected.experience))
                return collected

            trainer.rollout = rollout
        return trainer

    pairs = zip(overrides[::2], overrides[1::2], strict=True)
    known = [word for pair in pairs if len(parts) > 1 or pair[0] != "--eval_mode" for word in pair]
    run_stage(stage, parse([str(file), *known], groups), build_recorded, parts)
    if rollouts and is_main_process():
        arrays = {f"{i}/{name}": array for i, fields in enumerate(rollouts) for name, array in fields.items()}
        np.savez(out / scenario / "rollouts.npz", **arrays)


def main() -> None:
    """PROJECT OUT SET [--data_size D] [--accumulation A] [--resume OUT] [--mistake NAME] [--key value ...]."""
    project, out, name, *rest = sys.argv[1:]
    own = {"--data_size": "1", "--accumulation": "1", "--resume": "", "--mistake": ""}
    overrides = []
    for key, value in zip(rest[::2], rest[1::2], strict=True):
        if key in own:
            own[key] = value
        else:
            overrides += [key, value]
    os.chdir(project)
    Path(out).mkdir(parents=True, exist_ok=True)
    if own["--mistake"]:
        mistakes.make(own["--mistake"])
    resume = Path(own["--resume"]) if own["--resume"] else None
    for scenario in SETS[name]:
        run_scenario(scenario, Path(out), overrides, int(own["--data_size"]), int(own["--accumulation"]), resume)
    assert topology().data_size == int(own["--data_size"])


if __name__ == "__main__":
    run_main(main)
