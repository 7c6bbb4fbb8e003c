"""The processes that answer the same prompts together: what one of them finds out, all must know."""

from __future__ import annotations

import numpy as np
import paddle
import paddle.distributed as dist

from alignment.parallel.collectives import concat_over_tensor_group, from_head, head_of
from alignment.parallel.gloo import meet
from alignment.parallel.topology import topology
from alignment.ppo.rollout.protocol import BROKEN, Rollout
from alignment.runtime.faults import RunError


class ModelGroup:
    """The tensor-parallel processes and pipeline stages of a model; one that is not divided is alone.

    Attributes: divides_vocabulary: whether logits are a part of the columns here.
    """

    def __init__(self, model: paddle.nn.Layer) -> None:
        placement = model.placement
        name = "model" if placement.stages > 1 else "tensor"
        self.group = topology().group(name) if placement.is_divided else None
        self.divides_vocabulary = placement.is_last and model.lm_head.weight.is_distributed

    def whole_logits(self, logits: paddle.Tensor) -> paddle.Tensor:
        """float32 [rows, V] of [rows, columns here]."""
        return concat_over_tensor_group(logits) if self.divides_vocabulary else logits

    def wait(self) -> None:
        """Until all are here, however long the slowest takes."""
        if self.group is not None:
            meet(self.group, "sampling a token")

    def agree(self, tokens: np.ndarray) -> np.ndarray:
        """The tokens, int64 [m], that the model's head drew.

        Raises: RunError, on all processes, if one is BROKEN.
        """
        if self.group is not None:
            shared = paddle.to_tensor(tokens)
            self.wait()
            dist.broadcast(shared, src=head_of(self.group), group=self.group)
            tokens = shared.numpy()
        if (tokens == BROKEN).any():
            raise RunError(
                "rollout: the policy's logits are not finite: its weights have become NaN or too large; go back to an "
                "earlier checkpoint with a lower learning rate"
            )
        return tokens

    def share(self, rollout: Rollout) -> Rollout:
        """The head's rollout, which alone has log-probabilities and entropies."""
        return rollout if self.group is None else from_head(rollout, self.group)
