"""The stages' own arguments: defaults, combinations, PaddleNLP's files, the files in config/, the generated page."""

from __future__ import annotations

from pathlib import Path

import pytest
from paddlenlp.trainer import TrainingArguments

from alignment.parallel.layout import Layout, resolve_layout
from alignment.ppo.models.lora import TARGETS
from alignment.runtime.argument_fields import UNUSED_GROUP, arguments_of
from alignment.runtime.arguments import build_parser, parse, resolve
from alignment.runtime.document_arguments import SCRIPTS, groups_of, render_page
from alignment.runtime.faults import UsageError

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "config").glob("*/*.json"))
GROUPS = {stage: groups_of(stage) for stage in SCRIPTS}
PPO = ["--output_dir=out", "--train_datasets=x", "--reward_function=a:b", "--per_device_train_batch_size=16"]


def test_lora_settles_scale_and_layers():
    values = resolve([*PPO, "--lora=true", "--lora_rank=4", "--num_layers_unfrozen=-1"], GROUPS["ppo"])
    assert values["lora_alpha"] == 8
    assert values["lora_target_modules"] == list(TARGETS)
    values = resolve([*PPO, "--lora_alpha=3", "--lora_target_modules=k_proj,q_proj,k_proj"], GROUPS["ppo"])
    assert not values["lora"] and values["lora_alpha"] == 3 and values["lora_target_modules"] == ["k_proj", "q_proj"]


@pytest.mark.parametrize("name", ["num_layers_unfrozen", "critic_num_layers_unfrozen"])
def test_lora_trains_no_layers(name):
    assert f'"{name}": 2 does not go with "lora": true' in refused("--lora=true", f"--{name}=2")


def refused(*options: str) -> str:
    with pytest.raises(UsageError) as caught:
        resolve([*PPO, *options], GROUPS["ppo"])
    return str(caught.value)


EVALUATIONS = ("--evaluation_strategy=steps", "--eval_steps=1", "--eval_datasets=y")


def test_the_best_policy_is_that_of_the_highest_reward():
    values = resolve([*PPO, *EVALUATIONS, "--load_best_model_at_end"], GROUPS["ppo"])
    assert (values["metric_for_best_model"], values["greater_is_better"]) == ("eval/reward_mean", True)
    logged = ["--output_dir=out", "--train_datasets=x", *EVALUATIONS, "--early_stopping_patience=1"]
    values = resolve(logged, GROUPS["ppo.offline"])
    assert (values["metric_for_best_model"], values["greater_is_better"]) == ("eval/loss", False)


@pytest.mark.parametrize("name", ["loss", "eval/reward", "win_rate", "rewards/length"])
def test_a_metric_that_no_evaluation_has_is_refused(name):
    message = refused(*EVALUATIONS, f"--metric_for_best_model={name}")
    assert '" is not among the metrics of an evaluation: eval/reward_mean, eval/reward_sem, eval/kl_mean' in message


def test_a_metric_of_a_reward_source_is_known_later():
    values = resolve([*PPO, *EVALUATIONS, "--metric_for_best_model=eval/rewards/length"], GROUPS["ppo"])
    assert values["metric_for_best_model"] == "eval/rewards/length"


STAGES = [path for path in CONFIGS if not path.stem.startswith("apo_")]  # whole games: tests/apo/test_game.py


