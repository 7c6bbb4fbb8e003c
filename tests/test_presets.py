"""The argument files in config/: each passes a dry run, and those of a family differ only where they should."""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "config").glob("*/*_argument.json"))
SCRIPTS = {  # the others are run_ppo's
    "sft": "alignment.sft.run_sft",
    "rm": "alignment.rm.run_reward",
    "offline": "alignment.ppo.run_offline",
    **dict.fromkeys(("rjs", "rrhf", "dpo"), "alignment.apo.run_update"),
    "apo": "alignment.apo.run_apo",
}
OBJECTIVES = ("apa", "awr", "ppo")
NAMES = {"output_dir", "actor_model_name_or_path", "reward_model_name_or_path", "model_config"}
NAMES |= {"reward_critic_model_name_or_path", "reward_model_config"}


class Paper(NamedTuple):
    """Values of the authors' scripts: gradient steps in all and between evaluations, answers a step and a rollout."""

    steps: int
    batch: int
    rollouts: int
    learning_rate: float
    length: int


HH = {  # size: APA's and AWR's, PPO's
    "125m": (Paper(20000, 8, 128, 1e-6, 1000), Paper(20000, 8, 128, 8e-6, 1024)),
    "1b": (Paper(20000, 2, 64, 1e-6, 1000), Paper(20000, 2, 64, 1e-6, 1024)),
    "6b": (Paper(20000, 1, 64, 1e-6, 1000), Paper(20000, 2, 64, 8e-6, 1024)),
    "20b": (Paper(8000, 1, 16, 1e-6, 512), Paper(8000, 1, 16, 1e-6, 512)),
}
TLDR = (Paper(5000, 2, 128, 1e-6, 550), Paper(10000, 2, 128, 1e-6, 550))
# keys that follow from the model's size, beside the names
SIZED = {"per_device_prompt_batch_size", "per_device_train_batch_size", "max_steps", "eval_steps", "save_steps"}
SIZED |= {"max_length", "max_prompt_len", "tensor_parallel_degree"}


def read(name: str) -> dict:
    return json.loads((ROOT / "config" / f"{name}_argument.json").read_text())


def without(values: dict, *keys: str) -> dict:
    return {key: value for key, value in values.items() if key not in keys}


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_passes_a_dry_run(path, monkeypatch, capsys, tmp_path):
    module = importlib.import_module(SCRIPTS.get(path.stem.partition("_")[0], "alignment.ppo.run_ppo"))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    output = Path(read(f"{path.parent.name}/{path.stem.removesuffix('_argument')}")["output_dir"])
    existed = output.exists()
    monkeypatch.setattr(sys, "argv", [module.__file__, str(path), "--dry_run", "true", "--device", "cpu"])
    module.main()
    shown = capsys.readouterr()
    assert shown.out.endswith("dry run: passed\n") and shown.err == ""
    planned = " needs " in shown.out
    assert planned or "memory is not planned: prompts have as many answers as the data give them" in shown.out
    assert output.exists() == existed and not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", HH)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_hh_has_the_papers_values(objective, size):
    check_paper(read(f"hh/{objective}_{size}"), HH[size][objective == "ppo"])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_tldr_has_the_papers_values(objective):
    check_paper(read(f"tldr/{objective}"), TLDR[objective == "ppo"])


def check_paper(values: dict, paper: Paper) -> None:
    """Our iterations are the authors' rollouts: each brings update_iters passes over its answers."""
    steps = values["update_iters"] * paper.rollouts / paper.batch  # an iteration's
    assert values["per_device_prompt_batch_size"] == paper.rollouts
    assert values["per_device_train_batch_size"] * values["gradient_accumulation_steps"] == paper.batch
    assert (values["max_steps"] - 1) * steps < paper.steps <= values["max_steps"] * steps
    assert values["eval_steps"] == values["save_steps"] == round(1000 / steps)
    assert values["learning_rate"] == paper.learning_rate
    assert values["max_prompt_len"] + values["max_new_tokens"] == values["max_length"] == paper.length


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_hh_sizes_differ_in_size_alone(objective):
    skipped = NAMES | SIZED | ({"learning_rate"} if objective == "ppo" else set())
    first, *others = (without(read(f"hh/{objective}_{size}"), *skipped) for size in HH)
    assert all(other == first for other in others)


@pytest.mark.parametrize("stem", ["hh/{}_125m", "hh/{}_1b", "hh/{}_6b", "hh/{}_20b", "tldr/{}"])
def test_apa_and_awr_differ_in_the_loss_alone(stem):
    apa, awr = (read(stem.format(objective)) for objective in ("apa", "awr"))
    assert (apa["apa_lambda"], awr["awr_beta"]) == (0.1, 1.0)
    own = ("policy_loss", "output_dir", "apa_lambda", "awr_beta")
    assert without(apa, *own) == without(awr, *own)


@pytest.mark.parametrize("family", ["llama", "qwen"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_3d_files_differ_in_model_and_layout_alone(family, objective):
    flat, parallel = read(f"{family}/{objective}"), read(f"{family}/{objective}_3d")
    layout = {
        "tensor_parallel_degree": 2,
        "pipeline_parallel_degree": 2,
        "sharding": "stage1",
        "sharding_parallel_degree": 2,
        "eval_mode": "tensor_parallel",
    }
    batches = ("per_device_prompt_batch_size", "gradient_accumulation_steps")
    assert without(parallel, *layout, *batches, *NAMES) == without(flat, *batches, *NAMES)
    assert {key: parallel[key] for key in layout} == layout
    shares = 8 // (2 * 2)  # 8 processes as data parallelism have the same global batches
    assert all(parallel[key] * shares == flat[key] * 8 for key in batches)


@pytest.mark.parametrize("stage", ["sft", "rm", *OBJECTIVES])
def test_llama_and_qwen_differ_in_names_alone(stage):
    skipped = NAMES | {"model_name_or_path"}
    assert without(read(f"llama/{stage}"), *skipped) == without(read(f"qwen/{stage}"), *skipped)
