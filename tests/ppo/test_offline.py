"""Learning from logged answers: targets against NumPy, critics against known values, objectives, any micro-batches."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from alignment.ppo.load import Models
from alignment.ppo.models.freezing import freeze
from alignment.ppo.models.loading import load_policy
from alignment.ppo.models.policy import passes_of
from alignment.ppo.models.value import load_value
from alignment.ppo.offline.build import build_learner
from alignment.ppo.offline.estimate import Estimator
from alignment.ppo.offline.logged import LoggedDataset, read_answers
from alignment.ppo.offload import Offload
from alignment.ppo.rewards import FunctionReward, WeightedRewards
from alignment.runtime.faults import RunError
from alignment.runtime.timing import PhaseTimer
from data import RawSample
from tests.models.heads import with_random_head
from tests.models.tiny import tiny_policy, tiny_tokenizer
from tests.ppo.experiences import make_experience
from tests.ppo.test_logged import Fixed
from tests.processes import play

SETTINGS = {
    "nonfinite": "stop",
    "nonfinite_limit": 1,
    "policy_loss": "apa",
    "apa_lambda": 0.5,
    "apa_anchor": "initial",
    "awr_beta": 1.0,
    "awr_weight_clip": None,
    "gamma": 0.9,
    "gae_lambda": 0.8,
    "normalize_advantage": True,
    "normalize_reward": True,
    "clip_range_score": 50.0,
    "clip_range_value": float("inf"),
    "critic_training": "joint",
    "critic_epochs": 1.0,
    "critic_refresh": 2,
    "temperature": 1.0,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "per_device_eval_batch_size": 3,
    "data_seed": 1,
    "dataloader_drop_last": False,
    "max_steps": 4,
    "num_train_epochs": 1,
    "learning_rate": 1e-2,
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-6,
    "max_grad_norm": 0.0,
    "lr_scheduler_type": "constant",
    "warmup_ratio": 0.0,
    "warmup_steps": 0,
}
SAMPLES = [
    RawSample(input="w5 w6", answer="w8 w9", reward=2.0, other_answer="w8 w10 w11", other_reward=-1.0),
    RawSample(input="w7", answer="w12", reward=0.5),
    RawSample(input="w7 w7 w5", answer="w13 w9 w9 w8", reward=-3.0, other_answer="w14", other_reward=1.5),
]
REWARD = """
def judge(responses):
    return [float("nan") if "w40" in text else 10.0 + len(text.split()) for text in responses]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("offline")
    tiny_policy(path / "policy")
    tiny_tokenizer(path / "tokenizer")
    (path / "offline_rewards.py").write_text(REWARD)
    return path


@pytest.fixture
def build(folder, tmp_path):
    """(samples, **changes) -> a learner over them, also held out, and the tokenizer."""

    def make(samples=SAMPLES, **changes):
        args, tokenizer = SimpleNamespace(**SETTINGS | changes), tiny_tokenizer(folder / "tokenizer")
        dataset = LoggedDataset(
            [(Fixed(samples), 1)], tokenizer, max_length=20, max_prompt_len=12, template="plain"
        )
        actor, reference = (load_policy(folder / "policy") for _ in range(2))
        freeze(reference)
        critic = None if args.policy_loss == "bc" else with_random_head(load_value(folder / "policy", "critic"), 3)
        rewards = WeightedRewards([FunctionReward(f"{folder / 'offline_rewards.py'}:judge")])
        models = Models(actor, passes_of(reference), critic, rewards, tokenizer)
        train, held_out = read_answers(dataset), read_answers(dataset)
        return build_learner(args, models, Offload([], tmp_path, PhaseTimer()), train, held_out, answers=False)

    return make


def weights(model):
    return {name: value.numpy().copy() for name, value in model.state_dict().items()}


# ---- targets --------------------------------------------------------------------------------------------------------


def numpy_targets(experience, args, scores):
    """Returns and advantages (not whitened) of each answer by the definitions, in float64."""
    found = []
    for row, length in enumerate(experience.lengths):
        values = [*experience.values[row, :length].astype(np.float64), 0.0]
        rewards = [0.0] * (length - 1) + [scores[row]]
        returns = [sum(args.gamma ** (k - t) * rewards[k] for k in range(t, length)) for t in range(length)]
        deltas = [rewards[t] + args.gamma * values[t + 1] - values[t] for t in range(length)]
        decay = args.gamma * args.gae_lambda
        advantages = [sum(decay ** (k - t) * deltas[k] for k in range(t, length)) for t in range(length)]
        found.append((np.array(returns), np.array(advantages)))
    return found