@pytest.mark.parametrize("path", STAGES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_config_file_resolves_and_every_key_in_it_counts(path, capsys):
    stage, offline = path.stem.removeprefix("offline_").partition("_")[0], path.stem.startswith("offline_")
    update = stage in ("rjs", "rrhf", "dpo")
    groups = GROUPS["ppo.offline" if offline else "apo.update" if update else stage if stage in GROUPS else "ppo"]
    values = resolve([str(path), "--dry_run"], groups)  # without, a file for several processes would miss them
    assert capsys.readouterr().err == ""
    if "policy_loss" in values or update:
        assert values["policy_update" if update else "policy_loss"] == stage
    if path.parent.name == "smollm2":
        model, data, training = parse([str(path)], groups)
        assert training.device == "cpu" or not training.bf16


def test_each_model_has_every_stage():
    stages = {f"{stage}_argument" for stage in ("sft", "rm", "ppo", "apa", "awr")}
    offline = {f"offline_{objective}_argument" for objective in ("apa", "awr", "bc", "ilql")}
    updates = {f"{update}_argument" for update in ("rjs", "rrhf", "dpo")}
    parallel = {f"{stage}_3d_argument" for stage in ("ppo", "apa", "awr")}
    sizes = {f"{stage}_{size}_argument" for stage in ("ppo", "apa", "awr") for size in ("125m", "1b", "6b", "20b")}
    games = {"apo_argument", "apo_baseline_argument"}
    assert {path.parent.name: {p.stem for p in CONFIGS if p.parent == path.parent} for path in CONFIGS} == {
        "hh": sizes | {"sft_argument", "rm_argument"},
        "llama": stages | parallel | updates | {"apo_argument"},
        "qwen": stages | parallel,
        "smollm2": stages | offline | updates | games | {"rm_lora_argument", "ppo_lora_argument"},
        "tldr": stages,
    }


@pytest.mark.parametrize("stage", SCRIPTS)
def test_every_field_of_paddlenlp_is_accepted(stage):
    names = {argument.name for group in GROUPS[stage] for argument in arguments_of(group)}
    assert set(TrainingArguments.__dataclass_fields__) <= names


@pytest.mark.parametrize("stage", SCRIPTS)
def test_every_argument_has_help_and_its_default_is_allowed(stage):
    for group in GROUPS[stage]:
        for argument in arguments_of(group):
            assert argument.group == UNUSED_GROUP or argument.help, argument.name
            if not argument.required:
                checked = argument.check(argument.default)
                assert getattr(checked, "value", checked) == argument.default, argument.name


@pytest.mark.parametrize("stage", SCRIPTS)
def test_no_name_is_declared_twice(stage):
    names = [n for group in GROUPS[stage] for a in arguments_of(group) for n in (a.name, *a.aliases)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("options", "start"),
    [
        (["--min_new_tokens=9", "--max_new_tokens=8"], '"min_new_tokens": 9 is more than "max_new_tokens", 8'),
        (["--max_length=8", "--max_prompt_len=9"], '"max_prompt_len": 9 is more than "max_length", 8'),
        (["--gradient_accumulation_steps=3"], '"per_device_train_batch_size" * "gradient_accumulation_steps" = 48'),
        (["--kl_controller=adaptive"], '"kl_controller": "adaptive" needs "kl_target"'),
        (["--ptx_coeff=1"], '"ptx_coeff": 1.0 needs "ptx_datasets"'),
        (["--reward_function=null"], "no reward: set one of reward_model_name_or_path, reward_function"),
        (["--reward_weights", "1", "2"], '"reward_weights": [1.0, 2.0] must hold 1, one each for reward_function'),
        (["--total_episodes=8", "--max_steps=2"], '"total_episodes": give it or "max_steps", not both'),
        (["--evaluation_strategy=epoch"], '"evaluation_strategy": "epoch" needs held-out data'),
        (["--evaluation_strategy=steps", "--eval_datasets=y"], '"evaluation_strategy": "steps" needs "eval_steps"'),
        (["--eval_datasets=y", "--eval_split_ratio=0.1"], '"eval_split_ratio": give it or "eval_datasets"'),
        (["--fp16"], '"fp16": true is not available yet; what works today is false'),
        (["--normalize_reward", "--score_scaling=running"], '"score_scaling": "running" excludes "normalize_reward"'),
        (["--score_scaling=fixed"], '"score_scaling": "fixed" and "score_std" need each other'),
        (["--score_std=2"], '"score_scaling": "fixed" and "score_std" need each other'),
        (
            ["--critic_shares_trunk", "--critic_learning_rate=1e-5"],
            '"critic_learning_rate" needs a critic of its own: give it or "critic_shares_trunk", not both',
        ),
        (
            ["--critic_shares_trunk", "--reward_critic_model_name_or_path=x"],
            '"reward_critic_model_name_or_path" needs a critic of its own',
        ),
        (["--critic_shares_trunk", "--lora"], '"critic_shares_trunk": give it or "lora"'),
        (["--stop_strings", "Human:", ""], '"stop_strings": "" would end every answer at once'),
        (
            ["--rollout_token_budget=99", "--rollout_oversampling=2"],
            '"rollout_token_budget": give it or "rollout_oversampling", not both',
        ),
        (
            ["--rollout_token_budget=99", "--rollout_batch_size=1", "--num_return_sequences=2"],
            '"rollout_token_budget" needs "rollout_batch_size", 1, of at least "num_return_sequences", 2: answers '
            "to a prompt wait for each other",
        ),
        (
            ["--offload_level=optimizer model"],
            '"offload_level": "optimizer model" is not allowed; it must be "" or some of freeze_model, optimizer, tr',
        ),
        (["--context_parallel_degree=2"], '"context_parallel_degree": 2 is not available yet'),
        (["--do_train=false"], '"do_train": false is not available yet; what works today is true'),
        (["--train_datasets="], '"train_datasets": required'),
        (["--top_p=0"], 'command line: --top_p: "0" is not allowed; it must be a number > 0 and <= 1'),
        (["--report_to=mlflow"], 'command line: --report_to: "mlflow" is not allowed; it must be a list of visualdl'),
    ],
)
def test_refused_in_one_line(options, start):
    message = refused(*options)
    assert message.startswith(start)
    assert "\n" not in message


@pytest.mark.parametrize(
    ("processes", "options", "start"),
    [
        (1, "pipeline_parallel_degree=2", '"tensor_parallel_degree" 1 * "pipeline_parallel_degree" 2 = 2 must divide'),
        (1, "tensor_parallel_degree=0", '"tensor_parallel_degree": 0 must be at least 1, or -1 for the default'),
        (4, "sharding=stage1 sharding_degree=0", '"sharding_degree": 0 must be at least 1, or -1 for the default'),
        (6, "tensor_parallel_degree=4", '"tensor_parallel_degree" 4 * "pipeline_parallel_degree" 1 = 4 must divide'),
        (4, "sharding_parallel_degree=2", '"sharding_parallel_degree": 2 needs "sharding": "stage1"'),
        (4, "sharding_degree=2", '"sharding_parallel_degree": 2 needs "sharding": "stage1"'),
        (4, "sharding=stage4", '"sharding": "stage4" must be one of "", "stage1", "stage2", "stage3"'),
        (4, "sharding=stage1 sharding_parallel_degree=3", '"sharding_parallel_degree": 3 must divide the 4 processes'),
        (4, "sharding=stage2 pipeline_parallel_degree=2", '"sharding": "stage2" does not go with'),
        (4, "sharding=stage3 pipeline_parallel_degree=2", '"sharding": "stage3" does not go with'),
        (4, "sequence_parallel=true", '"sequence_parallel": true needs "tensor_parallel_degree" of at least 2'),
    ],
)
def test_layouts_refused_in_one_line(monkeypatch, processes, options, start):
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", str(processes))
    message = refused(*(f"--{option}" for option in options.split()))
    assert message.startswith(start)
    assert "\n" not in message


@pytest.mark.parametrize(
    ("processes", "options", "expected"),
    [
        (1, "", Layout()),
        (1, "sharding=stage2", Layout()),  # nobody to share with
        (4, "", Layout(data=4)),
        (8, "tensor_parallel_degree=2 pipeline_parallel_degree=2", Layout(data=2, pipeline=2, tensor=2)),
        (8, "sharding=stage3 tensor_parallel_degree=2", Layout(sharding=4, tensor=2, sharding_stage=3)),
        (8, "sharding=stage1 sharding_degree=2", Layout(data=4, sharding=2, sharding_stage=1)),
        (4, "tensor_parallel_degree=4 sequence_parallel=true", Layout(tensor=4, sequence_parallel=True)),
    ],
)
def test_layouts_by_the_arguments(monkeypatch, processes, options, expected):
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", str(processes))
    values = resolve([*PPO, *(f"--{option}" for option in options.split())], GROUPS["ppo"])
    assert resolve_layout(values, processes) == expected
    assert expected.processes == processes


@pytest.mark.parametrize(
    ("given", "taken"), [("single", "single"), ("tensor_parallel", "tensor_parallel"), ("", None)]
)
def test_eval_modes(given, taken):
    assert resolve([*PPO, f"--eval_mode={given}"], GROUPS["ppo"])["eval_mode"] == taken
    assert refused("--eval_mode=other").startswith('command line: --eval_mode: "other" is not allowed')


def test_a_missing_output_directory_is_named():
    with pytest.raises(UsageError, match='^"output_dir": required'):
        resolve(PPO[1:], GROUPS["ppo"])


def test_parsing_on_one_cpu_process(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    options = ["--report_to=all", "--max_dec_len=4", "--min_dec_len=2", "--rollout_n=2", "--seed=5"]
    _, data, training = parse([*PPO, *options], GROUPS["ppo"])
    assert (training.device, training.world_size, training.log_level) == ("cpu", 1, "info")
    assert (training.max_new_tokens, training.min_new_tokens, training.num_return_sequences) == (4, 2, 2)
    assert (training.report_to, training.data_seed, data.max_prompt_len) == (["visualdl", "tensorboard"], 5, 2048)


def test_16_bits_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    _, _, training = parse([*PPO, "--bf16"], GROUPS["ppo"])
    assert training.bf16 is False
    assert 'notice: "bf16": true needs a GPU; on this CPU everything is computed in float32' in capsys.readouterr().out


def test_help_shows_our_groups_first_and_idle_names_last():
    known = {argument.name: argument for group in GROUPS["ppo"] for argument in arguments_of(group)}
    text = build_parser(known, "run_ppo.py").format_help()
    assert text.index("\nModel:") < text.index("\nData:") < text.index("\nObjective:") < text.index("\nOptimizer:")
    assert text.index("--kl_coeff") < text.index(UNUSED_GROUP) < text.index("past_index")
    assert "--past_index" not in text


def test_the_page_is_current():
    assert (ROOT / "docs" / "arguments.md").read_text() == render_page(), (
        "run: python -m alignment.runtime.document_arguments"
    )
