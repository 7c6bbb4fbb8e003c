"""Bad input to the real commands: one clear line, the right exit status, no traceback, nothing half-written."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.stages import read_rows, run, weights_of, write_project, write_tiny_model


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = write_project(tmp_path_factory.mktemp("project"))
    corrupt = shutil.copytree(folder / "model", folder / "corrupt")
    weights = (corrupt / "model.safetensors").read_bytes()
    (corrupt / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    write_tiny_model(folder / "odd", num_key_value_heads=1)
    (folder / "empty.jsonl").write_text("")
    (folder / "long.jsonl").write_text(json.dumps({"prompt": "Say cat", "answer": "a" * 60}) + "\n")
    (folder / "bad_score.jsonl").write_text(json.dumps({"prompt": "q", "answer": "cat", "reward": "good"}) + "\n")
    (folder / "no_answer.jsonl").write_text(json.dumps({"input": "Say cat"}) + "\n")
    return folder


REWARD_MODEL = ("--reward_function", "user_reward.py:count_vowels", "--reward_model_name_or_path")
USAGE = {  # name: (stage, overrides, what the line must say)
    "unknown key": ("ppo", ("--kl_coef", "1"), ("--kl_coef", "kl_coeff")),
    "mistyped value": ("rm", ("--max_steps", "three"), ("--max_steps", "three")),
    "out of range": ("ppo", ("--gamma", "1.5"), ("--gamma", "1.5", "1")),
    "missing model directory": ("ppo", ("--actor_model_name_or_path", "./nowhere"), ("actor_model_name", "nowhere")),
    "corrupt safetensors": ("rm", ("--model_name_or_path", "corrupt"), ("model_name_or_path", "model.safetensors")),
    "not a reward model": ("ppo", (*REWARD_MODEL, "model"), ("reward_model_name_or_path", "not a reward model")),
    "unknown data set": ("rm", ("--train_datasets", "animal"), ("animal", "animals", "hh-excerpt/train")),
    "sample without the needed field": (
        "rm",
        ("--train_datasets", "local:1:no_answer.jsonl"),
        ("no_answer.jsonl", "answer"),
    ),
    "empty data set": ("rm", ("--train_datasets", "local:1:empty.jsonl"), ("empty",)),
    "prompt longer than max_prompt_len": (
        "ppo",
        ("--max_prompt_len", "5", "--truncation", "error"),
        ("animals", "max_length 5"),
    ),
    "more tokens than the model has positions": ("ppo", ("--max_new_tokens", "60"), ("max_new_tokens", "64")),
    "reward function that is not there": ("ppo", ("--reward_function", "user_reward.py:nope"), ("nope",)),
    "user module that is not there": ("rm", ("--dataset_modules", "nothing.py"), ("nothing.py",)),
    "nothing to resume from": ("rm", ("--resume_from_checkpoint", "true"), ("resume_from_checkpoint",)),
    "adapters and layers": ("sft", ("--lora", "true", "--num_layers_unfrozen", "1"), ("num_layers_unfrozen", "lora")),
    "no score for logged answers": (
        "offline",
        ("--reward_function", "null"),
        ("no reward", "60 of 60 logged answers", "reward_model_name_or_path", "reward_function"),
    ),
    "a score that is no number": (
        "offline",
        ("--train_datasets", "local:1:bad_score.jsonl"),
        ("bad_score.jsonl", "sample 0", "'reward'", "finite number", "'good'"),
    ),
    "online objective on logged answers": ("offline", ("--policy_loss", "ppo"), ("--policy_loss", "apa, awr, bc")),
    "betas": ("offline", ("--policy_loss", "ilql", "--ilql_decoding_beta", "[1, -1]"), ("ilql_decoding_beta", "-1")),
    "Q heads elsewhere": ("offline", ("--policy_loss", "ilql", "--eval_mode", "single"), ("eval_mode", "ilql")),
    "a judge alone": (
        "offline",
        ("--policy_loss", "bc", "--reward_function", "null", "--judge_model_name_or_path", "x"),
        ("judge_model_name_or_path", "reward_function"),
    ),
    "argument of online RL": ("offline", ("--kl_coeff", "0.1"), ("--kl_coeff", "unknown key")),
    "unknown training of the critic": ("offline", ("--critic_training", "last"), ("last", "first, joint, none")),
    "logged answers longer than the model's positions": (
        "offline",
        ("--max_length", "99", "--train_datasets", "local:1:long.jsonl"),
        ("max_length", "64"),
    ),
    "too many layers": ("rm", ("--num_layers_unfrozen", "9"), ("num_layers_unfrozen", "9", "2")),
}
TP, PP = "--tensor_parallel_degree", "--pipeline_parallel_degree"
LAYOUTS = {  # name: (processes, stage, overrides, what the line must say)
    "degrees that do not divide the processes": (2, "rm", (TP, "3"), (TP[2:], " 3 ", "are 2", "multiple of 3")),
    "heads that do not divide": (
        2,
        "ppo",
        (TP, "2", "--actor_model_name_or_path", "odd"),
        ("actor_model_name_or_path", "num_key_value_heads = 1", "what does: 1"),
    ),
    "more stages than layers": (3, "sft", (PP, "3"), (PP[2:], "3", "2 layers")),
    "stages with sharded gradients": (4, "rm", (PP, "2", "--sharding", "stage2"), ("stage2", PP[2:], "stage1")),
    "an unknown sharding stage": (2, "sft", ("--sharding", "stage4"), ("sharding", "stage4", "stage3")),
    "sharding without its degree's processes": (
        2,
        "sft",
        ("--sharding", "stage1", "--sharding_parallel_degree", "3"),
        ("sharding_parallel_degree", "3", "2 processes"),
    ),
    "a sequence without a tensor": (2, "sft", ("--sequence_parallel", "true"), ("sequence_parallel", TP[2:])),
    "an unknown layout of the rollout": (2, "ppo", ("--eval_mode", "double"), ("eval_mode", "double", "single")),
}
FAULTS = {
    "reward function raises": (("--reward_function", "user_reward.py:broken"), ("broken", "no reward today")),
    "reward is not a number": (("--reward_function", "user_reward.py:not_a_number"), ("not_a_number", "nan")),
    "too few rewards": (("--reward_function", "user_reward.py:too_few"), ("too_few", "rewards for")),
    "reward server is down": (
        ("--reward_server", "http://127.0.0.1:9/score", "--reward_server_retries", "0"),
        ("127.0.0.1:9",),
    ),
    "sampling and training disagree": (("--self_check_tolerance", "1e-12"), ("self-check", "self_check_tolerance")),
}


def assert_one_line(shown, words):
    errors = list({line for line in shown.splitlines() if line.startswith("error: ")})  # the launcher repeats a line
    assert len(errors) == 1, shown
    assert "Traceback" not in shown
    for word in words:
        assert word in errors[0]


@pytest.mark.parametrize("name", USAGE)
def test_usage(project, name):
    stage, overrides, words = USAGE[name]
    status, shown = run(project, stage, "--output_dir", "never", *overrides)
    assert status == 2, shown
    assert_one_line(shown, words)
    assert not list((project / "never").glob("[!.]*"))  # but the lock


@pytest.mark.layouts
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_that_cannot_work(project, name):
    processes, stage, overrides, words = LAYOUTS[name]
    status, shown = run(project, stage, "--output_dir", "never", *overrides, processes=processes)
    assert status == 2, shown
    assert_one_line(shown, words)
    assert not list((project / "never").glob("[!.]*"))  # but the lock


@pytest.mark.parametrize("name", FAULTS)
def test_fault_while_running(project, name):
    overrides, words = FAULTS[name]
    folder = name.replace(" ", "_")
    status, shown = run(project, "ppo", "--output_dir", folder, *overrides)
    assert status == 1, shown
    assert_one_line(shown, words)
    assert not list((project / folder).glob("*/*checkpoint*"))


def test_a_traceback_on_request(project):
    status, shown = run(project, "rm", "--model_name_or_path", "corrupt", ALIGNMENT_DEBUG="1")
    assert status == 2
    assert "Traceback" in shown


def test_adapters_and_resuming(project):
    """A run is resumed with the adapters it had, or not at all."""
    lora = ("--lora", "true", "--output_dir", "lora")
    assert run(project, "sft", *lora, "--max_steps", 1)[0] == 0
    again = ("--resume_from_checkpoint", "true", "--max_steps", 2)
    for overrides, words in (
        (("--output_dir", "lora"), ('"lora": false', "trained with true")),
        ((*lora, "--lora_rank", "3"), ('"lora_rank": 3', "trained with 8")),
        ((*lora, "--lora_target_modules", "q_proj"), ("lora_target_modules", "down_proj")),
        ((*lora, "--model_name_or_path", "odd"), ("odd is not the model", "adapters")),
    ):
        status, shown = run(project, "sft", *overrides, *again)
        assert status == 2, shown
        assert_one_line(shown, words)
    assert run(project, "sft", *lora, *again)[0] == 0


def test_an_earlier_run_is_not_lost(project):
    assert run(project, "sft", "--max_steps", 1)[0] == 0
    before = (project / "sft" / "metrics.jsonl").read_bytes()
    status, shown = run(project, "sft", "--max_steps", 2)
    assert status == 2
    assert_one_line(shown, ("output_dir", "sft", "overwrite_output_dir", "resume_from_checkpoint"))
    assert (project / "sft" / "metrics.jsonl").read_bytes() == before
    weights_of(project / "sft" / "checkpoint-1")
    assert run(project, "sft", "--max_steps", 2, "--overwrite_output_dir", "true")[0] == 0
    assert [row["step"] for row in read_rows(project / "sft" / "metrics.jsonl") if "loss" in row] == [1, 2]
    assert not (project / "sft" / "checkpoint-1").exists()
