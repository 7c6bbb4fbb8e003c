"""Partial unfreezing: train the upper layers only."""

from __future__ import annotations

import numpy as np
import paddle

from alignment.ppo.models.policy import trunk
from alignment.runtime.faults import UsageError


def set_trainable_layers(model: paddle.nn.Layer, num_layers_unfrozen: int | None) -> int:
    """Choose what is trained; returns the number of trainable scalars here.

    Args:
        model: a policy or a score model.
        num_layers_unfrozen: None or -1: everything. n >= 0: the last n transformer layers, the final norm and an
            output head with weights of its own; the embeddings, and with them a tied head, stay fixed.
    Raises:
        UsageError: more layers than the model has, or below -1.
    """
    body, count = trunk(model), model.config.num_hidden_layers
    everything = num_layers_unfrozen in (None, -1)
    if not everything and not 0 <= num_layers_unfrozen <= count:
        raise UsageError(f"num_layers_unfrozen: {num_layers_unfrozen} is not -1 (all) or between 0 and {count}")
    for parameter in model.parameters():
        parameter.trainable = everything
    if not everything:
        own = zip(model.placement.layers(count), body.layers, strict=True)
        for layer in [*(layer for number, layer in own if number >= count - num_layers_unfrozen), body.norm]:
            _unfreeze(layer)
        head = getattr(model, "score_head", None) or getattr(model, "lm_head", None)
        if head is not None and not (hasattr(body, "embed_tokens") and head.weight is body.embed_tokens.weight):
            _unfreeze(head)
    return int(sum(np.prod(parameter.shape) for parameter in model.parameters() if parameter.trainable))


def freeze(model: paddle.nn.Layer) -> None:
    """Train nothing of the model."""
    for parameter in model.parameters():
        parameter.trainable = False


def _unfreeze(layer: paddle.nn.Layer) -> None:
    for parameter in layer.parameters():
        parameter.trainable = True
