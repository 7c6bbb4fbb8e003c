"""What the steps of a game are told, and which arguments are refused before any of them."""

from __future__ import annotations

import json

import pytest

from alignment.apo.game import Game, draw_seed
from alignment.apo.round_arguments import RoundArguments
from alignment.apo.round_checks import check_queries
from alignment.runtime.arguments import parse
from alignment.runtime.faults import UsageError
from alignment.runtime.steps import Step, StepRunner, knows
from data import DataError
from tests.stages import CHECKOUT

FILES = ["smollm2/apo", "smollm2/apo_baseline", "llama/apo"]
SMALL = CHECKOUT / "config/smollm2/apo_argument.json"


def steps_of(*words):
    (args,) = parse(list(map(str, words)), [RoundArguments])
    return {step.name: step for part in Game(args).steps() for step in part}


@pytest.mark.parametrize("name", FILES)
def test_presets_give_all_steps(name):
    file = CHECKOUT / f"config/{name}_argument.json"
    values, steps = json.loads(file.read_text()), steps_of(file)
    own = ["rm", "samples", "scores", "selected", "policy", "answers", "test_scores", "rm_scores"]
    adversarial = ["golden_samples", "comparisons"] if values["adversarial"] else []
    each = [*adversarial, "held_out", *own]
    rounds = [f"round-{number + 1}/{step}" for number in range(values["rounds"]) for step in each]
    assert list(steps) == ["testing_rm", "start/answers", "start/test_scores", *rounds]


def test_baseline_differs_in_the_adversarial_pairs_alone():
    files = [SMALL.parent / f"{name}_argument.json" for name in ("apo", "apo_baseline")]
    apo, baseline = (json.loads(file.read_text()) for file in files)
    dropped = {"adversarial", "golden_datasets", "output_dir", "reward_arguments"}
    assert {k: v for k, v in apo.items() if k not in dropped} == {
        k: v for k, v in baseline.items() if k not in dropped
    }
    own = {k: v for k, v in apo["reward_arguments"].items() if not k.startswith("apo_")}
    assert own == baseline["reward_arguments"]


def test_llama_has_the_papers_values():
    steps = steps_of(CHECKOUT / "config/llama/apo_argument.json")
    rates = [steps[f"round-{number}/policy"].arguments["learning_rate"] for number in (1, 2, 3)]
    assert rates == [5e-6, 2e-6, 9e-7]
    for number in (1, 2, 3):
        told = steps[f"round-{number}/rm"].arguments
        batch = told["per_device_train_batch_size"] * told["gradient_accumulation_steps"] * 8
        assert (told["learning_rate"], batch, told["apo_loss_coeff"], told["apo_sample_num"]) == (1e-6, 64, 0.1, 4)
        assert (told["num_train_epochs"], told["warmup_steps"], told["max_length"]) == (1, 100, 512)
        assert told["model_name_or_path"] == "meta-llama/Llama-2-7b"
        drawn = steps[f"round-{number}/samples"].arguments
        assert (drawn["temperature"], drawn["num_return_sequences"], drawn["max_new_tokens"]) == (1.2, 4, 256)
    launcher = "-u -m paddle.distributed.launch --nproc_per_node 8 --log_dir checkpoints/llama-7b/apo/log "
    assert steps["round-1/rm"].command.startswith(launcher)


def test_models_hand_over_from_round_to_round():
    def starts(*words):
        steps = steps_of(SMALL, "--rounds", 3, "--output_dir", "g", *words)
        kinds = ("golden_samples", "rm", "samples", "policy")
        return [
            [steps[f"round-{number}/{kind}"].arguments["model_name_or_path"] for kind in kinds] for number in (1, 2, 3)
        ]

    base, policies = "smollm2-135m-instruct", ["smollm2-135m-instruct", "g/round-1/policy", "g/round-2/policy"]
    assert starts() == [[policy, base, policy, policy] for policy in policies]
    models = ["m", "g/round-1/rm", "g/round-2/rm"]
    told = starts("--reward_restart", "continue", "--policy_restart", "initial", "--reward_model_base", "m")
    assert told == [[policy, model, policy, base] for policy, model in zip(policies, models, strict=True)]


