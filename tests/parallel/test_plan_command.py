"""What the plan reads, and its real command."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from alignment.parallel.plan import Sizes, find_shapes, plan
from alignment.parallel.plan.arguments import RAGGED, UPDATES, Options, read_arguments
from alignment.parallel.plan.models import ACTOR, CRITIC, MODEL, REWARD
from alignment.parallel.plan.shapes import read_shape
from alignment.runtime.argument_fields import arguments_of
from alignment.runtime.document_arguments import groups_of
from alignment.runtime.faults import UsageError
from tests.parallel.llama2 import ROOT, SHAPES, TINY


def stage_arguments() -> dict[str, dict]:
    stages = ("ppo", "ppo.offline", "rm", "sft", "apo.update")
    return {stage: {a.name: a for group in groups_of(stage) for a in arguments_of(group)} for stage in stages}


def test_names_defaults_and_limits_are_those_of_the_stages():
    known = stage_arguments()
    chosen_by_plan = {"model_name_or_path", "actor_model_name_or_path", "policy_loss"}  # has no default of its own
    for own in arguments_of(Sizes):
        theirs = [arguments[own.name] for arguments in known.values() if own.name in arguments]
        assert theirs, own.name
        for other in theirs:
            assert own.default == other.default or own.name in chosen_by_plan, own.name
            assert (own.bounds, own.aliases) == (other.bounds, other.aliases), own.name


def test_no_key_of_a_stage_is_taken_for_a_misspelling(tmp_path):
    sizes = {field.name for field in fields(Sizes)}
    aliases = {alias for argument in arguments_of(Sizes) for alias in argument.aliases}
    for stage, arguments in stage_arguments().items():
        legacy = groups_of(stage)[-1].LEGACY
        others = {name: None for name in set(arguments) | legacy if name not in sizes | aliases}
        file = tmp_path / "all.json"
        file.write_text(json.dumps(others))
        assert read_arguments([str(file), "--processes", "1"]) == (Options(processes=1), Sizes())


@pytest.mark.parametrize("file", sorted((ROOT / "config").glob("*/*_argument.json")), ids=lambda file: str(file)[-30:])
def test_every_argument_file_can_be_planned(file):
    options, sizes = read_arguments([str(file), "--processes", "8", "--max_length", "100"])
    assert (options.processes, sizes.max_length) == (8, 100)
    name = file.name[: file.name.index("_")]
    stage = "update" if name in UPDATES else name
    stage = "ppo" if sizes.actor_model_name_or_path and stage != "offline" else stage
    shapes = find_shapes(stage, sizes, str(SHAPES / "llama2-7b"))
    if sizes.lora:
        with pytest.raises(UsageError, match='"lora": true is not planned'):
            plan(stage, sizes, shapes, 8)
    if name == "rrhf":
        with pytest.raises(UsageError, match=f'"policy_update": "rrhf" is not planned: {RAGGED}'):
            plan(stage, sizes, shapes, 8)
        return
    assert plan(stage, replace(sizes, lora=False), shapes, 8).memory


def test_a_run_can_give_all_its_arguments():
    values = {argument.name: argument.default for argument in stage_arguments()["sft"].values()} | {"max_length": 64}
    assert plan("sft", Sizes.of(values), {MODEL: TINY}, 1).fits


def write(folder: Path, content: dict, name: str = "arguments.json") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content))
    return str(folder / name)


def test_shapes_of_models_on_this_machine(tmp_path):
    config = json.loads((SHAPES / "llama2-7b" / "config.json").read_text())
    write(tmp_path / "policy", config, "config.json")
    write(tmp_path / "rm" / "checkpoint-9", config | {"num_hidden_layers": 9}, "config.json")
    write(tmp_path / "rm" / "checkpoint-10", config | {"num_hidden_layers": 10}, "config.json")
    policy, reward = str(tmp_path / "policy"), str(tmp_path / "rm")
    sizes = Sizes(actor_model_name_or_path=policy, reward_model_name_or_path=reward)

    def layers(sizes: Sizes, *configs: str | None) -> list[int]:
        found = find_shapes("ppo", sizes, *configs)
        return [found[key].num_hidden_layers for key in (ACTOR, REWARD, CRITIC)]

    assert layers(sizes) == [32, 10, 10]  # the newest checkpoint; the critic starts from the reward model
    assert layers(replace(sizes, reward_critic_model_name_or_path=policy)) == [32, 10, 32]
    assert layers(replace(sizes, reward_model_name_or_path="not/here")) == [32, 32, 32]
    assert layers(sizes, str(SHAPES / "llama2-70b")) == [80, 10, 10]
    assert layers(sizes, str(SHAPES / "llama2-70b"), policy) == [80, 32, 32]
    assert REWARD not in find_shapes("ppo", replace(sizes, reward_model_name_or_path=None))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not one of llama, qwen2"),
        ({"hidden_size": None}, "hidden_size = None must be a whole number >= 1"),
        ({"num_hidden_layers": True}, "num_hidden_layers = True must be a whole number >= 1"),
        ({"num_attention_heads": 7}, "num_attention_heads = 7 does not divide hidden_size = 4096"),
        ({"num_key_value_heads": 5}, "num_key_value_heads = 5 does not divide num_attention_heads = 32"),
    ],
)
def test_shapes_that_are_none(tmp_path, change, message):
    file = write(tmp_path, json.loads((SHAPES / "llama2-7b" / "config.json").read_text()) | change, "config.json")
    with pytest.raises(UsageError) as caught:
        read_shape(tmp_path)
    assert str(caught.value) == f"{file}: {message}"


def run(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "alignment.parallel.plan", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


PPO_FILE, CONFIG_7B = "config/llama/ppo_argument.json", ("--model_config", "config/shapes/llama2-7b")
LAYOUT = ("--processes", "8", "--tensor_parallel_degree", "2", "--sharding", "stage1")


def test_the_command_says_that_it_fits():
    done = run(PPO_FILE, *CONFIG_7B, *LAYOUT)
    assert (done.returncode, done.stderr) == (0, "")
    assert "ppo on 8 processes: tensor 2 x pipeline 1 x sharding 4 (stage 1) x data 1; bfloat16 O2" in done.stdout
    assert "actor 6.74 B, critic 6.61 B, reference 6.74 B, reward 6.61 B" in done.stdout
    assert "│ update  │     0 │   26.69 │     20.02 │     13.35 │" in done.stdout
    assert done.stdout.endswith("fits: update needs 62.7 GB of a device's 80, the most of all phases\n")


@pytest.mark.parametrize("name", ["apa", "awr", "bc", "ilql"])
def test_files_of_logged_answers_are_known_by_their_arguments(name):
    options, _ = read_arguments([f"{ROOT}/config/smollm2/offline_{name}_argument.json", "--processes", "1"])
    assert options.stage == "offline"
    assert read_arguments([f"{ROOT}/{PPO_FILE}", "--processes", "1"])[0].stage is None


def test_the_command_warns_in_one_line_and_a_status():
    done = run(PPO_FILE, *CONFIG_7B, *LAYOUT, "--device_memory_gb", "60", "--markdown")
    assert done.returncode == 1
    assert done.stderr.startswith("error: does not fit: update needs 62.7 GB of a device's 60; enough would be --")
    assert done.stderr.count("\n") == 1
    assert "\n| update | 0 | 26.69 | 20.02 | 13.35 | 0.00 |" in done.stdout


@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        ({}, ["--stage", "rm"], "command line: --processes: required (Processes of the job, one device each.)"),
        (
            {},
            ["--processes", "1"],
            'command line: --stage: no "actor_model_name_or_path" is given; say whether it is rm, sft or update',
        ),
        (
            {"actor_model_name_or_path": "x"},
            ["--processes", "1", "--stage", "sft"],
            'command line: --stage: sft, but "actor_model_name_or_path" is given',
        ),
        (
            {"actor_model_name_or_path": "./not/here"},
            ["--processes", "1"],
            "\"actor_model_name_or_path\": no config.json of './not/here' here; name one of the same sizes with "
            "--model_config",
        ),
        (
            {"tensor_paralel_degree": 2},
            ["--processes", "2"],
            '{file}: "tensor_paralel_degree": unknown key (did you mean "tensor_parallel_degree"?)',
        ),
        (
            {"bf16": "perhaps"},
            ["--processes", "2"],
            '{file}: "bf16": "perhaps" is not allowed; it must be true or false',
        ),
        ({}, ["--processes", "0"], 'command line: --processes: "0" is not allowed; it must be a whole number >= 1'),
        ({}, ["--tp", "2"], "command line: --tp: nothing that the plan reads; --help lists what it does"),
    ],
)
def test_the_command_refuses_bad_input(tmp_path, content, words, message):
    file = write(tmp_path, content)
    done = run(file, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {message.format(file=file)}\n"


def test_the_command_does_not_load_paddle():
    code = "import sys, alignment.parallel.plan.__main__; sys.exit('paddle' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
