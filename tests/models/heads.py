"""Score heads that say something: a new one is 0."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import paddle

from alignment.ppo.models.value import set_head

Model = TypeVar("Model")


def with_random_head(model: Model, seed: int = 1) -> Model:
    """The model itself, its head drawn so that scores have a deviation of about 1."""
    hidden = model.config.hidden_size
    values = np.random.default_rng(seed).normal(0.0, (hidden + 1) ** -0.5, size=[hidden, 1])
    set_head(model, paddle.to_tensor(values, dtype="float32"))
    return model
