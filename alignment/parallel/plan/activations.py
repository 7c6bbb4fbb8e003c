"""Bytes of activations on one rank: what a layer keeps for its backward pass, and what it needs while it works.

The method is that of Korthikanti et al. 2022 ("Reducing Activation Recomputation in Large Transformer Models",
arXiv:2205.05198, section 4): count the tensors that the operations of a layer save. Their GPT layer in 16 bits saves
s b h (10 + 24 / t + 5 a s / (h t)) bytes with tensor parallelism, all over t with sequence parallelism. The layer here
is PaddleNLP's Llama layer without fused kernels and without dropout. Per token, with H hidden, N = key/value width, I
intermediate, a heads, s length, c bytes of an activation, and 4-byte float32 where PaddleNLP computes in it:

    norms, two     the operands of square (4 H) and of scaling (4 H; in float32 they are one), the scaled (c H)
    their outputs  2 c H, read by the projections; with sequence parallelism 5 c H, for each of the five projections
                   gathers its own whole input
    attention      c (3 H + 2 N): queries before rotation, rotated by a quarter turn, and scaled; keys as the first two
                   c 3 H: keys and values repeated to all heads, and what the output projection reads
                   4 a s: the softmax, and in 16 bits its copy, 2 a s
    MLP            3 c I: gate, up, and their product
    weights        at O1 every matrix is cast to 16 bits anew, and the cast kept

Only norms (and rotary tables, left out: under 1%) are whole on every rank without sequence parallelism. The sums for
float32 equal, to the rotary tables, what Paddle's allocator counts (tests/parallel/test_plan_measured.py). On CPUs the
kernels of alignment.native keep less: the plan is then an upper bound.
"""

from __future__ import annotations

from dataclasses import dataclass

from alignment.parallel.layout import Layout
from alignment.parallel.plan.shapes import ModelShape


@dataclass(frozen=True)
class Precision:
    """Bytes per element of weights, gradients, optimizer state (with the master weights of 16-bit ones), activations.

    What a layer hands to the next has the weights' type.
    """

    weight: int
    gradient: int
    optimizer: int
    activation: int


def precision_of(bf16: bool, opt_level: str) -> Precision:
    """float32; bfloat16 with a float32 copy in the optimizer (O2); bfloat16 products of float32 weights (O1)."""
    if not bf16:
        return Precision(4, 4, 8, 4)
    return Precision(2, 2, 12, 2) if opt_level == "O2" else Precision(4, 4, 8, 2)


@dataclass(frozen=True)
class Activations:
    """Bytes of activations for ``rows`` sequences of ``length`` tokens in one layer of a model on one rank."""

    shape: ModelShape
    layout: Layout
    precision: Precision
    rows: int
    length: int

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def handed_on(self) -> float:
        """Hidden states between two pipeline stages, which are always whole."""
        return self.tokens * self.precision.weight * self.shape.hidden_size

    @property
    def boundary(self) -> float:
        """What a layer hands to the next: all that recomputation keeps of it."""
        return self.handed_on / self._whole

    @property
    def kept(self) -> float:
        """What a layer keeps for its backward pass."""
        return self._kept_before_mlp + self._mlp + self._cast_weights

    @property
    def backward(self) -> float:
        """``kept``, and the most that gradients take beside it: of the MLP, or of scores and probabilities.

        The MLP's tensors are gone when the attention's turn comes.
        """
        gradients = 8 * self._scores + 4 * self.precision.activation * self.tokens * self.shape.hidden_size
        return self._kept_before_mlp + max(2 * self._mlp, gradients) + self._cast_weights

    @property
    def forward(self) -> float:
        """The most that a layer needs while nothing is kept: the scores three times (c, 4, 4 bytes), or the MLP."""
        one = self.precision.activation * self.tokens * self.shape.hidden_size
        attention = 3 * one + 6 * one / self.layout.tensor + (self.precision.activation + 8) * self._scores
        return max(attention, 4 * one + self._mlp)

    @property
    def final_norm(self) -> float:
        """What the norm after the last layer keeps, its output included."""
        return 12 * self.tokens * self.shape.hidden_size / self._whole

    @property
    def _whole(self) -> int:
        """Over how many ranks those tensors are split that tensor parallelism alone leaves whole."""
        return self.layout.tensor if self.layout.sequence_parallel else 1

    @property
    def _scores(self) -> float:
        """Elements of the attention scores."""
        return self.tokens * self.length * self.shape.num_attention_heads / self.layout.tensor

    @property
    def _mlp(self) -> float:
        return 3 * self.precision.activation * self.tokens * self.shape.intermediate_size / self.layout.tensor

    @property
    def _cast_weights(self) -> float:
        width = self.precision.activation
        return width * self.shape.layer_parameters(self.layout.tensor) if width < self.precision.weight else 0.0

    @property
    def _kept_before_mlp(self) -> float:
        width, hidden, narrow = self.precision.activation, self.shape.hidden_size, self.shape.key_value_size
        norms = 2 * hidden * (12 - width) / self._whole
        inputs = width * hidden * (5 if self.layout.sequence_parallel else 2)
        attention = width * (6 * hidden + 2 * narrow) / self.layout.tensor
        softmax = 4 if width == 4 else 6
        return self.tokens * (norms + inputs + attention) + softmax * self._scores