@pytest.mark.parametrize("normalize", [True, False])
def test_targets_are_those_of_the_definitions(normalize):
    args = SimpleNamespace(**SETTINGS | {"normalize_reward": normalize, "normalize_advantage": normalize})
    train, other = make_experience(0, [3, 1, 2, 4], [5, 1, 3, 2], np.nan), make_experience(1, [2, 2], [4, 3], np.nan)
    estimator = Estimator(args)
    estimator.fit_scores(train.scores)
    scale = (train.scores.mean(dtype=np.float64), train.scores.std(ddof=1, dtype=np.float64))
    standard = {id(x): (x.scores - scale[0]) / scale[1] if normalize else x.scores for x in (train, other)}
    expected = {id(x): numpy_targets(x, args, standard[id(x)]) for x in (train, other)}
    pooled = np.concatenate([advantages for _, advantages in expected[id(train)]])
    moments = (pooled.mean(), pooled.std(ddof=1)) if normalize else (0.0, 1.0)
    for experience, (targets, metrics) in ((train, estimator.fit(train)), (other, estimator.targets(other))):
        errors, all_returns = [], []
        for row, (returns, advantages) in enumerate(expected[id(experience)]):
            length = len(returns)
            np.testing.assert_allclose(targets.returns[row, :length], returns, rtol=1e-5, atol=1e-6)
            whitened = (advantages - moments[0]) / moments[1]
            np.testing.assert_allclose(targets.advantages[row, :length], whitened, rtol=1e-4, atol=1e-5)
            assert (targets.advantages[row, length:] == 0).all() and (targets.returns[row, length:] == 0).all()
            errors += list(experience.values[row, :length] - returns)
            all_returns += list(returns)
        assert metrics["value_loss"] == pytest.approx(0.5 * np.mean(np.square(errors)), rel=1e-5)
        assert metrics["vf_explained_var"] == pytest.approx(1 - np.var(errors) / np.var(all_returns), rel=1e-4)


def test_equal_scores_stay_as_they_are():
    estimator = Estimator(SimpleNamespace(**SETTINGS))
    experience = make_experience(0, [2, 3], [2, 2])
    experience.scores[:] = 4.0
    estimator.fit_scores(experience.scores)
    assert estimator.fit(experience)[0].returns.max() == pytest.approx(4.0)


# ---- measuring ------------------------------------------------------------------------------------------------------


def test_the_data_s_scores_count_and_the_reward_sources_give_the_rest(build):
    samples = [SAMPLES[0], RawSample(input="w7", answer="w12 w9 w9", other_answer="w5")]
    learner = build(samples)
    learner.prepare()
    assert learner.train.experience.scores.tolist() == [2.0, -1.0, 13.0, 11.0]


def test_an_answer_without_a_finite_reward_is_named(build):
    learner = build([SAMPLES[1], RawSample(input="w7", answer="w12 w9 w9", other_answer="w40")])
    with pytest.raises(RunError, match=r"reward \(rewards/judge\) is not finite \(nan\): rank 0, sample 1; look at"):
        learner.prepare()


@pytest.mark.parametrize("count", [2, 7])
def test_any_number_of_processes_measures_the_same(build, count):
    samples = [RawSample(input=s["input"], answer=s["answer"]) for s in SAMPLES]
    learner = build(samples)
    learner.prepare()
    expected = learner.train.experience

    def work():
        other = build(samples)
        other.prepare()
        return other.train.experience

    for found in play(count, work):
        np.testing.assert_array_equal(found.scores, expected.scores)
        for name in ("ref_log_probs", "values"):
            np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-6)


# ---- the critic -----------------------------------------------------------------------------------------------------


