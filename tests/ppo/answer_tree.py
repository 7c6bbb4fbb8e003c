"""A problem small enough to enumerate: every answer over a few tokens, its score, exact values and advantages.

A state is the prefix of an answer; action 0 is EOS. S states, V tokens, N answers of up to T tokens. All float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import paddle

from alignment.ppo import losses
from tests.models.tiny import log_softmax


class AnswerTree(NamedTuple):
    """Prefixes in breadth-first order and the answers made of them; padding holds state 0, token 0."""

    child: np.ndarray  # int [S, V]: the state after an action, -1 where the answer ends
    states: np.ndarray  # int [N, T]
    tokens: np.ndarray  # int [N, T]
    mask: np.ndarray  # bool [N, T]
    scores: np.ndarray  # [N]

    def of_answers(self, table: np.ndarray) -> np.ndarray:
        """Entries of a table [S, V] at the actions of all answers: [N, T], 0 at padding."""
        return np.where(self.mask, table[self.states, self.tokens], 0.0)

    def probabilities(self, log_pi: np.ndarray) -> np.ndarray:
        """[N]: of every answer under a policy log_pi [S, V]."""
        return np.exp(self.of_answers(log_pi).sum(-1))

    def visits(self, log_pi: np.ndarray) -> np.ndarray:
        """[S]: how probable it is that an answer passes each state."""
        reached = np.zeros(len(self.child))
        np.add.at(reached, self.states, self.probabilities(log_pi)[:, None] * self.mask)
        return reached


def build_tree(vocab: int = 3, length: int = 3, seed: int = 0, spread: float = 1.0) -> AnswerTree:
    """All answers of up to ``length`` tokens, with normal scores of the given deviation."""
    prefixes, child, rows = [((), ())], [], []
    for prefix, path in prefixes:  # grows while it is read
        child.append([-1] * vocab)
        for token in range(vocab):
            words, way = (*prefix, token), (*path, len(child) - 1)
            if token == 0 or len(words) == length:
                rows.append((way, words))
            else:
                child[-1][token] = len(prefixes)
                prefixes.append((words, way))
    states, tokens, mask = (np.zeros((len(rows), length), int) for _ in range(3))
    for i, (way, words) in enumerate(rows):
        states[i, : len(way)], tokens[i, : len(words)], mask[i, : len(words)] = way, words, 1
    scores = np.random.default_rng(seed).normal(0, spread, len(rows))
    return AnswerTree(np.array(child), states, tokens, mask.astype(bool), scores)


def random_policy(tree: AnswerTree, seed: int = 1, spread: float = 0.5) -> np.ndarray:
    """log pi [S, V], every action possible."""
    return log_softmax(np.random.default_rng(seed).normal(0, spread, tree.child.shape))


def _backwards(tree: AnswerTree, value_of: Callable[[int, np.ndarray], float]) -> tuple[np.ndarray, np.ndarray]:
    """Q [S, V] and values [S] from the last states to the first; value_of(state, its row of Q)."""
    q, values = np.zeros(tree.child.shape), np.zeros(len(tree.child))
    last = tree.mask.sum(-1) - 1
    rows = np.arange(len(last))
    q[tree.states[rows, last], tree.tokens[rows, last]] = tree.scores
    for s in reversed(range(len(q))):
        inner = tree.child[s] >= 0
        q[s, inner] = values[tree.child[s, inner]]
        values[s] = value_of(s, q[s])
    return q, values


def action_values(
    tree: AnswerTree, log_pi: np.ndarray, log_ref: np.ndarray | None = None, kl_coeff: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Advantages [S, V] and values [S] of a policy whose tokens pay kl_coeff (log pi - log ref), gamma = 1."""
    cost = np.zeros_like(log_pi) if log_ref is None else kl_coeff * (log_pi - log_ref)
    q, values = _backwards(tree, lambda s, row: float(np.exp(log_pi[s]) @ (row - cost[s])))
    return q - cost - values[:, None], values


def soft_values(tree: AnswerTree, log_ref: np.ndarray, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Advantages and values with V(s) = temperature log E_ref exp(Q / temperature): of the KL-regularised optimum."""
    q, values = _backwards(
        tree, lambda s, row: temperature * float(np.logaddexp.reduce(log_ref[s] + row / temperature))
    )
    return q - values[:, None], values


def tilt(log_policy: np.ndarray, advantages: np.ndarray, temperature: float) -> np.ndarray:
    """The closed form log [policy exp(A / temperature) / Z(s)], [S, V]."""
    return log_softmax(log_policy + advantages / temperature)


def regularised_policy(tree: AnswerTree, log_ref: np.ndarray, own: float, future: float) -> np.ndarray:
    """log pi [S, V] with pi = ref exp(Q / own) / Z, Q being pi's own values with a KL penalty of ``future``.

    own = future is the optimum of E[score] - own KL(answers); future = 0 forgets the KL that later tokens will cost.
    """
    log_pi = np.zeros_like(log_ref)

    def value_of(s: int, row: np.ndarray) -> float:
        log_pi[s] = log_softmax(log_ref[s] + row / own)
        return float(np.exp(log_pi[s]) @ (row - future * (log_pi[s] - log_ref[s])))

    _backwards(tree, value_of)
    return log_pi


class TabularPolicy:
    """Logits [S, V] in Paddle, one row for each prefix: it can represent every policy."""

    def __init__(self, tree: AnswerTree, log_pi: np.ndarray) -> None:
        self.tree = tree
        self.states, self.tokens = paddle.to_tensor(tree.states.flatten()), paddle.to_tensor(tree.tokens)
        self.logits = paddle.create_parameter(
            log_pi.shape, "float64", default_initializer=paddle.nn.initializer.Assign(log_pi)
        )

    def log_probs(self) -> paddle.Tensor:
        """float64 [N, T] of the actions of all answers."""
        logits = self.logits[self.states].reshape([*self.tree.tokens.shape, -1])
        return losses.log_probs_from_logits(logits, self.tokens)

    def table(self) -> np.ndarray:
        """log pi [S, V] as it is now."""
        return log_softmax(self.logits.numpy())


def expected_loss(loss: Callable, weights: np.ndarray, mask: np.ndarray, *fields: np.ndarray) -> paddle.Tensor:
    """Sum over answers of weight times the loss of the answer's tokens: the loss of a batch without chance.

    ``loss`` (fields, mask, denominator) is one of losses.py; a row's denominator is 1 / weight. Fields are [N, T].
    """
    tensors = [paddle.to_tensor(field) if isinstance(field, np.ndarray) else field for field in fields]
    where = paddle.to_tensor(mask)
    rows = (
        loss(*(x[i : i + 1] for x in tensors), where[i : i + 1], float(1 / weight))[0]
        for i, weight in enumerate(weights)
    )
    return sum(rows)


def minimise(parameters: list[paddle.Tensor], loss: Callable[[], paddle.Tensor], iterations: int = 200) -> float:
    """The smallest loss that L-BFGS finds."""
    optimizer = paddle.optimizer.LBFGS(
        1.0, iterations, None, 1e-11, 1e-18, 20, "strong_wolfe", parameters=parameters
    )

    def evaluate() -> paddle.Tensor:
        optimizer.clear_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(evaluate)
    return float(loss())
