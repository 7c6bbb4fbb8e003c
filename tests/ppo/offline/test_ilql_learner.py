"""ILQL's optimizer steps: the loss of a batch against NumPy, scaled rewards, when targets move, what is trained."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from alignment.ppo.models.freezing import set_trainable_layers
from alignment.ppo.models.loading import load_policy
from alignment.ppo.models.lora import Base, LoRASettings, add_adapters
from alignment.ppo.offline.ilql_learner import IlqlLearner
from alignment.ppo.offline.ilql_model import add_heads
from alignment.ppo.offline.logged import LoggedAnswers
from alignment.ppo.offline.measure import LoggedCollector
from alignment.runtime.timing import PhaseTimer
from alignment.training.batches import BatchSchedule
from alignment.training.engine import OptimizerSettings, TrainingEngine
from tests.models.reference import logits
from tests.models.tiny import log_softmax
from tests.ppo.experiences import make_experience
from tests.ppo.offline.ilql_models import fill, q_values, write_policy

PROMPTS, ANSWERS = [3, 5, 2, 4, 3], [4, 1, 3, 2, 5]
SETTINGS = {
    "ilql_tau": 0.7,
    "gamma": 0.9,
    "ilql_cql_scale": 0.2,
    "ilql_awac_scale": 0.5,
    "ilql_awac_beta": 0.8,
    "ilql_alpha": 0.3,
    "steps_for_target_q_sync": 1,
    "ilql_decoding_beta": [1.0, 0.0, 2.5],
    "normalize_reward": True,
    "clip_range_score": 1.0,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 3,
}
OPTIMIZER = OptimizerSettings(1e-2, 0.0, 0.9, 0.999, 1e-8, 0.0, "constant", 0.0, 0)


@pytest.fixture
def setting(tmp_path):
    """(directory, configuration, weights, build(policy, **changes) -> learner)."""
    config, weights = write_policy(tmp_path)
    experience = make_experience(2, PROMPTS, ANSWERS)
    origin = [(i, "answer") for i in range(len(PROMPTS))]

    def build(policy, **changes):
        logged = [LoggedAnswers(None, origin, experience.scores.copy(), replace(experience)) for _ in range(2)]
        actor = TrainingEngine(policy, OPTIMIZER, 99, "actor")
        collector = LoggedCollector(None, actor.pipeline, None, None, None, None, 3, PhaseTimer())
        schedule = BatchSchedule(len(PROMPTS), len(PROMPTS), 0)
        learner = IlqlLearner(SimpleNamespace(**SETTINGS | changes), actor, collector, schedule, *logged)
        learner.prepare()
        return learner

    return tmp_path, config, weights, build


def policy_with_heads(directory):
    policy = load_policy(directory)
    add_heads(policy, 0)
    fill(policy.ilql_heads, 7, 0.3)
    return policy


def numpy_terms(policy, weights, config, experience, rewards) -> dict[str, float]:
    """Means over all actions of the four terms, float64."""
    sums = dict.fromkeys(("td", "expectile", "cql", "awac"), 0.0)
    for i, (prompt, count) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        ids = experience.input_ids[i][experience.attention_mask[i]]
        both, targets, v = q_values(policy, weights, config, ids)
        at, tokens = np.arange(prompt - 1, prompt + count - 1), ids[prompt:]
        v, target = v[at], np.minimum(*targets)[at, tokens]
        y = SETTINGS["gamma"] * np.append(v[1:], 0)
        y[-1] += rewards[i]
        difference = target - v
        weight = np.exp(SETTINGS["ilql_awac_beta"] * difference)
        sums["td"] += sum(((q[at, tokens] - y) ** 2).sum() for q in both)
        sums["expectile"] += (np.where(difference < 0, 0.3, 0.7) * difference**2).sum()
        sums["cql"] -= sum(log_softmax(q)[at, tokens].sum() for q in both)
        sums["awac"] -= (weight * log_softmax(logits(weights, config, ids))[at, tokens]).sum()
    return {name: value / sum(ANSWERS) for name, value in sums.items()}


def test_first_step_and_evaluation_equal_numpy(setting):
    directory, config, weights, build = setting
    policy = policy_with_heads(directory)
    learner = build(policy)
    scores = learner.train.experience.scores.astype(np.float64)
    rewards = ((scores - scores.mean()) / scores.std(ddof=1)).clip(-1, 1)
    terms = numpy_terms(policy, weights, config, learner.train.experience, rewards)
    loss = terms["td"] + terms["expectile"] + 0.2 * terms["cql"] + 0.5 * terms["awac"]
    held_out, metrics = learner.evaluate(0), learner.step(1)
    assert held_out["eval/loss"] == pytest.approx(loss, rel=1e-4)
    assert metrics["loss/ilql_avg"] == pytest.approx(loss, rel=1e-4)
    for name, value in terms.items():
        assert held_out[f"eval/{name}_loss"] == pytest.approx(value, rel=1e-4)
        assert metrics[f"loss/{name}_avg"] == pytest.approx(value, rel=1e-4)
    assert 0 < metrics["policy/effective_tokens"] < sum(ANSWERS)
    assert learner.evaluate(1)["eval/loss"] < loss


def test_targets_move_every_so_many_steps(setting):
    learner = setting[3](policy_with_heads(setting[0]), steps_for_target_q_sync=2)
    heads = learner.actor.model.ilql_heads
    before = [p.numpy().copy() for p in heads.target_q.parameters()]
    learner.step(1)
    for parameter, value in zip(heads.target_q.parameters(), before, strict=True):
        np.testing.assert_array_equal(parameter.numpy(), value)
    learner.step(2)
    for target, source, value in zip(heads.target_q.parameters(), heads.q.parameters(), before, strict=True):
        np.testing.assert_allclose(target.numpy(), 0.3 * source.numpy() + 0.7 * value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("part", ["upper layer", "adapters"])
def test_heads_learn_beside_a_part_of_the_policy(setting, part):
    policy = load_policy(setting[0])
    if part == "upper layer":
        set_trainable_layers(policy, 1)
    else:
        add_adapters(policy, LoRASettings(rank=2, alpha=2), Base(setting[0], ""), seed=0)
    add_heads(policy, 0)
    learner = setting[3](policy)
    before = {name: p.numpy().copy() for name, p in policy.named_parameters()}
    for step in (1, 2):
        learner.step(step)
    changed = {name for name, p in policy.named_parameters() if (p.numpy() != before[name]).any()}
    mark = "layers.2." if part == "upper layer" else "lora_"
    own = {name for name in changed if not name.startswith("ilql_heads.") and not name.endswith("llama.norm.weight")}
    assert own and all(mark in name for name in own)
    assert {name.split(".")[1] for name in changed - own if "heads" in name} == {"v", "q", "target_q"}


def test_decodings_are_named_by_beta(setting):
    assert list(setting[3](policy_with_heads(setting[0])).decodings) == ["", "beta_0", "beta_2.5"]
