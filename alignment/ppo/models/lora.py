"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685): W + alpha / rank * A B, of which only A and B learn.

The layers are PaddleNLP's, one for each kind of linear layer, divided or not. B starts at zero, so that an adapted
model begins as its base; A is drawn from the seed and its name, so that it is the same matrix in every layout.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddlenlp.peft import LoRAConfig, LoRAModel

from alignment.ppo.models.placement import own_slice, split_axis

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_TRAINED_WITH_THEM = "score_head"


@dataclass(frozen=True)
class LoRASettings:
    """rank: columns of A; alpha: A B counts alpha / rank times; targets: the adapted linear layers (of TARGETS)."""

    rank: int
    alpha: int
    targets: tuple[str, ...] = TARGETS

    @classmethod
    def from_arguments(cls, args: Any) -> LoRASettings | None:
        """What a stage's arguments ask for; None without ``lora``."""
        return cls(args.lora_rank, args.lora_alpha, tuple(args.lora_target_modules)) if args.lora else None

    def config(self, dtype: str) -> LoRAConfig:
        """The same in PaddleNLP's form, which names modules by patterns; a score head is trained as it is."""
        patterns = [f".*{target}.*" for target in self.targets]
        trained = [f".*{_TRAINED_WITH_THEM}.*"]
        return LoRAConfig(
            r=self.rank, lora_alpha=self.alpha, target_modules=patterns, trainable_modules=trained, dtype=dtype
        )


@dataclass(frozen=True)
class Base:
    """The weights that adapters belong to: where they were read, and the SHA-256 of those files."""

    directory: Path
    sha256: str


def add_adapters(model: paddle.nn.Layer, settings: LoRASettings, base: Base, seed: int) -> None:
    """Adapt a policy or score model in place; then only A, B and a score head are trained.

    ``model.lora`` and ``model.base`` keep the arguments. The base's parameters stay the very tensors they were.
    """
    insert_adapters(model, settings)
    model.lora, model.base = settings, base
    for name, layer in adapted_layers(model):
        for parameter in (layer.lora_A, layer.lora_B):
            parameter.initialize()
        shape = list(layer.lora_A.shape)
        if split_axis(layer.lora_A) == 0:
            shape[0] *= model.placement.tensor
        own = own_slice(draw(shape, seed, name), layer.lora_A, model.placement)
        layer.lora_A.set_value(paddle.to_tensor(own).astype(layer.lora_A.dtype))


def insert_adapters(model: paddle.nn.Layer, settings: LoRASettings) -> None:
    """The layers of ``add_adapters``, their A and B still without storage: they are drawn, or shared with another."""
    config = settings.config(model.config.dtype)
    config.tensor_parallel_degree = model.config.tensor_parallel_degree
    with paddle.LazyGuard():  # PaddleNLP's layers create a weight before they take over the base's
        LoRAModel(model, config)


def draw(shape: list[int], seed: int, name: str) -> np.ndarray:
    """The whole A of the layer ``name``, float32 [inputs, rank]: U(-b, b), b = inputs ** -0.5, PaddleNLP's choice."""
    bound = shape[0] ** -0.5
    random = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return random.uniform(-bound, bound, shape).astype(np.float32)


def is_adapted(model: paddle.nn.Layer) -> bool:
    """Whether ``add_adapters`` has been at the model."""
    return getattr(model, "lora", None) is not None


def adapted_layers(model: paddle.nn.Layer) -> Iterator[tuple[str, paddle.nn.Layer]]:
    """(name, layer) of the linear layers that have adapters."""
    return ((name, layer) for name, layer in model.named_sublayers() if hasattr(layer, "lora_A"))


def adapter_parameters(model: paddle.nn.Layer) -> dict[str, paddle.Tensor]:
    """What an adapted model has beside its base, by name: every A and B here, and a score head."""
    adapted = tuple(f"{name}.lora_" for name, _ in adapted_layers(model))
    own = (*adapted, f"{_TRAINED_WITH_THEM}.")
    return {name: parameter for name, parameter in model.named_parameters() if name.startswith(own)}


@paddle.no_grad()
def effective_weight(linear: paddle.nn.Layer) -> paddle.Tensor:
    """The matrix [inputs, outputs] that a linear layer multiplies by, or this process's slice, in the weight's type.

    Without adapters that is the parameter itself, not a copy; with them W + alpha / rank * A B, computed in float32.
    Under sharding stage 3 it can be asked for only while the parameters are here (``Shards.whole_model``).
    """
    if not hasattr(linear, "lora_A") or linear.merged:
        return linear.weight
    down, up = linear.lora_A.astype("float32"), linear.lora_B.astype("float32")
    whole = linear.weight.astype("float32") + linear.scaling * paddle.matmul(down, up)
    return whole.astype(linear.weight.dtype)


def plain_parameters(
    model: paddle.nn.Layer,
) -> Iterator[tuple[str, paddle.Tensor, Callable[[], paddle.Tensor]]]:
    """What a model without adapters needs to compute as ``model`` does: (name, parameter, what gives its value)."""
    adapted = dict(adapted_layers(model))
    for name, parameter in model.state_dict().items():
        path, _, kind = name.rpartition(".")
        if not kind.startswith("lora_"):
            merges = path in adapted and kind == "weight"
            yield name, parameter, partial(effective_weight, adapted[path]) if merges else parameter.detach
