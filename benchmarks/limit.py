"""The least time in which a machine can generate with fp32 weights, whatever the engine.

A step of decoding reads all weights once and multiplies each with every live row, and prefill multiplies the layers'
weights with every prompt token:

    step     >=  max(4 * P / bandwidth, rows * 2 * P / flops)
    answers  >=  prefill + max((longest - 1) * 4 * P / bandwidth, (tokens - answers) * 2 * P / flops)
    prefill  >=  2 * (body * prompt tokens + head * answers) / flops

P = body + head are the parameters that enter products: an embedding counts where it is the head as well. The first
token of an answer comes from the prefill. Sums over the run instead of over steps hold for every order of decoding,
continuous batching included. Attention, the cache's bytes, norms and sampling are left out, so that the bound stays
one. An engine that prefills a prefix which prompts share only once could pass under the prefill term.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Limit:
    """A machine and a model.

    bytes_per_s     read bandwidth of the machine
    flops_per_s     fp32 multiplications and additions of its matrix products
    body            parameters of the layers' matrices
    head            parameters of the output matrix
    bytes_per_parameter  of the stored weights
    """

    bytes_per_s: float
    flops_per_s: float
    body: int
    head: int
    bytes_per_parameter: int = 4

    def seconds(self, prompts: Sequence[int], answers: Sequence[int]) -> float:
        """Least seconds for answers of these lengths (>= 1) to prompts of these lengths, all in tokens."""
        prefill = 2 * (self.body * sum(prompts) + self.head * len(answers)) / self.flops_per_s
        later = sum(answers) - len(answers)
        reading = (max(answers) - 1) * (self.body + self.head) * self.bytes_per_parameter / self.bytes_per_s
        return prefill + max(reading, 2 * (self.body + self.head) * later / self.flops_per_s)

    def tokens_per_s(self, prompts: Sequence[int], answers: Sequence[int]) -> float:
        """Most tokens a second, prefill included; arguments as ``seconds``."""
        return sum(answers) / self.seconds(prompts, answers)
