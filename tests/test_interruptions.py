"""What ends a run or stands in its way: SIGTERM, a full disk, a damaged checkpoint, a run that is finished."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from alignment.ppo.models.loading import load_policy, resolve_model_directory
from alignment.training.checkpoint import read_state
from alignment.training.sums import find_damage
from tests.kill_campaign import assert_same
from tests.stages import CHECKOUT, SCRIPTS, read_rows, weights_of, write_project, write_reward_model
from tests.training.checkpoints import flip, names_of
from tests.warm import Warm

STEPS = ("--max_steps", 4, "--save_strategy", "steps", "--save_steps", 2, "--lr_scheduler_type", "constant")
AUTO = ("--resume_from_checkpoint", "auto")
EVALUATED = ("--evaluation_strategy", "steps", "--eval_steps", 1)
LONG = ("--max_steps", 5000, "--save_strategy", "no", "--lr_scheduler_type", "constant")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = write_project(tmp_path_factory.mktemp("project"))
    write_reward_model(folder / "reward")
    return folder


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    with Warm(tmp_path_factory.mktemp("logs")) as process:
        yield process


@pytest.fixture
def train(project, warm):
    """(name of output_dir, words) -> (exit statuses, what was shown) of an SFT run."""

    def call(output, *words, **more):
        job = warm.run(project, SCRIPTS["sft"], "sft.json", "--output_dir", output, *words, **more)
        return job.wait(), job.shown

    return call


@pytest.fixture(scope="module")
def whole(project, warm):
    job = warm.run(project, SCRIPTS["sft"], "sft.json", "--output_dir", "whole", *STEPS)
    assert job.wait() == [0], job.shown
    return project / "whole"


def errors_in(shown):
    return [line for line in shown.splitlines() if line.startswith("error: ")]


def wait_for_step(output, step):
    while not (output / "metrics.jsonl").exists() or f'"step": {step},' not in (output / "metrics.jsonl").read_text():
        time.sleep(0.01)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.layouts)])
def test_sigterm_saves_and_a_second_run_goes_on(project, warm, train, processes):
    """Of two processes, one alone gets it."""
    output = project / f"stopped-{processes}"
    job = warm.start(project, SCRIPTS["sft"], "sft.json", "--output_dir", output.name, *LONG, processes=processes)
    wait_for_step(output, 2)
    os.kill(job.pids[-1], signal.SIGTERM)
    assert job.wait() == [75] * processes, job.shown
    (saved,) = output.glob("checkpoint-*")
    step = int(saved.name.removeprefix("checkpoint-"))
    lines = [line for line in job.shown.splitlines() if line.startswith("stopped: ")]
    assert len(lines) == processes and f"SIGTERM in step {step} of 5000, which is done and saved" in lines[0]
    assert "--resume_from_checkpoint auto" in lines[0] and not errors_in(job.shown)
    constant = ("--max_steps", step + 2, *LONG[2:], *AUTO)  # a constant rate: the length of the run changes no step
    assert train(output.name, *constant, processes=processes)[0] == [0] * processes
    saves = ("--save_strategy", "steps", "--save_steps", step)
    assert train("uninterrupted", *constant, *saves, processes=processes)[0] == [0] * processes
    assert_same(project / "uninterrupted", output)
    subprocess.run(["rm", "-r", str(project / "uninterrupted")], check=True)


@pytest.mark.parametrize(
    ("tool", "options"),
    [
        ("sample", ("--model_name_or_path", "model", "--max_new_tokens", 6, "--per_device_prompt_batch_size", 1)),
        ("score", ("--reward_model_name_or_path", "reward", "--per_device_eval_batch_size", 1)),
    ],
)
def test_sigterm_keeps_the_finished_batches_of_a_tool(project, warm, tool, options):
    """Of a command that trains nothing: a second run ends with the bytes of an uninterrupted one."""
    samples = [{"query_id": i, "query": f"Say {'cat ' * (i % 5)}", "sample_0": "cat"} for i in range(200)]
    (project / "samples.json").write_text(json.dumps(samples))
    script = CHECKOUT / f"alignment/apo/run_{tool}.py"
    command = (script, "--input_file", "samples.json", "--max_prompt_len", 24, *options)
    output, whole = project / f"{tool}.jsonl", project / f"{tool}_whole.jsonl"
    partial = output.with_name(f"{output.name}.partial.jsonl")
    job = warm.start(project, *command, "--output_file", output.name)
    while not partial.exists() or partial.read_text().count("\n") < 3:
        time.sleep(0.01)
    job.signal(signal.SIGTERM)
    assert job.wait() == [75], job.shown
    assert "stopped: SIGTERM; finished batches are kept, to go on run the same command again" in job.shown
    assert not output.exists() and not errors_in(job.shown)
    again = warm.run(project, *command, "--output_file", output.name)
    assert again.wait() == [0] and "finished results" in again.shown, again.shown
    assert warm.run(project, *command, "--output_file", whole.name).wait() == [0]
    assert output.read_bytes() == whole.read_bytes()


def test_sigterm_before_the_first_step(project, warm):
    job = warm.start(project, SCRIPTS["sft"], "sft.json", "--output_dir", "early", *LONG)
    while "SupervisedDataset" not in job.shown:
        time.sleep(0.005)
    job.signal(signal.SIGTERM)
    assert job.wait() == [75] and "stopped: SIGTERM" in job.shown


@pytest.mark.layouts
def test_the_launcher_gives_its_workers_time_to_save(project):
    """Its own status is 15, whatever they say; their logs tell."""
    command = [
        *(sys.executable, "-u", "-m", "paddle.distributed.launch", "--nproc_per_node", "2", "--log_dir", "log-term"),
        *(str(SCRIPTS["sft"]), "sft.json", "--output_dir", "launched", *map(str, LONG)),
    ]
    launcher = subprocess.Popen(command, cwd=project, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for_step(project / "launched", 1)
    launcher.send_signal(signal.SIGTERM)
    shown, _ = launcher.communicate()
    assert launcher.returncode == signal.SIGTERM, shown
    assert len(list((project / "launched").glob("checkpoint-*/SHA256SUMS"))) == 1
    for rank in range(2):
        assert "stopped: SIGTERM in step" in (project / "log-term" / f"workerlog.{rank}").read_text()


def test_a_second_run_beside_a_live_one_is_refused(project, warm, train):
    """However it would begin; a killed run is in nobody's way."""
    job = warm.start(project, SCRIPTS["sft"], "sft.json", "--output_dir", "shared", *LONG)
    wait_for_step(project / "shared", 1)
    partial = project / "shared" / ".checkpoint-7.partial"  # as if it were writing one
    partial.mkdir()
    for asked in (AUTO, ("--overwrite_output_dir", "true"), ()):
        status, shown = train("shared", *LONG, *asked)
        message = 'error: "output_dir": another process is at work in shared; wait for its end'
        assert status == [2] and errors_in(shown) == [message], shown
    assert partial.exists() and job.is_running()
    job.signal(signal.SIGKILL)
    job.wait()
    assert train("shared", "--max_steps", 2, *LONG[2:], *AUTO)[0] == [0]
    assert not partial.exists()


