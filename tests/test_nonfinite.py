"""Numbers that are not finite in real runs: a reward function that gives NaN once, weights with an infinite row, an
absurd learning rate. One line names step, phase, rank and samples; or the step is left out, alike in every layout."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.stages import read_rows, run, weights_of, write_project, write_tiny_model

DP2, PP2 = (2, "--per_device_train_batch_size", "2"), (2, "--pipeline_parallel_degree", "2")
BAD = 5  # the one text with a "~", and the longest: of two shares the second gets it
NAN_ONCE = """
import os

calls = 0


def nan_once(responses):
    global calls
    calls += 1
    bad = calls == 2 and os.environ.get("PADDLE_TRAINER_ID", "0") == os.environ.get("BAD_RANK", "0")
    return [float("nan") if bad and not place else len(text) / 4 for place, text in enumerate(responses)]
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = write_project(tmp_path_factory.mktemp("project"))
    model = write_tiny_model(folder / "infinite", tied=False)
    vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][vocabulary["~"]] = np.inf
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    write_model_of_one_bad_gradient(folder / "steep", vocabulary["~"])
    texts = [{"prompt": f"Say {'cat' * place}", "answer": "cat"} for place in range(8)]
    texts[BAD] = {"prompt": "Say please ~ please please", "answer": "cat"}
    (folder / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    (folder / "nan_once.py").write_text(NAN_ONCE)
    return folder


def write_model_of_one_bad_gradient(folder, token):
    """A model in which every loss is finite, but not the gradient of a text with ``token``.

    Its lower layer multiplies 0 and 1e30, which one token alone brings up to there, and so the 0 has a gradient of
    1e30 times 1e15.
    """
    file = write_tiny_model(folder, tied=False) / "model.safetensors"
    weights = load_file(file)
    weights["model.embed_tokens.weight"][:, 0] = 0
    weights["model.embed_tokens.weight"][token, 0] = 1
    lower = "model.layers.0."
    weights[lower + "self_attn.o_proj.weight"][0] = 0
    for name, value in {"gate": 0, "up": [1e30, *[0] * (weights[lower + "mlp.up_proj.weight"].shape[1] - 1)]}.items():
        weights[f"{lower}mlp.{name}_proj.weight"][0] = value
    weights[lower + "mlp.down_proj.weight"][:, 0] = 1e15
    save_file(weights, file, {"format": "pt"})


def learn_texts(project, out, *more, processes=0):
    """SFT of the upper layer on texts of which one is bad, in two steps an epoch, for two epochs."""
    return run(
        project, "sft", "--model_name_or_path", "infinite", "--num_layers_unfrozen", 1, "--max_length", 60,
        "--train_datasets", "local:1:texts.jsonl", "--eval_datasets", "null", "--per_device_train_batch_size", 4,
        "--max_steps", 4, "--output_dir", out, *more, processes=processes,
    )  # fmt: skip


def error_of(shown):
    return next(line for line in shown.splitlines() if line.startswith("error: "))


def test_a_bad_sample_stops_the_run(project):
    status, shown = learn_texts(project, "stop")
    assert status == 1
    line = error_of(shown)
    assert "training: the loss of the model is not finite (nan): rank 0, sample 5; look at" in line
    assert '"learning_rate" (0.01)' in line and '"nonfinite": "skip"' in line
    assert not list((project / "stop").glob("*checkpoint*"))


@pytest.mark.layouts
@pytest.mark.parametrize("layout", [DP2, PP2, (2, "--sharding", "stage2", *DP2[1:])], ids=["dp2", "pp2", "stage2"])
def test_every_layout_names_the_rank(project, layout):
    processes, *options = layout
    status, shown = learn_texts(project, f"stop_{options[0][2:]}", *options, processes=processes)
    assert status == 1
    ranks = "rank 0, sample 5; rank 1, sample 5" if options[0] == PP2[1] else "rank 1, sample 5"
    assert f"training: the loss of the model is not finite (nan): {ranks}; look at" in error_of(shown)


@pytest.mark.layouts
@pytest.mark.parametrize("sharding", ["stage1", "stage2", "stage3"])
def test_a_bad_gradient_of_a_finite_loss_is_its_rank_s(project, sharding):
    options = ("--model_name_or_path", "steep", "--num_layers_unfrozen", 2, "--sharding", sharding, *DP2[1:])
    status, shown = learn_texts(project, f"gradient_{sharding}", *options, processes=2)
    assert status == 1
    found = re.search(r"the gradient of the model is not finite .*: rank 1, samples (\d), (\d); ", shown)
    assert found and BAD in map(int, found.groups()), shown


@pytest.mark.layouts
def test_skipped_steps_are_alike_in_every_layout(project):
    skip = ("--nonfinite", "skip", "--save_strategy", "steps", "--save_steps", 1)
    for out, (processes, *options) in {"skip": (0,), "skip_dp2": DP2, "skip_pp2": PP2}.items():
        status, shown = learn_texts(project, out, *skip, *options, processes=processes)
        assert status == 0, shown
        assert shown.count("skipped: step ") == 2
        rows = read_rows(project / out / "metrics.jsonl")
        assert sum(row["skipped_steps"] for row in rows) == 2
        for row, other in zip(rows, read_rows(project / "skip" / "metrics.jsonl"), strict=True):
            assert (row["skipped_steps"], row["lr"]) == (other["skipped_steps"], other["lr"])
            assert (row["loss"] is None) == (row["grad_norm"] is None) == bool(row["skipped_steps"])
            before = weights_of(project / out / f"checkpoint-{row['step'] - 1}") if row["step"] > 1 else None
            for name, value in weights_of(project / out / f"checkpoint-{row['step']}").items():
                if before is not None and row["skipped_steps"]:
                    assert value.tobytes() == before[name].tobytes()
                expected = weights_of(project / "skip" / f"checkpoint-{row['step']}")[name]
                np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5, err_msg=name)


