"""Collected experience against NumPy forward passes of each answer alone, on any number of processes."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest

from alignment.ppo.collect import Collector
from alignment.ppo.experience import Experience
from alignment.ppo.models.loading import load_policy
from alignment.ppo.models.policy import passes_of, trunk
from alignment.ppo.models.value import load_value
from alignment.ppo.reshard import Sampler
from alignment.ppo.rewards import FunctionReward, RewardSource, WeightedRewards
from alignment.ppo.rewards.base import check_rewards
from alignment.ppo.rollout.protocol import SamplingParameters
from alignment.runtime.faults import RunError
from alignment.runtime.timing import PhaseTimer
from tests.models.heads import with_random_head
from tests.models.reference import hidden_states
from tests.models.tiny import tiny_policy, tiny_tokenizer
from tests.processes import play
from tests.training.language_model import make_engine

SAMPLING = SamplingParameters(max_new_tokens=6, eos_token_ids=(2, 11, 30, 40), pad_token_id=3)
LENGTHS = (4, 1, 7, 2)
REWARD = """
def judge(prompts, responses, samples, finished):
    return [
        100 * sample["number"] + 10 * done + len(response.split()) + 0.5 * (prompt == sample["input"])
        for prompt, response, sample, done in zip(prompts, responses, samples, finished)
    ]