def test_a_damaged_checkpoint_is_named_or_passed_over(project, train, whole):
    assert train("damaged", *STEPS)[0] == [0]
    flip(project / "damaged" / "checkpoint-4" / "optimizer.safetensors")
    status, shown = train("damaged", *STEPS, "--resume_from_checkpoint", "true")
    assert status == [2] and "damaged/checkpoint-4/optimizer.safetensors is altered" in errors_in(shown)[0]
    status, shown = train("damaged", *STEPS, *AUTO)
    assert status == [0] and "notice: damaged/checkpoint-4/optimizer.safetensors is altered" in shown
    assert "going on from damaged/checkpoint-2" in shown
    assert (project / "damaged" / "checkpoint-4.damaged").is_dir()
    (project / "damaged" / "checkpoint-4.damaged").rename(project / "aside")
    assert_same(whole, project / "damaged")


def test_a_finished_run_says_so_and_stays_as_it_is(train, whole):
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in whole.rglob("*") if path.is_file()}
    for asked in (AUTO, ("--resume_from_checkpoint",)):
        status, shown = train("whole", *STEPS, *asked)
        assert status == [0] and "the run in whole is finished, its last checkpoint is checkpoint-4" in shown
    after = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in whole.rglob("*") if path.is_file()}
    assert after == before


def test_the_best_checkpoint_is_kept_and_stands_for_the_run(project, train):
    """The loss rises from the second evaluation on, for the learning rate is far too large; resumed after a stop."""
    words = ("--max_steps", 12, "--save_strategy", "no", "--save_total_limit", 1, "--learning_rate", 0.3)
    words += ("--evaluation_strategy", "steps", "--eval_steps", 1, "--load_best_model_at_end", "true")
    words += ("--early_stopping_patience", 3, "--lr_scheduler_type", "constant", "--warmup_steps", 0)
    assert train("best", *words)[0] == [0]
    rows = [row for row in read_rows(project / "best" / "metrics.jsonl") if "eval/loss" in row and row["step"] > 0]
    best = min(rows, key=lambda row: row["eval/loss"])["step"]
    assert rows[-1]["step"] == best + 3 < 12
    kept = {path.name for path in (project / "best").glob("checkpoint-*")}
    assert kept == {f"checkpoint-{best}", f"checkpoint-{best + 3}"}
    assert resolve_model_directory(project / "best").name == f"checkpoint-{best}"
    assert "is finished" in train("best", *words, *AUTO)[1]
    status, shown = train("unknown", *words, "--metric_for_best_model", "los")
    assert status == [2] and '"eval/los" is not among' in errors_in(shown)[0] and "eval/loss" in errors_in(shown)[0]
    subprocess.run(["cp", "-r", "best", "half"], cwd=project, check=True)
    (project / "half" / f"checkpoint-{best + 3}").rename(project / "half" / f".checkpoint-{best + 3}.partial")
    assert train("half", *words, *AUTO)[0] == [0]
    assert_same(project / "best", project / "half")


