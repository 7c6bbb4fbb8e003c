"""Learning steps: which objective, one optimizer step for policy and texts, early stop, entropy bonus, self-checks."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from alignment.ppo import losses
from alignment.ppo.collect import pack_experience, response_values
from alignment.ppo.experience import Targets
from alignment.ppo.learner import Learner, policy_loss
from alignment.ppo.models.loading import load_policy
from alignment.ppo.models.policy import hidden_states, response_log_probs
from alignment.ppo.models.value import add_value_head, load_value
from alignment.ppo.self_check import check_reference
from alignment.runtime.faults import RunError
from alignment.training.engine import OptimizerSettings, TrainingEngine
from tests.models.heads import with_random_head
from tests.models.reference import make_config, random_weights, write_checkpoint
from tests.ppo.experiences import make_experience
from tests.sft.test_loss import ITEMS, collate, supervised_loss

SETTINGS = {
    "policy_loss": "ppo",
    "clip_range_ratio": 0.2,
    "clip_range_value": 5.0,
    "apa_anchor": "initial",
    "apa_lambda": 0.1,
    "value_loss_coeff": 1.0,
    "awr_beta": 1.0,
    "awr_weight_clip": None,
    "entropy_coeff": 0.0,
    "ptx_coeff": 0.0,
    "update_iters": 2,
    "target_kl": None,
    "temperature": 1.0,
    "seed": 5,
    "data_seed": 5,
    "per_device_prompt_batch_size": 6,
    "num_return_sequences": 1,
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 1,
}
OPTIMIZER = OptimizerSettings(1e-2, 0.0, 0.9, 0.999, 1e-8, 0.0, "constant", 0.0, 0)


class Texts(list):
    """What the learner needs of a data.SupervisedDataset."""

    def get_collator(self):
        return collate


@pytest.fixture
def setting(tmp_path):
    """(build(**changes) -> learner, experience whose log_probs and values are the models' own, targets)."""
    config = make_config("llama", True)
    directory = write_checkpoint(tmp_path / "model", config, random_weights(config))
    actor, critic = load_policy(directory), with_random_head(load_value(directory, "critic"))
    experience = make_experience(0, [3, 5, 4, 2, 6, 3], [4, 2, 5, 1, 3, 4])
    packed, mask = pack_experience(experience)
    with paddle.no_grad():
        hidden, states = (hidden_states(model, packed.input_ids, packed.attention_mask) for model in (actor, critic))
        log_probs, entropy = response_log_probs(actor, hidden, packed, mask)
        values = response_values(critic, states, packed, mask)
    experience = replace(experience, log_probs=log_probs.numpy(), entropy=entropy.numpy(), values=values.numpy())
    random = np.random.default_rng(3)
    advantages, returns = (random.normal(0, 1, mask.shape).astype(np.float32) for _ in range(2))

    def build(texts=None, **changes):
        args = SimpleNamespace(**SETTINGS | changes)
        engines = (TrainingEngine(model, OPTIMIZER, 99, "model") for model in (actor, critic))
        return Learner(args, *engines, texts)

    return build, experience, Targets(advantages, returns)


def test_metrics_of_the_first_step(setting):
    build, experience, targets = setting
    metrics = build(update_iters=1, per_device_train_batch_size=6).update(experience, targets, 1, 1e-4)
    mask = experience.response_mask
    assert metrics["rollout/probs_diff_max"] < 1e-5
    assert metrics["val/ratio"] == pytest.approx(1, abs=1e-6)
    assert metrics["policy/approxkl_avg"] == pytest.approx(0, abs=1e-9)
    assert metrics["loss/policy_avg"] == pytest.approx(-targets.advantages[mask].mean(), rel=1e-4)
    expected = 0.5 * ((experience.values - targets.returns)[mask] ** 2).mean()
    assert metrics["loss/value_avg"] == pytest.approx(expected, rel=1e-4)
    assert metrics["policy/entropy_avg"] == pytest.approx(experience.entropy[mask].mean(), rel=1e-4)
    assert metrics["policy/optimizer_steps"] == 1


def test_every_answer_once_a_pass_in_an_order_of_the_seed(setting):
    learner = setting[0]()
    passes = list(learner._minibatches(6, 1))
    assert [len(rows) for rows in passes] == [3, 3, 3, 3]
    for start in (0, 2):
        assert sorted(np.concatenate(passes[start : start + 2])) == list(range(6))
    again, other = list(learner._minibatches(6, 1)), list(learner._minibatches(6, 2))
    assert all((one == two).all() for one, two in zip(passes, again, strict=True))
    assert any((one != two).any() for one, two in zip(passes, other, strict=True))


def test_target_kl_stops_before_the_step_that_is_too_far(setting):
    build, experience, targets = setting
    free = build(update_iters=4).update(experience, targets, 1)
    assert free["policy/optimizer_steps"] == 8
    learner = build(update_iters=4, target_kl=1e-4)
    metrics = learner.update(experience, targets, 1)
    assert metrics["policy/optimizer_steps"] < 8
    assert all(p.grad is None or not p.grad.numpy().any() for p in learner.actor.model.parameters())


def test_log_probs_that_differ_stop_the_run_before_a_step(setting):
    build, experience, targets = setting
    wrong = replace(experience, log_probs=experience.log_probs + np.float32(0.01))
    learner = build()
    before = [p.numpy().copy() for p in learner.actor.model.parameters()]
    with pytest.raises(RunError, match="self-check.*0.01.*self_check_tolerance"):
        learner.update(wrong, targets, 1, tolerance=1e-3)
    assert all((p.numpy() == b).all() for p, b in zip(learner.actor.model.parameters(), before, strict=True))


@pytest.mark.parametrize("shift", [0.01, np.nan])
def test_reference_check(setting, shift):
    experience = setting[1]
    same = replace(experience, ref_log_probs=experience.log_probs.copy())
    check_reference(same, 1e-6)
    other = same.ref_log_probs.copy()
    other[0, 0] += shift
    with pytest.raises(RunError, match="reference"):
        check_reference(replace(same, ref_log_probs=other), 1e-3)
    other = same.ref_log_probs.copy()
    other[~experience.response_mask] += 5  # padding does not count
    check_reference(replace(same, ref_log_probs=other), 1e-6)


def test_texts_join_the_same_optimizer_step(setting):
    build, experience, targets = setting
    texts = Texts(ITEMS)
    learner = build(texts, ptx_coeff=2.0, update_iters=1, per_device_train_batch_size=6)
    model = learner.actor.model
    loss, (expected, _) = supervised_loss(model, collate(ITEMS), 4)
    zero = Targets(np.zeros_like(targets.advantages), targets.returns)
    # without advantages the policy's gradient is zero, so the step's gradient is that of the texts alone
    (2.0 * loss).backward()
    norm = float(sum((p.grad**2).sum() for p in model.parameters() if p.grad is not None)) ** 0.5
    model.clear_gradients()
    metrics = learner.update(experience, zero, 1)
    assert metrics["loss/ptx_avg"] == pytest.approx(expected, rel=1e-5)
    assert metrics["actor/grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert metrics["policy/optimizer_steps"] == 1


def test_bad_texts_are_named(setting):
    build, experience, targets = setting
    learner = build(Texts(ITEMS), ptx_coeff=math.inf, update_iters=1, per_device_train_batch_size=6)
    with pytest.raises(RunError, match=r"not finite .*: rank 0, samples? \d of ptx_datasets"):
        learner.update(experience, targets, 1)


def test_the_entropy_bonus_raises_entropy(setting):
    build, experience, targets = setting
    learner = build(entropy_coeff=1.0, update_iters=1, per_device_train_batch_size=6)
    zero = Targets(np.zeros_like(targets.advantages), targets.returns)
    entropies = [learner.update(experience, zero, 1)["policy/entropy_avg"] for _ in range(3)]
    assert entropies[0] < entropies[1] < entropies[2]
    assert build(update_iters=1).update(experience, zero, 1)["actor/grad_norm"] == pytest.approx(0, abs=1e-6)


def test_policy_loss_takes_the_one_that_is_named():
    random = np.random.default_rng(0)
    new, old, anchor, advantages = (paddle.to_tensor(random.normal(-1, 1, [2, 3]).astype("float32")) for _ in range(4))
    mask = paddle.to_tensor([[True, True, False], [True, True, True]])
    expected = {
        "ppo": losses.ppo_loss(new, old, advantages, mask, 0.3, 5.0),
        "apa": losses.apa_loss(new, old, anchor, advantages, mask, 0.7, 5.0),
        "awr": losses.awr_loss(new, old, advantages, mask, 2.0, 1.5, 5.0),
    }
    changes = {"clip_range_ratio": 0.3, "apa_lambda": 0.7, "awr_beta": 2.0, "awr_weight_clip": 1.5}
    for name, (loss, _) in expected.items():
        args = SimpleNamespace(**SETTINGS | changes | {"policy_loss": name})
        assert float(policy_loss(args, new, old, anchor, advantages, mask, 5.0)[0]) == float(loss)
    assert len({float(loss) for loss, _ in expected.values()}) == 3


def test_apas_anchor_is_the_initial_or_the_old_policy():
    random = np.random.default_rng(1)
    arrays = random.normal(-1, 1, [4, 2, 3]).astype("float32")
    new, old, initial, advantages = (paddle.to_tensor(array) for array in arrays)
    mask = paddle.ones([2, 3], dtype="bool")
    for name, anchor in (("initial", initial), ("old", old)):
        args = SimpleNamespace(**SETTINGS | {"policy_loss": "apa", "apa_anchor": name})
        loss, _ = policy_loss(args, new, old, initial, advantages, mask, 6.0)
        expected = ((new - anchor - advantages / 0.1) ** 2).sum() / 6
        assert float(loss) == pytest.approx(float(expected), rel=1e-6)


def test_a_critic_on_the_policy_adds_its_weighted_gradient(setting, tmp_path):
    """One joint pass gives the trunk the policy's gradient plus value_loss_coeff times the value loss's."""
    _, experience, targets = setting
    config = make_config("llama", True)
    directory = write_checkpoint(tmp_path / "again", config, random_weights(config))
    args = SimpleNamespace(**SETTINGS | {"value_loss_coeff": 0.25})
    policy = load_policy(directory)
    with_random_head(add_value_head(policy))
    learner = Learner(args, TrainingEngine(policy, OPTIMIZER, 99, "actor"), None)
    rows = np.arange(6)
    sums, _ = learner._accumulate(learner.actor, learner._policy_micro_batch, experience, targets, rows)
    found = {name: p.grad.numpy() for name, p in policy.named_parameters()}

    alone = load_policy(directory)
    critic = with_random_head(add_value_head(alone))
    packed, mask = pack_experience(experience)
    old, advantages, values, returns = (
        paddle.to_tensor(x) for x in (experience.log_probs, targets.advantages, experience.values, targets.returns)
    )
    hidden = hidden_states(alone, packed.input_ids, packed.attention_mask)
    new, _ = response_log_probs(alone, hidden, packed, mask)
    policy_term, _ = losses.ppo_loss(new, old, advantages, mask)
    value_term, _ = losses.value_loss(response_values(critic, hidden, packed, mask), values, returns, mask)
    (policy_term + 0.25 * value_term).backward()
    assert sums["policy"] == pytest.approx(float(policy_term), rel=1e-5)
    assert sums["value"] == pytest.approx(float(value_term), rel=1e-5)
    assert found.keys() == {name for name, _ in alone.named_parameters()}
    for name, parameter in alone.named_parameters():
        scale = abs(parameter.grad.numpy()).max()
        np.testing.assert_allclose(found[name], parameter.grad.numpy(), atol=2e-5 * scale, err_msg=name)


def test_metrics_without_an_engine_for_the_critic(setting, tmp_path):
    _, experience, targets = setting
    config = make_config("llama", True)
    policy = load_policy(write_checkpoint(tmp_path / "again", config, random_weights(config)))
    with_random_head(add_value_head(policy))
    learner = Learner(SimpleNamespace(**SETTINGS), TrainingEngine(policy, OPTIMIZER, 99, "actor"), None)
    before = policy.score_head.weight.numpy()
    metrics = learner.update(experience, targets, 1)
    assert metrics.keys().isdisjoint({"critic/grad_norm", "critic/lr"}) and metrics["loss/value_avg"] > 0
    assert (policy.score_head.weight.numpy() != before).any()


@pytest.mark.parametrize("weight_clip", [None, 20.0])
def test_awr_weights_that_overflow_are_reported(setting, weight_clip):
    build, experience, targets = setting
    advantages = np.where(targets.advantages > 0, targets.advantages, -1.0)
    advantages[0, 0] = 1000.0  # exp(1000 / 0.1) is no float
    learner = build(
        policy_loss="awr", awr_beta=0.1, awr_weight_clip=weight_clip, update_iters=1, per_device_train_batch_size=6
    )
    metrics = learner.update(experience, Targets(advantages.astype(np.float32), targets.returns), 1)
    assert all(np.isfinite(value) for value in metrics.values())
    ceiling = 30.0 if weight_clip is None else np.log(weight_clip)
    exponents = advantages[experience.response_mask] / 0.1
    weights = np.exp(np.minimum(exponents, ceiling))
    assert metrics["policy/clipfrac_avg"] == pytest.approx((exponents > ceiling).mean())
    assert metrics["policy/effective_tokens"] == pytest.approx(weights.sum() ** 2 / (weights**2).sum(), rel=1e-4)
