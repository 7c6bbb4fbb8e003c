"""``--dry_run`` by the real commands: passes where the run would, says what it planned, leaves nothing behind."""

from __future__ import annotations

import json

import pytest

from tests.stages import run, write_project, write_reward_model

TP, PP, S = "--tensor_parallel_degree", "--pipeline_parallel_degree", "--sharding"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = write_project(tmp_path_factory.mktemp("project"))
    write_reward_model(folder / "reward")
    return folder


def rehearse(project, stage: str, *options: str, processes: int = 0) -> tuple[int, str]:
    """Exit status and output; asserts that nothing was left, beside the launcher's own log."""
    temporary = project / "temporary"
    temporary.mkdir(exist_ok=True)
    kept = set(project.iterdir())
    status, shown = run(project, stage, "--dry_run", "true", *options, processes=processes, TMPDIR=str(temporary))
    assert not list(temporary.glob("alignment-*"))
    assert set(project.iterdir()) - {project / "log"} == kept
    return status, shown


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_passes(project, stage):
    status, shown = rehearse(project, stage)
    assert status == 0, shown
    assert f"{stage} on 1 processes" in shown and "fits: " in shown
    assert shown.rstrip().endswith("dry run: passed")


@pytest.mark.slow
def test_what_a_kill_left_in_output_dir_stays(project):
    left = project / "killed" / ".checkpoint-2.replaced"
    left.mkdir(parents=True)
    status, shown = rehearse(project, "sft", "--output_dir", "killed", "--resume_from_checkpoint", "auto")
    assert status == 0, shown
    assert list((project / "killed").iterdir()) == [left]


@pytest.mark.slow
def test_one_process_for_eight(project):
    layout = (TP, "2", PP, "2", S, "stage1", "--sharding_parallel_degree", "2", "--sequence_parallel", "true")
    options = ("--bf16", "true", "--lora", "true", "--reward_model_name_or_path", "reward", "--device", "cpu")
    status, shown = rehearse(project, "ppo", *layout, *options, "--offload_level", "freeze_model optimizer")
    assert status == 0, shown
    assert "ppo on 8 processes: tensor 2 x pipeline 2 x sharding 2 (stage 1)" in shown
    assert "one process was started, the run asks for 8: no parallelism here" in shown
    assert "bf16: this device is a CPU; the dry run computes in float32" in shown
    assert "lora: planned as training of all weights" in shown
    assert "dry run: passed" in shown


@pytest.mark.slow
def test_a_reward_server_that_is_down_fails_as_in_a_run(project):
    options = ("--reward_function", "null", "--reward_server", "http://127.0.0.1:9", "--reward_server_retries", "0")
    status, shown = rehearse(project, "ppo", *options)
    assert status == 1 and "127.0.0.1:9" in shown and "passed" not in shown


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "options", "words"),
    [
        ("ppo", ("--kl_coef", "1"), ("--kl_coef", "kl_coeff")),
        ("ppo", ("--reward_model_name_or_path", "model"), ('"reward_model_name_or_path": model: not a reward model',)),
        ("rm", ("--train_datasets", "animal"), ("unknown dataset 'animal'",)),
        ("rm", (TP, "4"), ('"model_name_or_path": "tensor_parallel_degree": 4 does not divide',)),
        ("sft", ("--num_layers_unfrozen", "9"), ('"num_layers_unfrozen": 9 is more than the model\'s 2 layers',)),
    ],
)
def test_bad_arguments_fail_as_in_a_run(project, stage, options, words):
    status, shown = rehearse(project, stage, *options)
    assert status == 2
    assert all(word in shown for word in words), shown
    assert "passed" not in shown and "Traceback" not in shown


@pytest.mark.slow
@pytest.mark.layouts
def test_under_the_launcher_in_the_launched_layout(project):
    file = project / "ppo.json"
    values = json.loads(file.read_text()) | {"per_device_prompt_batch_size": 8, "policy_loss": "apa"}
    file.write_text(json.dumps(values))
    layout = (TP, "2", PP, "2", "--eval_mode", "tensor_parallel", "--reward_model_name_or_path", "reward")
    status, shown = rehearse(project, "ppo", *layout, processes=4)
    assert status == 0, shown
    assert "data 1 x pipeline 2 x sharding 1 x tensor 2" in shown and "dry run: passed" in shown