def test_the_best_policy_and_its_critic_are_kept_together(project, warm):
    """By the held-out reward; resumed after a kill in the last save, the end is the same."""
    words = ("--max_steps", 12, "--save_strategy", "no", "--save_total_limit", 1, "--learning_rate", 0.1)
    words += (*EVALUATED, "--load_best_model_at_end", "true", "--early_stopping_patience", 2)

    def train(output, *more):
        job = warm.run(project, SCRIPTS["ppo"], "ppo.json", "--output_dir", output, *words, *more)
        assert job.wait() == [0], job.shown
        return job.shown

    train("ppo-best")
    rows = [row for row in read_rows(project / "ppo-best" / "metrics.jsonl") if "eval/reward_mean" in row]
    best = max(rows[1:], key=lambda row: row["eval/reward_mean"])["step"]
    last = rows[-1]["step"]
    assert last == best + 2 < 12
    for part in ("policy", "value"):
        assert names_of(project / "ppo-best" / part) == sorted([f"checkpoint-{best}", f"checkpoint-{last}"])
        directory = resolve_model_directory(project / "ppo-best" / part)
        state = read_state(directory)
        assert directory.name == f"checkpoint-{best}" and find_damage(directory) is None
        assert state["step"] == best
    state = read_state(project / "ppo-best" / "policy" / f"checkpoint-{last}")
    assert (state["metric_for_best_model"], state["best_step"]) == ("eval/reward_mean", best)
    kept, newest = (
        weights_of(project / f"ppo-best/policy/checkpoint-{step}")["model.norm.weight"] for step in (best, last)
    )
    loaded = load_policy(project / "ppo-best" / "policy").state_dict()["llama.norm.weight"].numpy()
    np.testing.assert_array_equal(loaded, kept)
    assert not np.array_equal(kept, newest)
    subprocess.run(["cp", "-r", "ppo-best", "ppo-half"], cwd=project, check=True)
    half = project / "ppo-half" / "policy"  # the critic's is in its place already
    (half / f"checkpoint-{last}").rename(half / f".checkpoint-{last}.partial")
    assert f"going on from ppo-half/policy/checkpoint-{best}" in train("ppo-half", *AUTO)
    assert_same(project / "ppo-best", project / "ppo-half")
    assert "is finished" in train("ppo-best", *AUTO)


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("sft", ()),
        ("rm", ()),
        ("ppo", ("--judge_model_name_or_path", "reward")),
        ("offline", ("--policy_loss", "apa", "--judge_model_name_or_path", "reward")),
        ("offline", ("--policy_loss", "bc")),
        ("offline", ("--policy_loss", "ilql")),
        ("update", ("--policy_update", "rjs")),
        ("update", ("--policy_update", "rrhf")),
        ("update", ("--policy_update", "dpo")),
    ],
)
def test_an_unknown_metric_costs_no_earlier_run(project, warm, stage, words):
    """It is refused with the names that the evaluation of such a run has."""
    output = project / "-".join(["unknown", stage, *words[1:2]])
    command = (SCRIPTS[stage], f"{stage}.json", "--output_dir", output.name, "--max_steps", 1, *EVALUATED, *words)
    assert warm.run(project, *command).wait() == [0]
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    job = warm.run(project, *command, "--overwrite_output_dir", "true", "--metric_for_best_model", "los")
    (error,) = errors_in(job.shown)
    message = 'error: "metric_for_best_model": "eval/los" is not among the metrics of an evaluation: '
    assert job.wait() == [2] and error.startswith(message)
    written = {name for row in read_rows(output / "metrics.jsonl") for name in row if name.startswith("eval/")}
    assert set(error.removeprefix(message).split(", ")) == {name for name in written if name.count("/") == 1}
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


@pytest.fixture
def small_disk(project):
    folder = project / "disk"
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=560k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk(project, train, small_disk, whole):
    status, shown = train("disk/run", *STEPS)
    reason = "this checkpoint could not be written: No space left on device; checkpoint-2 before it is intact"
    assert status == [1] and errors_in(shown) == [f"error: disk/run/checkpoint-4: {reason}"], shown
    assert sorted(path.name for path in (small_disk / "run").glob("*checkpoint*")) == ["checkpoint-2"]
    status, shown = train("disk/run", *STEPS, *AUTO, "--save_error", "skip")
    assert status == [1] and "notice: " in shown and "the run's last checkpoint could not be written" in shown
    subprocess.run(["cp", "-r", str(small_disk / "run"), str(project / "moved")], check=True)
    assert train("moved", *STEPS, *AUTO)[0] == [0]
    assert_same(whole, project / "moved")


def test_a_full_disk_under_the_metrics(train, small_disk):
    with (small_disk / "filler").open("wb") as file:
        file.write(bytes(small_disk.stat().st_blksize * 132))
    status, shown = train("disk/run", *LONG)
    assert status == [1]
    assert errors_in(shown) == ["error: disk/run/metrics.jsonl: cannot be written: No space left on device"]
