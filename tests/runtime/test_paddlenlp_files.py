"""PaddleNLP's own argument files: every key is read, and each without effect is named with what to use instead."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from alignment.parallel.layout import Layout, resolve_layout
from alignment.runtime.argument_fields import UNUSED_GROUP, arguments_of
from alignment.runtime.arguments import resolve
from alignment.runtime.document_arguments import SCRIPTS, groups_of
from alignment.runtime.faults import UsageError
from alignment.runtime.paddlenlp_keys import NOTES
from tests.runtime.paddlenlp_files import PPO_2024, PPO_2025, RM_2024
from tests.stages import read_rows, run, write_project, write_reward_model, write_tiny_model

MIGRATION = (Path(__file__).resolve().parents[2] / "docs" / "migration.md").read_text()
FILES = {  # file: (stage, content, processes, layout, keys without effect)
    "ppo 2024": (
        "ppo",
        PPO_2024,
        8,
        Layout(sharding=4, tensor=2, sharding_stage=1),
        "do_eval pipeline_parallel_config",
    ),
    "ppo 2025": (
        "ppo",
        PPO_2025,
        8,
        Layout(tensor=8),
        "autotuner_benchmark critic_min_learning_rate critic_recompute_granularity fused_linear min_learning_rate "
        "pipeline_parallel_config recompute_granularity recompute_use_reentrant release_grads "
        "tensor_parallel_output use_flash_attention use_fused_head_and_loss_fn",
    ),
    "rm 2024": (
        "rm",
        RM_2024,
        4,
        Layout(sharding=4, sharding_stage=2),
        "do_eval eval_accumulation_steps",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_resolves_as_it_is(name, tmp_path, monkeypatch, capsys):
    stage, content, processes, layout, idle = FILES[name]
    file = tmp_path / "argument.json"
    file.write_text(json.dumps(content))
    with pytest.raises(UsageError, match="processes"):
        resolve([str(file)], groups_of(stage))
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", str(processes))
    values = resolve([str(file)], groups_of(stage))
    assert resolve_layout(values, processes) == layout
    notices = capsys.readouterr().err.splitlines()
    assert notices == [f"notice: accepted, without effect here: {key}: {NOTES[key]}" for key in idle.split()]
    spelled = {"rollout_n": "num_return_sequences", "max_dec_len": "max_new_tokens", "min_dec_len": "min_new_tokens"}
    settled = {"eval_mode": None, "metric_for_best_model": "eval/accuracy"}
    for key in content.keys() - set(idle.split()):
        value = values[spelled.get(key, key)]
        assert getattr(value, "value", value) == settled.get(key, content[key]), key


def test_every_note_is_of_a_key_that_has_no_effect():
    idle = {a.name for s in SCRIPTS for g in groups_of(s) for a in arguments_of(g) if a.group == UNUSED_GROUP}
    idle |= {name for stage in SCRIPTS for group in groups_of(stage) for name in getattr(group, "LEGACY", ())}
    assert NOTES.keys() <= idle and all("\n" not in note for note in NOTES.values())


def test_the_page_on_migration_has_every_key():
    told = set(re.findall(r"`([a-z0-9_]+)`", MIGRATION))
    assert PPO_2024.keys() | PPO_2025.keys() | RM_2024.keys() | NOTES.keys() <= told


@pytest.mark.trust_full
@pytest.mark.parametrize("name", ["ppo 2024", "rm 2024"])
def test_a_file_runs_as_it_is(name, tmp_path):
    """Models and data come from the command line, all else from the file: with bf16, in 8 and 4 processes."""
    stage, content, processes, _, _ = FILES[name]
    folder = write_project(tmp_path)
    write_reward_model(folder / "reward", max_position_embeddings=1024)
    (folder / f"{stage}.json").write_text(json.dumps(content))
    data = ["--dataset_modules", "user_data.py", "--train_datasets", "animals", "--eval_datasets", "animals:16/-1"]
    if stage == "ppo":
        data += ["--ptx_datasets", "animals", "--reward_model_name_or_path", "reward"]
        data += ["--actor_model_name_or_path", str(write_tiny_model(folder / "long", max_position_embeddings=1024))]
    else:
        data += ["--model_name_or_path", "model"]
    status, shown = run(folder, stage, *data, processes=processes)
    assert status == 0, shown
    assert '"bf16": true needs a GPU' in shown
    output = folder / content["output_dir"]
    assert [row["step"] for row in read_rows(output / "metrics.jsonl") if "lr" in row]
    assert list((output / "policy" if stage == "ppo" else output).glob("checkpoint-*/model.safetensors"))