def test_too_many_in_a_row_end_the_run(project):
    status, shown = learn_texts(
        project, "limit", "--nonfinite", "skip", "--nonfinite_limit", 2, "--per_device_train_batch_size", 8
    )
    assert status == 1
    assert shown.count("skipped: step 1, ") == 1
    assert "step 2, " in error_of(shown) and '"nonfinite_limit": 2 steps in a row' in error_of(shown)


def test_weights_that_are_not_finite_are_never_saved(project):
    options = ("--learning_rate", 1e39, "--warmup_steps", 0, "--save_strategy", "steps", "--save_steps", 1)
    status, shown = run(project, "sft", "--output_dir", "absurd", *options)
    assert status == 1
    assert "step 1, saving: rank 0: " in error_of(shown)
    assert "is not finite, so no checkpoint was written" in error_of(shown)
    assert '"learning_rate" (now 1e+39)' in error_of(shown)
    assert not list((project / "absurd").glob("*checkpoint*"))


def learn_rewards(project, out, *more, processes=0, **environment):
    """PPO for three iterations; the second has an answer without a finite reward."""
    return run(
        project, "ppo", "--reward_function", "nan_once.py:nan_once", "--eval_datasets", "null",
        "--evaluation_strategy", "no", "--save_strategy", "steps", "--save_steps", 1, "--output_dir", out, *more,
        processes=processes, **environment,
    )  # fmt: skip



def test_a_bad_reward_stops_the_run(project):
    status, shown = learn_rewards(project, "reward_stop")
    assert status == 1
    line = error_of(shown)
    assert "step 2, score: the reward (rewards/nan_once) is not finite (nan): rank 0, sample " in line
    assert [path.name for path in (project / "reward_stop/policy").glob("checkpoint-*")] == ["checkpoint-1"]


def assert_left_out(folder):
    """The second of three iterations changed nothing but the schedule."""
    rows = read_rows(folder / "metrics.jsonl")
    assert [row["skipped_steps"] for row in rows] == [0, 8, 0]  # 2 passes over 2 minibatches, actor and critic
    assert rows[1]["rollout/reward_mean"] is None and rows[1]["rollout/length_mean"] > 0
    assert rows[0]["lr"] > rows[1]["lr"] > rows[2]["lr"]
    for part in ("policy", "value"):
        first, second, third = (weights_of(folder / part / f"checkpoint-{step}") for step in (1, 2, 3))
        assert all(value.tobytes() == second[name].tobytes() for name, value in first.items())
        assert any(value.tobytes() != third[name].tobytes() for name, value in second.items())
    states = [json.loads((folder / f"policy/checkpoint-{step}/trainer_state.json").read_text()) for step in (1, 2)]
    assert states[0]["score_scaler"] == states[1]["score_scaler"]
    assert states[0]["kl_controller"] == states[1]["kl_controller"]


def test_a_bad_reward_leaves_the_iteration_out(project):
    status, shown = learn_rewards(project, "reward_skip", "--nonfinite", "skip")
    assert status == 0, shown
    assert shown.count("skipped: step 2, score: the reward (rewards/nan_once) is not finite (nan): rank 0") == 1
    assert_left_out(project / "reward_skip")


@pytest.mark.layouts
def test_a_bad_reward_on_one_rank_leaves_the_iteration_out_on_all(project):
    status, shown = learn_rewards(
        project, "reward_dp2", "--nonfinite", "skip", "--per_device_prompt_batch_size", 2,
        "--per_device_train_batch_size", 2, processes=2, BAD_RANK="1",
    )  # fmt: skip
    assert status == 0, shown
    assert shown.count("skipped: step 2, score: the reward (rewards/nan_once) is not finite (nan): rank 1") == 1
    assert_left_out(project / "reward_dp2")
