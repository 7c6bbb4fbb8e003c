"""Checks tensor-parallel layers and the divided vocabulary against whole ones; test_tensor_layers.py runs it.

Every check compares values and gradients with those of the undivided layer, which each process also computes.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np  # noqa: E402
import paddle  # noqa: E402
import paddle.nn.functional as F  # noqa: E402
from paddle.distributed.fleet.meta_parallel import (  # noqa: E402
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)

from alignment.parallel.collectives import barrier, copy_to_tensor_group, from_head, gather_objects  # noqa: E402
from alignment.parallel.layout import Layout  # noqa: E402
from alignment.parallel.topology import join, topology  # noqa: E402
from alignment.ppo.losses import entropy_from_logits, log_probs_from_logits  # noqa: E402
from alignment.ppo.models.placement import merged, split_axis  # noqa: E402
from alignment.ppo.models.vocabulary import split_entropy, split_log_probs  # noqa: E402
from alignment.runtime.bootstrap import configure_paddle  # noqa: E402
from alignment.runtime.faults import run_main  # noqa: E402

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
ROWS, INPUTS, OUTPUTS, VOCABULARY = 5, 6, 8, 12


def random(*shape: int, seed: int = 0) -> paddle.Tensor:
    """The same on every process."""
    tensor = paddle.to_tensor(np.random.default_rng(seed).normal(size=shape).astype("float32"))
    tensor.stop_gradient = False
    return tensor


def own_columns(whole: paddle.Tensor, axis: int) -> paddle.Tensor:
    return paddle.split(whole, 2, axis=axis)[topology().tensor_rank]


def check_linear(kind: type, axis: int, **options: bool) -> None:
    """A divided matrix product: values, and gradients of input and weight."""
    x, weight, target = random(ROWS, INPUTS), random(INPUTS, OUTPUTS, seed=1), random(ROWS, OUTPUTS, seed=2).detach()
    layer = kind(INPUTS, OUTPUTS, has_bias=False, **options)
    layer.weight.set_value(own_columns(weight.detach(), axis))
    assert split_axis(layer.weight) == axis
    given = x.detach()
    given.stop_gradient = False
    fed = own_columns(given, 1) if options.get("input_is_parallel") else given
    found, expected = layer(fed), paddle.matmul(x, weight)
    partial = kind is ColumnParallelLinear and not options["gather_output"]
    mine = own_columns(target, 1) if partial else target
    np.testing.assert_allclose(found.numpy(), (own_columns(expected, 1) if partial else expected).numpy(), **CLOSE)
    (found * mine).sum().backward()
    (expected * target).sum().backward()
    np.testing.assert_allclose(layer.weight.grad.numpy(), own_columns(weight.grad, axis).numpy(), **CLOSE)
    np.testing.assert_allclose(merged(layer.weight.detach(), axis).numpy(), weight.numpy())
    if options.get("input_is_parallel"):
        grad = own_columns(given.grad, 1).numpy()
        np.testing.assert_allclose(grad, own_columns(x.grad, 1).numpy(), **CLOSE)
    else:
        np.testing.assert_allclose(given.grad.numpy(), x.grad.numpy(), **CLOSE)


def check_embedding() -> None:
    """A divided embedding: rows, and the gradient of those that are here."""
    table, ids = random(VOCABULARY, INPUTS), paddle.to_tensor([[0, 11, 5], [6, 6, 3]])
    layer = VocabParallelEmbedding(VOCABULARY, INPUTS)
    layer.weight.set_value(own_columns(table.detach(), 0))
    target = random(2, 3, INPUTS, seed=3).detach()
    found, expected = layer(ids), F.embedding(ids, table)
    np.testing.assert_allclose(found.numpy(), expected.numpy(), **CLOSE)
    (found * target).sum().backward()
    (expected * target).sum().backward()
    np.testing.assert_allclose(layer.weight.grad.numpy(), own_columns(table.grad, 0).numpy(), **CLOSE)


def check_vocabulary(temperature: float, size: float) -> None:
    """Log-probabilities and entropies of divided logits, with gradients through head and hidden states."""
    hidden, head = random(ROWS, INPUTS), random(INPUTS, VOCABULARY, seed=1)
    ids, weights = paddle.to_tensor([0, 11, 5, 6, 3]), random(ROWS, seed=4).detach()
    given, part = hidden.detach(), own_columns(head.detach(), 1)
    given.stop_gradient = part.stop_gradient = False
    logits = paddle.matmul(copy_to_tensor_group(given), part) * size
    whole = paddle.matmul(hidden, head) * size
    found = split_log_probs(logits, ids, temperature), split_entropy(logits, temperature)
    expected = log_probs_from_logits(whole, ids, temperature), entropy_from_logits(whole, temperature)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=1e-5, atol=1e-5)
    for log_probs, entropy in (found, expected):
        (log_probs * weights + 0.3 * entropy * weights).sum().backward()
    np.testing.assert_allclose(given.grad.numpy(), hidden.grad.numpy(), rtol=1e-4, atol=1e-5 * size)
    np.testing.assert_allclose(part.grad.numpy(), own_columns(head.grad, 1).numpy(), rtol=1e-4, atol=1e-5 * size)


def check_large_logits() -> None:
    """Logits whose exponential overflows, against float64 (Paddle's own CPU kernel stops at -64)."""
    whole = random(ROWS, VOCABULARY).numpy().astype("float64") * 500
    ids = np.array([0, 11, 5, 6, 3])
    log_probs = whole - np.logaddexp.reduce(whole, axis=1, keepdims=True)
    part = own_columns(paddle.to_tensor(whole.astype("float32")), 1)
    found = split_log_probs(part, paddle.to_tensor(ids)).numpy()
    np.testing.assert_allclose(found, log_probs[np.arange(ROWS), ids], rtol=1e-5, atol=1e-3)
    entropy = -(np.exp(log_probs) * log_probs).sum(1)
    np.testing.assert_allclose(split_entropy(part).numpy(), entropy, atol=1e-3)


def check_objects() -> None:
    """Objects of unequal size travel; the head's word counts."""
    rank = topology().tensor_rank
    assert gather_objects("x" * (rank + 1) * 1000, "tensor") == ["x" * 1000, "x" * 2000]
    assert gather_objects(rank, "data") == [rank]
    assert from_head({"rank": rank}) == {"rank": 0}


def main() -> None:
    """All checks."""
    configure_paddle("cpu")
    join(Layout(tensor=2))
    check_linear(ColumnParallelLinear, 1, gather_output=True)
    check_linear(ColumnParallelLinear, 1, gather_output=False)
    check_linear(RowParallelLinear, 0, input_is_parallel=True)
    check_linear(RowParallelLinear, 0, input_is_parallel=False)
    check_embedding()
    for temperature, size in ((1.0, 1.0), (0.7, 1.0), (1.0, 8.0)):
        check_vocabulary(temperature, size)
    check_large_logits()
    check_objects()
    barrier()
    print("all checks passed")


if __name__ == "__main__":
    run_main(main)
