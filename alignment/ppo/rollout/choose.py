"""Which rollout engine runs, and with which kernels: decided once, at start, and said."""

from __future__ import annotations

from functools import partial

import paddle

from alignment.native.build import BuildError, load_library
from alignment.ppo.rollout.answers import Decode
from alignment.ppo.rollout.eager import EagerRolloutEngine
from alignment.ppo.rollout.fused import FusedRolloutEngine
from alignment.ppo.rollout.native.kernels import NativeKernels
from alignment.ppo.rollout.operations import LEFT_OUT, Operations, find_operations
from alignment.ppo.rollout.plain import PaddleKernels
from alignment.ppo.rollout.protocol import RolloutEngine
from alignment.runtime.console import say


def build_engine(
    model: paddle.nn.Layer, batch_size: int, use_fusemt: bool, decode: Decode | None = None
) -> RolloutEngine:
    """The engine that answers prompts with ``model``; arguments as of the engines."""
    if not use_fusemt:
        say("rollout: PaddleNLP's own forward pass (use_fusemt is false)")
        return EagerRolloutEngine(model, batch_size, decode)
    kernels, description = _choose_kernels(model.config.dtype)
    say(f"rollout: {description}")
    return FusedRolloutEngine(model, batch_size, kernels, decode)


def _choose_kernels(dtype: str):
    if paddle.get_device() == "cpu":
        try:
            load_library()
        except BuildError as error:
            return partial(PaddleKernels, operations=Operations()), f"plain Paddle operations, for {error}: slower"
        return NativeKernels, "C++ kernels compiled for this processor"
    operations, used, missing = find_operations(dtype)
    description = f"Paddle's {', '.join(used) or 'plain operations'}"
    if missing:
        description += f"; without {', '.join(missing)}"
    description += f"; by choice without {', '.join(LEFT_OUT)}"
    return partial(PaddleKernels, operations=operations), description