def one(responses): return [1.0] * len(responses)
"""


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def models(request, tmp_path_factory):
    """Policy, reference, and the trunk of the critic, of different weights."""
    return [tiny_policy(tmp_path_factory.mktemp(name), request.param, seed=i) for i, name in enumerate("prc")]


@pytest.fixture(scope="module")
def critic(models):
    return with_random_head(load_value(models[2].directory, score_type="critic"), 4)


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    file = tmp_path_factory.mktemp("reward") / "collect_rewards.py"
    file.write_text(REWARD)
    return WeightedRewards([FunctionReward(f"{file}:judge"), FunctionReward(f"{file}:one")], [2.0, -3.0])


@pytest.fixture(scope="module")
def make_collector(models, critic, rewards, tmp_path_factory):
    """() -> a collector of the process that calls it."""
    actor, tokenizer = make_engine(models[0].model), tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))

    def make():
        passes = (actor.pipeline, passes_of(models[1].model), passes_of(critic))
        return Collector(Sampler(actor, None, 8), *passes, rewards, tokenizer, 3, PhaseTimer())

    return make


@pytest.fixture(scope="module")
def collector(make_collector):
    return make_collector()


@pytest.fixture(scope="module")
def whole(collector):
    return collector.collect(make_prompts(), 2, 1, 0, SAMPLING)


def make_prompts(lengths=LENGTHS):
    random = np.random.default_rng(5)
    return [
        {
            "input_ids": random.integers(4, 48, length),
            "prompt_id": 20 - i,
            "prompt": f"question {i}",
            "sample": {"input": f"question {i}", "number": i},
        }
        for i, length in enumerate(lengths)
    ]


def words(ids) -> str:
    """What the tokenizer says: without begin, end and padding."""
    return " ".join(f"w{i}" if i > 3 else "<unk>" for i in ids if i not in (1, 2, 3))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_every_number_is_that_of_the_answer_alone(collector, models, critic, temperature):
    policy, reference, critic_trunk = models
    prompts = make_prompts()
    collected = collector.collect(prompts, 2, seed=1, iteration=0, sampling=replace(SAMPLING, temperature=temperature))
    experience, head = collected.experience, critic.score_head.weight.numpy()
    assert len(experience) == 8 and experience.row.tolist() == list(range(8))
    assert 0 < experience.finished.sum() < 8 and len(set(experience.lengths)) > 1
    for i in range(8):
        prompt, mask = prompts[i // 2], experience.response_mask[i]
        answer = experience.response_ids[i][mask]
        text = [*prompt["input_ids"], *answer]
        before_actions = slice(len(prompt["input_ids"]) - 1, -1)
        assert experience.prompt_id[i] == prompt["prompt_id"]
        assert experience.input_ids[i][experience.attention_mask[i]].tolist() == text

        x = policy.log_softmax(text, temperature)[before_actions]
        expected = {
            "log_probs": np.take_along_axis(x, answer[:, None], 1)[:, 0],
            "entropy": -(np.exp(x) * x).sum(-1),
            "ref_log_probs": np.take_along_axis(
                reference.log_softmax(text, temperature)[before_actions], answer[:, None], 1
            )[:, 0],
            "values": (hidden_states(critic_trunk.weights, critic_trunk.config, text) @ head)[before_actions, 0],
        }
        for name, value in expected.items():
            array = getattr(experience, name)[i]
            np.testing.assert_allclose(array[mask], value, atol=2e-4, err_msg=name)
            assert array.dtype == np.float32 and (array[~mask] == 0).all(), name

        done = answer[-1] in SAMPLING.eos_token_ids
        assert experience.finished[i] == done
        spoken = words(answer)
        assert collected.answers[i] == spoken
        score = 100 * (i // 2) + 10 * done + len(spoken.split()) + 0.5
        assert experience.scores[i] == 2 * score - 3
        assert collected.components["rewards/judge"][i] == score and collected.components["rewards/one"][i] == 1.0


def test_samples_of_a_prompt_and_iterations_differ(collector):
    sampling = replace(SAMPLING, eos_token_ids=())
    collect = [collector.collect(make_prompts(), 2, 1, iteration, sampling).experience for iteration in (0, 1, 0)]
    ids = [experience.response_ids for experience in collect]
    np.testing.assert_array_equal(ids[0], ids[2])
    assert len({row.tobytes() for array in ids[:2] for row in array}) == 16


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.0])
def test_kl_to_a_reference_of_the_same_weights_is_zero(collector, models, temperature):
    twin = replace(collector, reference=passes_of(load_policy(models[0].directory)))
    sampling = replace(SAMPLING, temperature=temperature)
    experience = twin.collect(make_prompts(), 3, 1, 0, sampling).experience
    np.testing.assert_allclose(experience.ref_log_probs, experience.log_probs, atol=2e-5)
    other = collector.collect(make_prompts(), 3, 1, 0, sampling).experience
    assert abs(other.ref_log_probs - other.log_probs).max() > 0.5


def assert_close(first: Experience, second: Experience) -> None:
    for field in fields(Experience):
        x, y = getattr(first, field.name), getattr(second, field.name)
        if x.dtype == np.float32:
            np.testing.assert_allclose(x, y, atol=2e-5, err_msg=field.name)
        else:
            np.testing.assert_array_equal(x, y, err_msg=field.name)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_batch_size_changes_nothing(collector, whole, batch_size):
    other = replace(collector, batch_size=batch_size).collect(make_prompts(), 2, 1, 0, SAMPLING)
    assert_close(other.experience, whole.experience)


class InexactEngine:
    """An engine whose log-probabilities are off, as those of 16-bit kernels are."""

    def __init__(self, engine):
        self.engine = engine

    def generate(self, *args):
        rollout = self.engine.generate(*args)
        return replace(rollout, log_probs=rollout.log_probs - np.float32(0.25) * rollout.response_mask)


def test_log_probs_are_the_engines_or_the_actors(make_collector, whole):
    exact, inexact = whole.experience, make_collector()
    inexact.sampler.engine = InexactEngine(inexact.sampler.engine)
    trusted = inexact.collect(make_prompts(), 2, 1, 0, SAMPLING).experience
    assert_close(trusted, replace(exact, log_probs=exact.log_probs - np.float32(0.25) * exact.response_mask))
    assert_close(inexact.collect(make_prompts(), 2, 1, 0, SAMPLING, trust_engine=False).experience, exact)


def test_evaluation_is_the_first_sample_without_values(collector, whole):
    evaluated = collector.evaluate(make_prompts(), 1, 0, SAMPLING)
    first = whole.experience.take(np.arange(0, 8, 2))
    expected = replace(first, row=np.arange(4), values=np.zeros_like(first.values))
    assert_close(evaluated.experience, expected)
    assert evaluated.answers == whole.answers[::2]


@pytest.mark.parametrize("count", [1, 3])
def test_a_judge_scores_what_is_evaluated_and_nothing_else(make_collector, rewards, count):
    """In the answers' order, whichever process scored them; rewards and what is learnt from stay as they are."""
    judge = WeightedRewards([rewards.sources["judge"]])

    def evaluate(judge):
        return replace(make_collector(), judge=judge).evaluate(make_prompts(), 1, 0, SAMPLING)

    plain = evaluate(None)
    assert plain.judged is None
    for judged in play(count, lambda: evaluate(judge)):
        assert_close(judged.experience, plain.experience)
        np.testing.assert_array_equal(judged.judged, plain.components["rewards/judge"])
    collected = replace(make_collector(), judge=judge).collect(make_prompts(), 1, 1, 0, SAMPLING)
    assert collected.judged is None


