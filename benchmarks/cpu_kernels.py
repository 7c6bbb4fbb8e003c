"""How much alignment.ppo.models.cpu and copied (not strided) transposes save on a CPU, on the default model.

    python -m benchmarks.cpu_kernels

The same weights run in both ways by turns: with PaddleNLP's own layers on strided views, and as the toolkit runs
them; only the rotary embedding is the toolkit's in both. Shown are the median seconds of each and their ratio; the
machine should do nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from unittest import mock

import numpy as np
import paddle

from alignment.ppo.models import loading
from alignment.ppo.models.policy import Packed, hidden_states, language_model_head, target_log_probs, trunk
from alignment.runtime.bootstrap import configure_paddle

DECODE_ROWS, TRAIN_ROWS, CONTEXT, REPEATS = 64, 8, 50, 5
IDS = np.random.default_rng(0).integers(3, 49000, [DECODE_ROWS, CONTEXT + 1])


@paddle.no_grad()
def decode(model: paddle.nn.Layer, start: int, end: int, cache: object) -> tuple[paddle.Tensor, object]:
    """Logits after token ``end - 1`` of each row, and the cache."""
    hidden, cache = trunk(model)(
        input_ids=paddle.to_tensor(IDS[:, start:end]),
        attention_mask=paddle.ones([DECODE_ROWS, end], dtype="bool"),
        position_ids=paddle.arange(start, end).expand([DECODE_ROWS, end - start]),
        past_key_values=cache,
        use_cache=True,
        return_dict=False,
    )[:2]
    return language_model_head(model, hidden[:, -1]), cache


def make_decode_step(model: paddle.nn.Layer) -> Callable[[], paddle.Tensor]:
    _, cache = decode(model, 0, CONTEXT, None)
    return lambda: decode(model, CONTEXT, CONTEXT + 1, cache)[0]


def make_training_step(model: paddle.nn.Layer) -> Callable[[], paddle.Tensor]:
    def step() -> paddle.Tensor:
        ids = paddle.to_tensor(IDS[:TRAIN_ROWS, :CONTEXT])
        everything = paddle.ones(ids.shape, dtype="bool")
        hidden = hidden_states(model, ids, everything)
        log_probs = target_log_probs(model, hidden, Packed(ids, everything, everything))
        log_probs.sum().backward()
        model.clear_gradients()
        return log_probs

    return step


def compare(name: str, make: Callable, models: list[paddle.nn.Layer]) -> None:
    """Time both models by turns, after a step to warm up, and check that they agree."""
    steps, seconds, results = [make(model) for model in models], ([], []), [None, None]
    for _ in range(REPEATS + 1):
        for i, strided in enumerate((True, False)):
            paddle.set_flags({"FLAGS_use_stride_kernel": strided})
            started = time.perf_counter()
            results[i] = steps[i]().numpy()
            seconds[i].append(time.perf_counter() - started)
    np.testing.assert_allclose(*results, atol=1e-3)
    own, fast = (statistics.median(times[1:]) for times in seconds)
    print(f"{name:<36} PaddleNLP's own {own:.3f} s, toolkit {fast:.3f} s, ratio {own / fast:.2f}")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    configure_paddle("cpu")
    with mock.patch.object(loading, "speed_up_on_cpu", lambda model: None):
        own_forms = loading.load_policy("default")
    both = [own_forms, loading.load_policy("default")]
    compare(f"decode step, {DECODE_ROWS} rows, context {CONTEXT}", make_decode_step, both)
    compare(f"forward and backward, {TRAIN_ROWS} x {CONTEXT} tokens", make_training_step, both)
