"""The comparison of objectives: its statistics by hand, and the whole command, interrupted and resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alignment.runtime.arguments import resolve
from alignment.runtime.faults import UsageError
from benchmarks.launches import Launch
from benchmarks.objectives import Comparison, read_setting
from benchmarks.objectives_curves import common_kl, curves_of, reward_at_kl, summarize
from tests.stages import ARGUMENTS, CHECKOUT, read_rows, write_project

ONLINE = {"max_steps": 2, "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "ptx_coeff": 0.0}
TINY = {
    "stage": "ppo",
    "reward_model": {key: value for key, value in ARGUMENTS["rm"].items() if key != "output_dir"}
    | {"train_datasets": "animals:1 of 2", "max_steps": 2},
    "judge": {"train_datasets": "animals:2 of 2", "seed": 4},
    "policy": {
        key: value
        for key, value in ARGUMENTS["ppo"].items()
        if key not in ("output_dir", "reward_function", "ptx_datasets", "seed")
    }
    | ONLINE,
    "objectives": {
        "apa": {"fixed": {"policy_loss": "apa", "kl_coeff": 0}, "search": [{"apa_lambda": 0.5}, {"apa_lambda": 2.0}]},
        "ppo": {"fixed": {"policy_loss": "ppo"}, "search": [{"clip_range_ratio": 0.2}, {"clip_range_ratio": 0.1}]},
    },
    "search_seed": 0,
    "seeds": [1],
}
LOGGED = {  # one value each, so no search
    "stage": "offline",
    "policy": {
        key: value
        for key, value in ARGUMENTS["offline"].items()
        if key not in ("output_dir", "reward_function", "seed")
    }
    | {"max_steps": 2, "evaluation_strategy": "no"},
    "objectives": {
        "bc": {"fixed": {"policy_loss": "bc"}, "search": [{}]},
        "awr": {"fixed": {"policy_loss": "awr", "awr_beta": 0.5}, "search": [{}]},
    },
}


def curve(kl, judge):
    names = ("win_rate", "reward", "length")
    return {"time": [8 * i for i in range(len(kl))], "kl": kl, "judge_reward": judge} | dict.fromkeys(names, judge)


def test_reward_at_a_kl_is_read_off_the_first_crossing():
    run = curve([0.0, 2.0, 1.0, 4.0], [1.0, 3.0, 9.0, 5.0])
    assert reward_at_kl(run, 1.0) == pytest.approx(2.0)  # half-way up to the second point, not the third
    assert reward_at_kl(run, 2.0) == pytest.approx(3.0)
    assert reward_at_kl(run, 3.0) == pytest.approx(9 + (5 - 9) * 2 / 3)
    assert reward_at_kl(run, -1.0) == 1.0
    with pytest.raises(ValueError, match="KL 5.0 was not reached, only 4.0"):
        reward_at_kl(run, 5.0)


def test_summary_by_hand():
    """Seeds end at 3 and 5, from 1 and 0; at KL 2, which the run with the least reaches, they have 2 and 5."""
    seeds = [curve([0.0, 4.0], [1.0, 3.0]), curve([0.0, 2.0], [0.0, 5.0])]
    runs = {"a": seeds, "b": [curve([0.0, 2.0, 1.0], [0.0, 2.0, 4.0])]}
    assert common_kl([*runs["a"], *runs["b"]]) == 2.0
    summary = summarize(runs)
    assert summary["equal_kl"] == 2.0
    a, b = summary["objectives"]["a"], summary["objectives"]["b"]
    assert a["judge_reward"] == {"mean": 4.0, "sem": pytest.approx(1.0)}  # deviation sqrt(2), of 2 seeds
    assert a["judge_gain"] == {"mean": 3.5, "sem": pytest.approx(1.5)}
    assert a["judge_reward_at_equal_kl"] == {"mean": 3.5, "sem": pytest.approx(1.5)}
    assert b["judge_reward_at_equal_kl"] == {"mean": 2.0, "sem": 0.0} and b["kl"] == {"mean": 1.0, "sem": 0.0}


@pytest.mark.parametrize(
    ("file", "names", "search"),
    [("objectives.json", {"apa", "awr", "ppo"}, 2), ("offline.json", {"bc", "apa", "awr", "ilql"}, 1)],
)
def test_the_settings_that_ship_are_fair_and_accepted(tmp_path, file, names, search):
    """Disjoint training pairs for the judge; same length and search for all; every run's arguments are valid."""
    setting = read_setting(str(CHECKOUT / "benchmarks" / file))
    assert {name.removeprefix("offline_") for name in setting["objectives"]} == names and len(setting["seeds"]) >= 3
    parts = [setting[name]["train_datasets"] for name in ("reward_model", "judge")]
    assert parts[0].count("1 of 2") == 2 and parts[1] == parts[0].replace("1 of 2", "2 of 2")
    comparison = Comparison(setting, tmp_path)
    launches = [comparison.reward_model, comparison.judge, *comparison._all_policies()]
    assert len({launch.folder for launch in launches}) == 2 + search * len(names)
    for launch in launches:
        launch.check()
    same = ("max_steps", "num_train_epochs", "per_device_prompt_batch_size", "eval_steps", "learning_rate")
    assert len({tuple(launch.arguments.get(key) for key in same) for launch in launches[2:]}) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [0, 1]}, '"seeds" must be some that "search_seed", 0, is not among'),
        ({"seed": 1}, "needs the keys reward_model, judge, policy"),
        (
            {"objectives": {"apa": TINY["objectives"]["apa"], "ppo": {"fixed": {}, "search": [{}]}}},
            "must get a search of the same size, not {'apa': 2, 'ppo': 1}",
        ),
        ({"stage": "sft"}, "\"stage\": 'sft' is not one of ppo, offline"),
    ],
)
def test_an_unfair_setting_is_refused(tmp_path, changes, message):
    file = tmp_path / "setting.json"
    file.write_text(json.dumps(TINY | changes))
    with pytest.raises(UsageError) as error:
        read_setting(str(file))
    assert message in str(error.value)