def test_a_critic_that_learns_first_finds_the_known_values(build):
    """Two answers that part after their first token: until then the value is their mean, afterwards each's own."""
    samples = [RawSample(input="w5", answer="w8 w9", reward=1.0, other_answer="w8 w10", other_reward=0.0)]
    changes = {"critic_training": "first", "critic_epochs": 150, "per_device_train_batch_size": 2, "max_steps": 1}
    learner = build(samples, normalize_reward=False, gamma=0.5, gae_lambda=1.0, normalize_advantage=False, **changes)
    learner.prepare()
    before = weights(learner.actor.model)
    for number in range(1, 151):
        metrics = learner.step(number)
    assert {"loss/value_avg", "critic/lr"} < metrics.keys() and not {"loss/policy_avg", "lr"} & metrics.keys()
    assert all((value == before[name]).all() for name, value in weights(learner.actor.model).items())
    known = [[0.125, 0.25, 1.0], [0.125, 0.25, 0.0]]  # discounted by a half each token
    final = learner.step(151)
    np.testing.assert_allclose(learner.train.experience.values, known, atol=0.02)
    np.testing.assert_allclose(
        learner.targets.advantages, [[0.125, 0.25, 0.0], [-0.125, -0.25, 0.0]], atol=0.03
    )
    assert final["critic/vf_explained_var"] > 0.8 and "loss/value_avg" not in final
    assert any((value != before[name]).any() for name, value in weights(learner.actor.model).items())


def test_when_advantages_are_computed_anew(build):
    """joint: every critic_refresh steps; none: never, and the critic stays."""
    for training, expected in (("joint", [True, False, True, False, True]), ("none", [True] + [False] * 4)):
        learner = build(critic_training=training)
        learner.prepare()
        critic, seen, changed = weights(learner.collector.critic.model), np.zeros(1), []
        for number in range(1, 6):
            metrics = learner.step(number)
            changed.append(not np.array_equal(seen, learner.train.experience.values))
            seen = learner.train.experience.values.copy()
            assert ("loss/value_avg" in metrics) == (training == "joint")
        assert changed == expected
        same = all((v == critic[k]).all() for k, v in weights(learner.collector.critic.model).items())
        assert same == (training == "none") and ("value" in learner.engines) == (training == "joint")


# ---- the policy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["apa", "awr", "bc"])
def test_the_first_loss_is_that_of_the_formula(build, objective):
    learner = build(policy_loss=objective, critic_training="none", per_device_train_batch_size=8)
    learner.prepare()
    mask = learner.train.experience.response_mask
    log_probs, advantages = learner.train.experience.ref_log_probs[mask], learner.targets.advantages[mask]
    expected = {
        "apa": ((advantages / 0.5) ** 2).mean(),  # at its start the policy is the anchor
        "awr": (-np.exp(advantages) * log_probs).mean(),
        "bc": -log_probs.mean(),
    }[objective]
    held_out = learner.evaluate(0)
    metrics = learner.step(1)
    assert metrics["loss/policy_avg"] == pytest.approx(expected, rel=1e-4)
    assert held_out["eval/loss"] == pytest.approx(expected, rel=1e-4)  # the same answers
    assert metrics["policy/approxkl_avg"] == pytest.approx(0, abs=1e-9)
    assert metrics["logged/answers"] == 5
    assert (objective == "bc") == ("logged/score_mean" not in metrics) == ("eval/value_loss" not in held_out)


def test_apa_moves_the_policy_by_the_advantage(build):
    """Its fixed point: log pi = log pi_init + advantage / lambda, where that is a distribution nearly."""
    samples = [RawSample(input="w5", answer="w8", reward=1.0, other_answer="w9", other_reward=-1.0)]
    learner = build(samples, critic_training="none", max_steps=200, apa_lambda=4.0, per_device_train_batch_size=2)
    learner.prepare()
    losses = [learner.step(number)["loss/policy_avg"] for number in range(1, 201)]
    assert losses[-1] < 0.02 * losses[0]


def test_micro_batches_do_not_matter(build):
    runs = []
    for size, accumulation in ((4, 1), (2, 2), (1, 4)):
        learner = build(per_device_train_batch_size=size, gradient_accumulation_steps=accumulation)
        learner.prepare()
        metrics = [learner.step(number) for number in range(1, 5)]
        runs.append((metrics, learner.evaluate(4), weights(learner.actor.model), weights(learner.critic.model)))
    for metrics, held_out, *models in runs[1:]:
        for one, other in zip([*runs[0][0], runs[0][1]], [*metrics, held_out], strict=True):
            assert other == pytest.approx(one, rel=1e-4, abs=1e-5)
        for one, other in zip(runs[0][2:], models, strict=True):
            for name, value in one.items():
                np.testing.assert_allclose(other[name], value, rtol=1e-3, atol=1e-5, err_msg=name)
