"""On a problem small enough to enumerate ILQL finds the known values, and decoding by them the best answers.

Three tokens from three; the score of each of the 27 answers is known. The logged answers cover all of them, each as
often as a behaviour policy gives it. What V and Q must become follows backwards from the last token:

    Q(s, a) = r + gamma V(s'),   V(s) = the tau-expectile of Q(s, a) over the behaviour's a

tau 0.5 is the mean, so Q is the behaviour's own; for tau -> 1 it is the maximum, and Q is Q*.
"""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from alignment.ppo.collect import pack_experience
from alignment.ppo.experience import Experience
from alignment.ppo.models.loading import load_policy
from alignment.ppo.models.policy import hidden_states
from alignment.ppo.offline.ilql_learner import IlqlLearner
from alignment.ppo.offline.ilql_losses import ActionValues, ilql_loss
from alignment.ppo.offline.ilql_model import action_values, add_heads, advantage_shift
from alignment.ppo.offline.logged import LoggedAnswers
from alignment.ppo.offline.measure import LoggedCollector
from alignment.ppo.rollout.eager import EagerRolloutEngine
from alignment.ppo.rollout.protocol import Draw, SamplingParameters
from alignment.runtime.timing import PhaseTimer
from alignment.training.batches import BatchSchedule
from alignment.training.engine import OptimizerSettings, TrainingEngine
from tests.ppo.offline.ilql_models import write_policy

SYMBOLS, LENGTH, GAMMA = 3, 3, 0.9
FIRST_TOKEN = 10  # of the three, in the model's vocabulary
PROMPT = [1, 7]
BEHAVIOUR = np.array([2, 1, 1])  # quarters: token 0 half of the time
SCORES = np.random.default_rng(4).normal(0, 1, [SYMBOLS] * LENGTH)
ANSWERS = np.array(list(product(range(SYMBOLS), repeat=LENGTH)))
ROWS = np.repeat(ANSWERS, BEHAVIOUR[ANSWERS].prod(-1), axis=0)  # 64


def expectile(q: np.ndarray, tau: float) -> float:
    """Of q [3] under the behaviour, by bisection."""
    low, high = q.min(), q.max()
    for _ in range(100):
        v = (low + high) / 2
        slope = (BEHAVIOUR * np.where(q > v, tau, 1 - tau) * (q - v)).sum()
        low, high = (v, high) if slope > 0 else (low, v)
    return (low + high) / 2


def known_values(tau: float) -> tuple[dict, dict]:
    """Q by text [3] and V by text before the action, float64; tau 1: Q* and V*."""
    q_values, values = {}, {}
    for steps in reversed(range(LENGTH)):
        for text in product(range(SYMBOLS), repeat=steps):
            after = [(*text, token) for token in range(SYMBOLS)]
            last = steps + 1 == LENGTH
            q_values[text] = np.array([SCORES[one] if last else GAMMA * values[one] for one in after])
            values[text] = q_values[text].max() if tau == 1 else expectile(q_values[text], tau)
    return q_values, values


def test_the_known_values_are_what_they_should_be():
    q, values = known_values(0.5)
    quarter = BEHAVIOUR / 4
    assert values[(1, 2)] == pytest.approx((quarter * SCORES[1, 2]).sum())
    discounted = GAMMA**2 * np.einsum("abc,a,b,c->", SCORES, quarter, quarter, quarter)
    assert values[()] == pytest.approx(discounted)
    assert known_values(1)[1][()] == pytest.approx(GAMMA**2 * SCORES.max())
    gaps = [known_values(1)[1][()] - known_values(tau)[1][()] for tau in (0.5, 0.9, 0.99, 0.9999)]
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 1e-2


def tables(steps: int, tau: float) -> dict[str, paddle.Tensor]:
    """V and both Q of every text, learnt by ``ilql_loss`` from all rows, the targets following by a tenth a step."""
    texts = {text: i for i, text in enumerate(t for n in range(LENGTH) for t in product(range(SYMBOLS), repeat=n))}
    states = paddle.to_tensor([[texts[tuple(row[:t])] for t in range(LENGTH)] for row in ROWS.tolist()])
    cells = states * SYMBOLS + paddle.to_tensor(ROWS)
    random = np.random.default_rng(0)
    q_1, q_2 = (paddle.to_tensor(random.normal(0, 1, len(texts) * SYMBOLS), stop_gradient=False) for _ in range(2))
    v = paddle.zeros([len(texts)], dtype="float64")
    v.stop_gradient = False
    targets = [q_1.detach().clone(), q_2.detach().clone()]
    rewards = np.zeros(ROWS.shape)
    rewards[:, -1] = SCORES[tuple(ROWS.T)]
    rewards, mask = paddle.to_tensor(rewards), paddle.ones(ROWS.shape, dtype="bool")
    schedule = paddle.optimizer.lr.CosineAnnealingDecay(0.05, steps)
    optimizer = paddle.optimizer.Adam(schedule, parameters=[q_1, q_2, v])
    none = paddle.zeros(ROWS.shape, dtype="float64")
    for _ in range(steps):
        target_q = paddle.minimum(*(target[cells] for target in targets))
        actions = ActionValues(none, q_1[cells], q_2[cells], none, none, target_q, v[states])
        ilql_loss(actions, rewards, mask, tau, GAMMA)[0].backward()
        optimizer.step()
        optimizer.clear_grad()
        schedule.step()
        targets = [0.9 * old + 0.1 * q.detach() for old, q in zip(targets, (q_1, q_2), strict=True)]
    return {"q_1": q_1.reshape([-1, SYMBOLS]), "q_2": q_2.reshape([-1, SYMBOLS]), "v": v, "texts": texts}