@pytest.mark.parametrize(("count", "lengths", "samples"), [(2, LENGTHS, 2), (8, LENGTHS, 2), (2, LENGTHS[:1], 1)])
def test_the_number_of_processes_changes_nothing(make_collector, count, lengths, samples):
    """Even where one has nothing to do, or one answer, shorter than another's; padded ids are the same too."""

    def collect():
        return make_collector().collect(make_prompts(lengths), samples, 1, 0, SAMPLING)

    whole, parts = collect(), play(count, collect)
    assert len(parts) == count
    for collected in parts:  # everybody has everything
        assert_close(collected.experience, whole.experience)
        assert collected.answers == whole.answers and collected.components.keys() == whole.components.keys()
        for name, values in whole.components.items():
            np.testing.assert_array_equal(collected.components[name], values)


def test_processes_share_the_work(make_collector):
    """Each answers and judges its part, and all parts together are the whole."""
    recorded = []

    def collect():
        recorder = Recorder()
        collector = replace(make_collector(), rewards=WeightedRewards([recorder]))
        recorded.append((recorder, collector.sampler.part))
        return collector.collect(make_prompts(), 2, 1, 0, SAMPLING).experience

    experience = play(3, collect)[0]
    assert sorted(part for _, part in recorded) == [(0, 3), (1, 3), (2, 3)]
    judged = [list(map(tuple, recorder.batch.response_ids)) for recorder, _ in recorded]
    assert sorted(map(len, judged)) == [2, 3, 3]
    answers = [tuple(ids[mask]) for ids, mask in zip(experience.response_ids, experience.response_mask, strict=True)]
    assert sorted(answer for part in judged for answer in part) == sorted(answers)


class Recorder(RewardSource):
    name = "recorder"

    def __call__(self, batch):
        self.batch = batch
        return np.zeros(len(batch), np.float32)


class Broken(RewardSource):
    name = "broken"

    def __call__(self, batch):
        return check_rewards([math.nan if sample["number"] == 2 else 1.0 for sample in batch.samples], len(batch), "b")


def test_a_bad_reward_or_judgement_of_an_evaluation_is_named(collector):
    broken, where = WeightedRewards([Broken()]), r"is not finite \(nan\): rank 0, sample 18 \(held out\); look at"
    for change in ({"rewards": broken}, {"judge": broken}):
        with pytest.raises(RunError, match=rf"the reward \(rewards/broken\) {where}"):
            replace(collector, **change).evaluate(make_prompts(), 1, 0, SAMPLING)


def test_reward_sources_see_unpadded_tokens(collector):
    recorder, prompts = Recorder(), make_prompts()
    experience = replace(collector, rewards=WeightedRewards([recorder])).collect(prompts, 1, 1, 0, SAMPLING).experience
    seen = {
        prompt: (ids.tolist(), answer.tolist(), bool(done), sample)
        for prompt, ids, answer, done, sample in zip(
            recorder.batch.prompts,
            recorder.batch.prompt_ids,
            recorder.batch.response_ids,
            recorder.batch.finished,
            recorder.batch.samples,
            strict=True,
        )
    }
    for i, item in enumerate(prompts):
        answer = experience.response_ids[i][experience.response_mask[i]].tolist()
        expected = (item["input_ids"].tolist(), answer, bool(experience.finished[i]), item["sample"])
        assert seen[item["prompt"]] == expected


def test_sources_are_told_where_a_process_has_no_answers(make_collector):
    """Others are asked at that moment, and a model may need all its processes. Nobody is asked about nothing."""
    told = []

    class Source(RewardSource):
        name = "source"

        def __call__(self, batch):
            told.append(len(batch))
            return np.zeros(len(batch), np.float32)

        def sit_out(self):
            told.append("sit out")

    def collect():
        collector = replace(make_collector(), rewards=WeightedRewards([Source(), Source()]))
        return collector.collect(make_prompts(LENGTHS[:2]), 1, 1, 0, SAMPLING)

    play(3, collect)
    assert sorted(told, key=str) == [1] * 4 + ["sit out"] * 2


def test_dropout_is_off_in_every_pass(collector, models, critic):
    """Whatever state learning left the models in."""
    layers = [layer for model in (models[0].model, models[1].model, critic) for layer in trunk(model).layers]
    modes = []
    hooks = [layer.register_forward_pre_hook(lambda layer, _: modes.append(layer.training)) for layer in layers]
    for model in (models[0].model, models[1].model, critic):
        model.train()
    collector.collect(make_prompts(), 1, 1, 0, SAMPLING, trust_engine=False)
    for hook in hooks:
        hook.remove()
    assert len(modes) >= len(layers) and not any(modes)


def test_no_gradient_is_kept_and_phases_are_timed(collector, critic):
    collector.collect(make_prompts(), 1, 1, 0, SAMPLING)
    assert all(parameter.grad is None for parameter in critic.parameters())
    measured = {f"{what}/{phase}" for what in ("timing_s", "memory_gb") for phase in ("reshard", "rollout", "score")}
    assert collector.timer.pop().keys() == measured