def test_other_arguments_in_the_same_folder_are_refused(tmp_path):
    arguments = TINY["reward_model"]
    Launch("rm", tmp_path / "rm", arguments).check()
    with pytest.raises(UsageError, match='holds a run with "seed": 3, not 4; name another folder'):
        Launch("rm", tmp_path / "rm", arguments | {"seed": 4}).check()
    with pytest.raises(UsageError, match="unknown key"):
        Launch("rm", tmp_path / "other", arguments | {"sed": 4}).check()
    assert not (tmp_path / "other/given.json").exists()


def start(project: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "benchmarks.objectives", "--json", "result.json", "--setting", "setting.json"]
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    return subprocess.Popen(
        command, cwd=project, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(project: Path) -> str:
    shown, _ = (process := start(project)).communicate()
    assert process.returncode == 0, shown
    return shown


def curves(folder: Path) -> dict:
    return curves_of(read_rows(folder / "metrics.jsonl"), 8)


@pytest.mark.slow
def test_the_whole_command_interrupted_and_resumed(tmp_path):
    """Killed in the middle of a run, the same command ends it as if nothing had been; done again, it runs nothing."""
    project = write_project(tmp_path)
    setting = TINY | {"objectives": {"ppo": TINY["objectives"]["ppo"]}}
    (project / "setting.json").write_text(json.dumps(setting))
    interrupted = project / "result/ppo-clip_range_ratio=0.2-seed=0"
    process = start(project)
    while not (interrupted / "policy/checkpoint-1/trainer_state.json").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    shown, _ = process.communicate()
    assert process.returncode == 130 and not (project / "result.json").exists()
    was_cut = not (interrupted / "finished.json").exists()

    shown = finish(project)
    assert "already done: reward_model" in shown and "already done: judge" in shown
    result = json.loads((project / "result.json").read_text())
    assert set(result["objectives"]) == {"ppo"} and (result["length"], result["unit"]) == (16, "episodes")
    for found in result["objectives"].values():
        assert len(found["search"]) == 2 and len(found["runs"]) == 1
        assert found["best"] == max(found["search"], key=lambda tried: tried["reward"])["values"]
        for run in found["runs"]:
            assert run["time"] == [0, 8, 16] and run["win_rate"][0] == 0.5
            assert abs(run["kl"][0]) < 1e-4 and all(np.isfinite(value) for values in run.values() for value in values)
        final = [run["judge_reward"][-1] for run in found["runs"]]
        assert found["final"]["judge_reward"]["mean"] == pytest.approx(np.mean(final))
    assert not list((project / "result").glob("*/policy")) and list((project / "result/judge").glob("checkpoint-*"))
    pixels = np.asarray(Image.open(project / "result.png").convert("L"))
    assert pixels.shape[1] > 1500 and pixels.std() > 5

    assert was_cut and curves(interrupted)["time"] == [0, 8, 16]
    whole = curves(interrupted)
    shutil.rmtree(interrupted)
    assert finish(project).count(" s, ") == 1  # only what is gone is run again
    assert curves(interrupted) == whole
    assert json.loads((project / "result.json").read_text())["objectives"] == result["objectives"]


@pytest.mark.slow
def test_learning_from_logged_answers_is_compared_too(tmp_path):
    """On the reward models of the setting that needs them; without a search."""
    project = write_project(tmp_path)
    (project / "setting.json").write_text(json.dumps(TINY | LOGGED))
    finish(project)
    result = json.loads((project / "result.json").read_text())
    assert (result["length"], result["unit"]) == (2, "steps")
    for found in result["objectives"].values():
        assert found["search"] == [] and found["best"] == {}
        [run] = found["runs"]
        assert run["time"] == [0, 2] and abs(run["kl"][0]) < 1e-4


def test_arguments_of_the_tiny_setting_are_those_of_the_stages(tmp_path):
    """So that the test above fails here first, in a second, when an argument is renamed."""
    from alignment.ppo.arguments import GROUPS

    launch = next(Comparison(TINY, tmp_path)._all_policies())
    launch.check()
    assert resolve([str(launch.folder / "given.json")], GROUPS)["judge_model_name_or_path"] == str(tmp_path / "judge")
