"""PPO's models with LoRA: which weights are in memory once, that the frozen ones stay so, and what is told."""

from __future__ import annotations

import json
import os

import numpy as np
import paddle
import pytest

from alignment.ppo.arguments import GROUPS
from alignment.ppo.bases import Bases
from alignment.ppo.build import build_trainer
from alignment.ppo.models.lora import LoRASettings, adapter_parameters
from alignment.ppo.models.policy import trunk
from alignment.ppo.models.value import load_value
from alignment.runtime.arguments import parse
from tests.stages import (
    ARGUMENTS,
    write_adapted_reward_model,
    write_project,
    write_reward_model,
    write_tiny_model,
)

IDS = paddle.to_tensor([[5, 7, 11, 3, 2, 40]])
SETTINGS = LoRASettings(rank=2, alpha=4)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = write_project(tmp_path_factory.mktemp("project"))
    write_adapted_reward_model(folder / "adapted", folder / "model")
    write_reward_model(folder / "whole")
    other = write_tiny_model(folder / "other", scale=0.3)
    write_adapted_reward_model(folder / "adapted_other", other)
    return folder


def load(project, reward=None, critic=None):
    """Actor, reference, critic, reward model (or None) and the line about them."""
    bases = Bases(SETTINGS, 3, "float32")
    reference = bases.load_reference(str(project / "model"))
    actor = bases.load_actor(False)
    reward_model = reward and bases.load_reward(str(project / reward))
    value = bases.load_critic(str(project / (critic or reward or "model")), False)
    bases.mark_shared()
    return actor, reference, value, reward_model, bases.describe().replace(f"{project}{os.sep}", "")


def size(models) -> int:
    """Scalars in memory: each storage counts once."""
    return sum({p.data_ptr(): int(p.size) for model in models if model for p in model.parameters()}.values())


def shared(one, other) -> bool:
    own = adapter_parameters(one).keys() | {"score_head.weight"}
    theirs = {p.data_ptr() for p in other.parameters()}
    return {p.data_ptr() in theirs for name, p in one.named_parameters() if name not in own} == {True}


@pytest.mark.parametrize(
    ("reward", "critic", "sets", "line"),
    [
        (None, None, 1, "1 (reference, actor and critic share model)"),
        ("adapted", None, 1, "1 (reference, actor, reward and critic share model)"),
        ("whole", None, 2, "2 (reference and actor share model; reward and critic share whole)"),
        ("whole", "model", 2, "2 (reference, actor and critic share model; reward alone has whole)"),
        ("adapted_other", None, 2, "2 (reference and actor share model; reward and critic share adapted_other)"),
        ("adapted", "whole", 2, "2 (reference, actor and reward share model; critic alone has whole)"),
    ],
)
def test_equal_weights_are_in_memory_once(project, reward, critic, sets, line):
    actor, reference, value, reward_model, told = load(project, reward, critic)
    assert told == f"base weights in memory: {line}"
    models = [actor, reference, value, reward_model]
    # adapters and heads
    extra = sum(int(p.size) for model in models if model for p in adapter_parameters(model).values())
    assert size(models) == sets * size([reference]) + extra
    assert shared(actor, reference)
    for model in models:
        if model:
            names = {p.name for p in model.parameters()}
            elsewhere = {p.name for other in models if other and other is not model for p in other.parameters()}
            assert model.shared_parameters == names & elsewhere


@pytest.mark.parametrize(
    ("judge", "line"),
    [("adapted", "1 (reference, actor, critic and judge share model)"), ("whole", "judge alone has whole)")],
)
def test_a_judge_shares_too(project, judge, line):
    bases = Bases(SETTINGS, 3, "float32")
    reference = bases.load_reference(str(project / "model"))
    bases.load_actor(False)
    bases.load_critic(str(project / "model"), False)
    model = bases.load_reward(str(project / judge), role="judge")
    assert bases.describe().replace(f"{project}{os.sep}", "").endswith(line)
    assert model.score_type == "reward" and all(parameter.stop_gradient for parameter in model.parameters())
    assert shared(model, reference) == (judge == "adapted")


def test_the_same_files_in_another_directory_are_the_same_base(project, tmp_path):
    moved = write_tiny_model(tmp_path / "moved")  # the bytes of project / "model"
    bases = Bases(SETTINGS, 3, "float32")
    bases.load_reference(str(moved))
    bases.load_actor(False)
    reward = bases.load_reward(str(project / "adapted"))
    assert trunk(reward).layers[0].mlp.up_proj.weight is bases.loaded[0].first.llama.layers[0].mlp.up_proj.weight


def test_a_shared_reward_model_scores_as_its_merged_checkpoint(project):
    _, _, critic, reward, _ = load(project, "adapted")
    mask = paddle.ones(IDS.shape, dtype="bool")
    merged = load_value(project / "adapted", "reward")
    for model in (merged, critic, reward):
        model.eval()
    with paddle.no_grad():
        expected = merged(IDS, mask).numpy()
        for model in (reward, critic):  # a critic starts as the reward model
            np.testing.assert_allclose(model(IDS, mask).numpy(), expected, rtol=1e-5, atol=1e-5)
    assert all(parameter.stop_gradient for parameter in reward.parameters())
    ours, theirs = adapter_parameters(critic), adapter_parameters(reward)
    assert ours.keys() == theirs.keys() and len(ours) == 29
    for name, parameter in ours.items():
        assert parameter.data_ptr() != theirs[name].data_ptr() and not parameter.stop_gradient


def test_training_moves_the_actor_and_the_critic_alone(project, monkeypatch):
    monkeypatch.chdir(project)
    arguments = ARGUMENTS["ppo"] | {"lora": True, "lora_rank": 2, "reward_model_name_or_path": "adapted"}
    (project / "lora.json").write_text(json.dumps(arguments))
    trainer = build_trainer(*parse(["lora.json"], GROUPS))
    models = trainer.models
    reward = models.rewards.sources["model"].model
    frozen = {p.name: p.numpy() for model in (models.reference.model, reward) for p in model.parameters()}
    trained = {p.name: p.numpy() for m in (models.actor, models.critic) for p in adapter_parameters(m).values()}
    for iteration in (1, 2):
        trainer.iterate(iteration)
    for model in (models.reference.model, reward, models.actor, models.critic):
        for parameter in model.parameters():
            if parameter.name in frozen:
                np.testing.assert_array_equal(parameter.numpy(), frozen[parameter.name])
            else:
                assert (parameter.numpy() != trained[parameter.name]).any()
    assert size([models.actor, models.reference.model, models.critic, reward]) == sum(
        array.size for array in (frozen | trained).values()
    )