def test_reward_models_learn_from_what_they_should():
    steps = steps_of(SMALL, "--output_dir", "g", "--testing_reward_arguments", '{"num_train_epochs": 2}')
    told = steps["round-2/rm"].arguments
    assert told["train_datasets"] == "hh-excerpt/train:1 of 2, apo:1.0:g/round-2/comparisons.json"
    assert told["eval_datasets"] == "hh-excerpt/test, apo:1.0:g/round-2/held_out.json"
    assert "--samples g/round-1/answers.jsonl" in steps["round-2/held_out"].command
    testing = steps["testing_rm"].arguments
    assert testing["train_datasets"] == "hh-excerpt/train" and testing["eval_datasets"] == "hh-excerpt/test"
    assert testing["num_train_epochs"] == 2 and testing["learning_rate"] == 2e-4
    assert not {"apo_loss_coeff", "apo_sample_num"} & testing.keys()
    bare = steps_of(SMALL, "--reward_arguments", "{}")["round-1/rm"].arguments
    assert (bare["apo_loss_coeff"], bare["apo_sample_num"]) == (0.1, 4)
    plain = steps_of(SMALL, "--adversarial", "false")["round-1/rm"].arguments
    assert plain["train_datasets"] == "hh-excerpt/train:1 of 2" and "apo_loss_coeff" not in plain
    known = steps_of(SMALL, "--testing_reward_datasets", "null", "--testing_reward_model_name_or_path", "judge")
    assert "testing_rm" not in known
    assert known["round-1/test_scores"].arguments["reward_model_name_or_path"] == "judge"


@pytest.mark.parametrize(
    ("update", "mode", "data"),
    [("rjs", "best", "apo-samples"), ("rrhf", "ranking", "apo-samples"), ("dpo", "pairs", "apo")],
)
def test_each_update_gets_what_it_needs(update, mode, data):
    steps = steps_of(SMALL, "--policy_update", update, "--policy_arguments", "{}", "--output_dir", "g")
    assert f"--mode {mode} " in steps["round-1/selected"].command
    assert steps["round-1/policy"].arguments["train_datasets"] == f"{data}:1.0:g/round-1/selected.json"
    every = steps_of(SMALL, "--policy_update", "dpo", "--policy_arguments", '{"dpo_pairs": "all"}')
    assert "--mode ranking " in every["round-1/selected"].command


def test_only_evaluations_draw_alike():
    steps = steps_of(SMALL, "--rounds", 2)
    drawn = [name for name, step in steps.items() if getattr(step, "stage", "") == "sample"]
    seeds = {name: steps[name].arguments["seed"] for name in drawn}
    evaluations = [seeds.pop(f"{place}/answers") for place in ("start", "round-1", "round-2")]
    assert len(set(evaluations)) == 1 and len({*seeds.values(), *evaluations}) == len(seeds) + 1
    assert draw_seed(1, 2, 1) != draw_seed(2, 1, 1)


def test_files_of_queries_are_read_as_such(tmp_path):
    golden = tmp_path / "golden.json"
    golden.write_text("[]")
    steps = steps_of(SMALL, "--golden_datasets", golden)
    told = steps["round-1/golden_samples"].arguments
    assert told["input_file"] == str(golden) and "datasets" not in told
    assert f"--golden {golden} " in steps["round-1/comparisons"].command
    assert "query_file" not in told and "query_file" not in steps["round-1/samples"].arguments
    steps = steps_of(SMALL, "--golden_datasets", golden, "--golden_query_file", "pairs.json")
    assert steps["round-1/golden_samples"].arguments["query_file"] == "pairs.json"
    assert "query_file" not in steps["round-1/samples"].arguments


def check(*words):
    (args,) = parse(list(map(str, words)), [RoundArguments])
    check_queries(args)


