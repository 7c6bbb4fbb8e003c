"""Reward functions and a batch to score, for the tests of reward sources."""

from __future__ import annotations

import numpy as np

from alignment.ppo.rewards import RewardBatch, RewardSource

FUNCTIONS = """
import math
def words(responses): return [len(r.split()) for r in responses]
def overlap(prompts, samples, **rest): return [s["answer"] in p for p, s in zip(prompts, samples)]
def ended(finished, scale=2.0): return [scale * f for f in finished]
def everything(**columns): return [float(len(columns))] * len(columns["responses"])
def broken(responses): return [1 / (len(r) - 5) for r in responses]
def short(responses): return [0.0] * (len(responses) - 1)
def holes(responses): return [1.0, math.nan, 2.0, 3.0]
def text(responses): return ["1"] * len(responses)
def nested(responses): return [[1.0]] * len(responses)
def single(responses): return 1.0
def needs_more(responses, model): return [0.0] * len(responses)
constant = 3
class Judge:
    def score(self, responses): return [7] * len(responses)
judge = Judge()
"""


def make_batch(responses=("a b c", "a", "hello", "x y")):
    count = len(responses)
    return RewardBatch(
        prompts=[f"question {i}" for i in range(count)],
        responses=list(responses),
        finished=np.arange(count) % 2 == 0,
        samples=[{"input": f"question {i}", "answer": str(i % 3)} for i in range(count)],
    )


class Constant(RewardSource):
    name = "constant"

    def __init__(self, value):
        self.value = value

    def __call__(self, batch):
        return np.full(len(batch), self.value, dtype=np.float32)
