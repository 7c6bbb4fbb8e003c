"""A whole game by its command, on a tiny model: without interruption, and killed thrice in its second round."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.stages import CHECKOUT, read_rows, write_project

STAGE = {
    "max_length": 40, "max_steps": 2, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8,
    "save_strategy": "steps", "save_steps": 1, "disable_tqdm": True,
}  # fmt: skip
GAME = {
    "rounds": 2, "policy_update": "dpo", "model_name_or_path": "model", "output_dir": "game", "seed": 3,
    "preference_datasets": "animals:16/-1", "golden_datasets": "animals:6/-1", "policy_datasets": "animals:6/-1",
    "eval_datasets": "animals:6/-1", "testing_reward_datasets": "animals:24/-1", "dataset_modules": ["user_data.py"],
    "num_return_sequences": 2, "reward_learning_rates": [0.01, 0.005], "policy_learning_rates": [0.01],
    "sample_arguments": {"max_prompt_len": 24, "max_new_tokens": 6, "per_device_prompt_batch_size": 3},
    "score_arguments": {"max_prompt_len": 24}, "reward_arguments": STAGE, "policy_arguments": STAGE,
}  # fmt: skip
# What ends the step and the game above it, as SIGKILL does, when the step is about to do something for the n-th time.
SITECUSTOMIZE = '''
import os, signal, sys

event, place, number = os.environ["KILL_AT"].split()
left = int(number)


def watch(name, args):
    global left
    if name == event and str(args[name == "os.rename"]).endswith(place):
        left -= 1
        if left == 0:
            os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)


sys.addaudithook(watch)
'''
KILLS = [  # each after the one before
    "os.rename round-2/rm/checkpoint-2 1",  # while the second checkpoint of two is written
    "open round-2/samples.jsonl.partial.jsonl 4",  # after the first batch of two, which is the third write
    "os.rename round-2/policy/checkpoint-2 1",
]
MEASURED = ("timing_s/", "memory_gb/", "perf/")
TIMED = ("run.json", "metrics.jsonl", "log")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = write_project(tmp_path_factory.mktemp("project"))
    (folder / "apo.json").write_text(json.dumps(GAME))
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(SITECUSTOMIZE)
    return folder


def play(project, *words, script="tests/apo/warm_game.py", **environment):
    command = [sys.executable, str(CHECKOUT / script), "apo.json", *words]
    paths = os.pathsep.join([str(CHECKOUT), *([str(project / "site")] if environment else [])])
    result = subprocess.run(
        command, cwd=project, env={**os.environ, "PYTHONPATH": paths, **environment}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    return result.returncode, result.stdout


@pytest.fixture(scope="module")
def whole(project):
    """Of an uninterrupted game. Its first round alone stays in game/."""
    game, first = project / "game", project / "first"
    status, shown = play(project, "--rounds", "1")
    assert status == 0, shown
    shutil.copytree(game, first)
    status, shown = play(project)
    assert status == 0 and shown.count("already done") == 14, shown
    game.rename(project / "whole")
    first.rename(game)
    return project / "whole"


@pytest.mark.slow
def test_game_leaves_its_report(project, whole):
    numbers = json.loads((whole / "rounds.json").read_text())
    start, first, second = numbers["rounds"]
    assert start["win_rate"]["mean"] == 0.5 and start["gain"] == {"mean": 0, "standard_error": 0}
    for row in (first, second):
        assert set(row["reward_model"]["scores"]) == {"golden", "sample", "chosen", "rejected"}
        wins = row["win_rate"]
        assert row["prompts"] == 6 and 0 <= wins["low"] <= wins["mean"] <= wins["high"] <= 1
    assert (whole / "rounds.md").read_text().count("\n| ") == 5  # heads, their line, three rounds
    pictures = {path.name for path in whole.glob("*.png")}
    assert pictures == {"rounds.png", "score_distributions.png", "reliability.png"}
    answers = {(whole / place / "answers.jsonl").read_bytes() for place in ("start", "round-1", "round-2")}
    assert len(answers) == 3  # the policy moved
    apo = [row for row in json.loads((whole / "round-1/comparisons.json").read_text()) if row["type"] == "apo"]
    told = read_rows(whole / "round-1/rm/metrics.jsonl")
    assert len(apo) > 6 and "apo/loss" in told[1]


@pytest.mark.slow
def test_killed_games_end_with_the_same_files(project, whole):
    for place in KILLS:
        status, shown = play(project, KILL_AT=place)
        assert status == -signal.SIGKILL, shown
    status, shown = play(project)
    assert status == 0, shown
    assert "--resume_from_checkpoint auto" in shown and shown.count("already done") == 21
    game = project / "game"
    assert files_of(game) == files_of(whole)
    for path in whole.rglob("metrics.jsonl"):
        assert rows_of(game / path.relative_to(whole)) == rows_of(path)
    check_changes_are_refused(project)
    check_comparison(project)


@pytest.mark.trust_full
def test_a_game_killed_at_random_moments_ends_with_the_same_files(project, whole):
    """The command as a user starts it; SIGKILL takes it and the running step together, whatever that does then."""
    shutil.rmtree(project / "game", ignore_errors=True)
    command, moments = [sys.executable, "-u", str(CHECKOUT / "alignment/apo/run_apo.py"), "apo.json"], random.Random(7)
    for _ in range(3):
        game = subprocess.Popen(
            command, cwd=project, stdout=subprocess.PIPE, text=True, bufsize=1, start_new_session=True
        )
        for _ in range(moments.randint(2, 8)):
            assert any(line.startswith("$ python") for line in game.stdout)  # reads on to the begin of a step
        time.sleep(moments.uniform(0, 8))
        os.killpg(game.pid, signal.SIGKILL)
        assert game.wait() == -signal.SIGKILL
        game.stdout.close()
    status, shown = play(project, script="alignment/apo/run_apo.py")
    assert status == 0 and shown.count("already done") > 3, shown
    assert files_of(project / "game") == files_of(whole)


@pytest.mark.layouts_full
def test_two_processes_play_the_same_game(project, whole):
    half = json.dumps(STAGE | {"per_device_train_batch_size": 4})
    words = ("--rounds", "1", "--output_dir", "two", "--reward_arguments", half, "--policy_arguments", half)
    status, shown = play(project, *words, "--nproc_per_node", "2", script="alignment/apo/run_apo.py")
    assert status == 0, shown
    for name in ("start/answers.jsonl", "round-1/comparisons.json", "round-1/samples.jsonl"):
        assert (project / "two" / name).read_bytes() == (whole / name).read_bytes()
    rounds = [json.loads((folder / "rounds.json").read_text())["rounds"][1] for folder in (project / "two", whole)]
    for key in ("test_score", "rm_score"):
        assert rounds[0][key] == pytest.approx(rounds[1][key], abs=1e-3)


def check_changes_are_refused(project):
    for words in (["--seed", "4"], ["--policy_arguments", json.dumps(STAGE | {"max_steps": 3})]):
        status, shown = play(project, *words)
        assert status == 2 and '"output_dir": in game step ' in shown, shown
    status, shown = play(project, "--policy_arguments", '{"max_stepz": 3}')
    assert status == 2 and 'error: step round-1/policy: "max_stepz": unknown key (did you mean "max_steps"?)' in shown


def check_comparison(project):
    """Of a game with itself."""
    command = [sys.executable, "-m", "alignment.apo.compare", "whole", "game", "--output_dir", "compared"]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    result = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == (project / "compared/comparison.md").read_text().strip()
    assert "after their last rounds: score 0.000 ± 0.000, win rate 0.500 [" in result.stdout
    assert result.stdout.count("\n| ") == 6 and (project / "compared/comparison.png").exists()


def files_of(folder):
    found = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in sorted(found.items()) if path.name not in TIMED}


def rows_of(path):
    rows = read_rows(path)
    return [{key: value for key, value in row.items() if not key.startswith(MEASURED)} for row in rows]