def test_the_authors_files_are_read_before_the_first_step(tmp_path):
    """Golden answers without their queries, which stand in the comparisons of the same ids."""
    golden, pairs = tmp_path / "golden.json", tmp_path / "train.json"
    golden.write_text('[{"query_id": 7, "golden": "A wise owl."}]')
    pairs.write_text('[{"text": ["Name a bird.<sep>owl", "Name a bird.<sep>cod"], "scores": [1, 0], "query_id": 7}]')
    with pytest.raises(UsageError, match='golden.json, item 1 .*: field "query": missing; give it, or have "query_fi'):
        check(SMALL, "--golden_datasets", golden)
    check(SMALL, "--golden_datasets", golden, "--golden_query_file", pairs)
    with pytest.raises(UsageError, match="nowhere.json: No such file"):
        check(SMALL, "--golden_datasets", golden, "--golden_query_file", tmp_path / "nowhere.json")
    other = tmp_path / "other.json"
    other.write_text(pairs.read_text().replace("Name a bird.", "Name a fish."))
    with pytest.raises(UsageError, match="other.json: query_id '7' is that of another prompt too .*train.json"):
        check(SMALL, "--eval_datasets", f"apo:1.0:{pairs}, apo:1.0:{other}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--golden_datasets", "null"], '"golden_datasets": required'),
        (["--testing_reward_datasets", "null"], 'give either "testing_reward_datasets", .* or "testing_reward_model'),
        (["--testing_reward_model_name_or_path", "m"], "give either"),
        (["--reward_learning_rates", "[1e-6, 0]"], r'"reward_learning_rates": \[1e-06, 0.0\] is not allowed'),
        (["--output_dir", "a,b"], '"output_dir": a,b must have no comma'),
        (["--golden_datasets", "nowhere.json"], '"golden_datasets": nowhere.json: no such file'),
        (["--policy_arguments", "nowhere.json"], "nowhere.json: No such file"),
        (["--policy_update", "ppo"], "must be one of rjs, rrhf, dpo"),
        (["--golden_query_file", "q.json"], '"golden_query_file": q.json needs a file as "golden_datasets"'),
        (["--eval_datasets", "hh-excerp/test"], "hh-excerp/test"),
    ],
)
def test_what_cannot_work_is_refused(words, message):
    with pytest.raises((UsageError, DataError), match=message):
        steps_of(SMALL, *words)


def test_a_secret_stands_in_its_steps_argument_file_alone(tmp_path, monkeypatch, capsys):
    """Another secret is no other step, and an interrupted step goes on with it."""
    monkeypatch.chdir(tmp_path)
    record = tmp_path / "game" / "steps.json"

    def begun(secret):
        told = {"reward_server": "http://localhost:1/", "reward_server_token": secret}
        words = ["--score_arguments", json.dumps(told), "--output_dir", "game"]
        steps = steps_of(SMALL, *words)
        StepRunner(record, steps.values(), replace=False).close()
        return steps["start/test_scores"]

    begun("hunter2").begin()
    file = tmp_path / "game" / "start" / "test_scores_argument.json"
    assert json.loads(file.read_text())["reward_server_token"] == "hunter2"
    assert file.stat().st_mode & 0o777 == 0o600
    record.write_text(json.dumps(json.loads(record.read_text()) | {"begun": "testing_rm"}))
    begun("hunter3").go_on()
    assert json.loads(file.read_text())["reward_server_token"] == "hunter3"
    assert "hunter" not in record.read_text() + capsys.readouterr().out


def test_a_record_of_an_older_version_loses_its_secrets(tmp_path):
    record, step = tmp_path / "steps.json", Step("a", "-c pass")
    told = {"command": "-c pass", "reward_server_token": "hunter2"}
    record.write_text(json.dumps({"steps": {"a": told}, "begun": None, "finished": ["a"]}))
    assert knows(record, [step])
    StepRunner(record, [step], replace=False).close()
    assert "hunter2" not in record.read_text()


def test_printed_arguments_hide_a_steps_secrets(capsys):
    with pytest.raises(SystemExit):
        steps_of(SMALL, "--score_arguments", '{"reward_server_token": "hunter2"}', "--print_config")
    printed = capsys.readouterr().out
    assert "hunter2" not in printed and json.loads(printed)["score_arguments"] == {"reward_server_token": "***"}