@pytest.mark.parametrize("tau", [0.5, 0.9, 0.99])
def test_tables_become_the_known_values(tau):
    """Within 0.005, where scores are from -2 to 2."""
    found, (q, values) = tables(1500, tau), known_values(tau)
    for text, i in found["texts"].items():
        for name in ("q_1", "q_2"):
            np.testing.assert_allclose(found[name][i].numpy(), q[text], atol=5e-3)
        assert found["v"][i].item() == pytest.approx(values[text], abs=5e-3)


def logged() -> Experience:
    count = len(ROWS)
    mask, nothing = np.ones(ROWS.shape, bool), np.zeros(ROWS.shape, np.float32)
    return Experience(
        row=np.arange(count),
        prompt_id=np.zeros(count, np.int64),
        prompt_ids=np.tile(PROMPT, (count, 1)),
        prompt_mask=np.ones([count, len(PROMPT)], bool),
        response_ids=ROWS + FIRST_TOKEN,
        response_mask=mask,
        finished=np.ones(count, bool),
        log_probs=nothing,
        entropy=nothing,
        ref_log_probs=nothing,
        values=nothing,
        scores=SCORES[tuple(ROWS.T)].astype(np.float32),
    )


def train_model(directory, tau: float, steps: int, cql_scale: float) -> paddle.nn.Layer:
    write_policy(directory, num_hidden_layers=1)
    policy = load_policy(directory)
    add_heads(policy, 0)
    settings = OptimizerSettings(6e-3, 0.0, 0.9, 0.999, 1e-8, 1.0, "cosine", 0.0, 20)
    args = SimpleNamespace(
        ilql_tau=tau, gamma=GAMMA, ilql_cql_scale=cql_scale, ilql_awac_scale=1.0, ilql_awac_beta=0.0, ilql_alpha=0.1,
        steps_for_target_q_sync=1, ilql_decoding_beta=[1.0], normalize_reward=False, clip_range_score=5.0,
        per_device_train_batch_size=64,
    )  # fmt: skip
    experience, actor = logged(), TrainingEngine(policy, settings, steps, "actor")
    answers = LoggedAnswers(None, [(0, "answer")] * len(ROWS), experience.scores.copy(), experience)
    collector = LoggedCollector(None, actor.pipeline, None, None, None, None, 64, PhaseTimer())
    learner = IlqlLearner(args, actor, collector, BatchSchedule(len(ROWS), len(ROWS), 0), answers, None)
    learner.prepare()
    for step in range(1, steps + 1):
        learner.step(step)
    return policy


@pytest.fixture(scope="module", params=[0.5, 0.95])
def learnt(request, tmp_path_factory):
    """(tau, a trained model); a little CQL keeps the tokens that nobody logged small."""
    return request.param, train_model(tmp_path_factory.mktemp("model"), request.param, 700, 0.003)


@pytest.mark.slow
def test_a_model_learns_the_known_values(learnt):
    """Within 0.02 at every action, where scores are from -2 to 2."""
    tau, policy = learnt
    packed, mask = pack_experience(logged())
    with paddle.no_grad():
        found = action_values(policy, hidden_states(policy, packed.input_ids, packed.attention_mask), packed, mask)
    q, values = known_values(tau)
    expected_v = np.array([[values[tuple(row[:t])] for t in range(LENGTH)] for row in ROWS.tolist()])
    expected_q = np.array([[q[tuple(row[:t])][row[t]] for t in range(LENGTH)] for row in ROWS.tolist()])
    for name, expected in (("q_1", expected_q), ("q_2", expected_q), ("target_q", expected_q), ("values", expected_v)):
        np.testing.assert_allclose(getattr(found, name).numpy(), expected, atol=0.02, err_msg=name)


@pytest.mark.slow
def test_a_larger_beta_finds_better_answers(learnt):
    """Beta 0 answers as the data do; the advantages of tau 0.95 lead to the best answer of all."""
    tau, policy = learnt
    means = [sampled_scores(policy, beta).mean() for beta in (0.0, 1.0, 4.0, 16.0)]
    assert means[0] == pytest.approx(SCORES[tuple(ROWS.T)].mean(), abs=0.3)  # 256 answers of deviation 0.9
    assert means == sorted(means)
    if tau == 0.95:
        assert means[-1] > SCORES.max() - 0.05


def sampled_scores(policy: paddle.nn.Layer, beta: float, count: int = 256) -> np.ndarray:
    engine = EagerRolloutEngine(policy, count)
    engine.adjust_logits = advantage_shift(policy, beta)
    sampling = SamplingParameters(LENGTH, eos_token_ids=(2,), pad_token_id=3, top_k=10)
    rollout = engine.generate([np.array(PROMPT)] * count, [Draw(0, 0, 0, i) for i in range(count)], sampling)
    tokens = rollout.response_ids - FIRST_TOKEN
    logged_before = ((tokens >= 0) & (tokens < SYMBOLS)).all(-1)
    return np.where(logged_before, SCORES[tuple(tokens.clip(0, SYMBOLS - 1).T)], SCORES.min())
