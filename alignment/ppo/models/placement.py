"""The part of a model that this process holds: some of its layers, and a slice of each of their large matrices."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import paddle
from paddle import nn

from alignment.parallel.collectives import concat_over_tensor_group
from alignment.parallel.layout import check_model, layers_of_stage
from alignment.parallel.topology import Topology, topology

_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Placement:
    """Where a model is: over how many tensor-parallel processes, and on which of how many pipeline stages.

    Parameters keep the names they have in the whole model, whatever part is here.
    """

    tensor: int = 1
    tensor_rank: int = 0
    stages: int = 1
    stage: int = 0
    sequence_parallel: bool = False

    @classmethod
    def of(cls, place: Topology) -> Placement:
        """As the job trains its models."""
        layout = place.layout
        return cls(layout.tensor, place.tensor_rank, layout.pipeline, place.stage, layout.sequence_parallel)

    @classmethod
    def here(cls) -> Placement:
        """``of`` this process."""
        return cls.of(topology())

    @property
    def is_divided(self) -> bool:
        """Whether the model needs more than this process."""
        return self.tensor > 1 or self.stages > 1

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.stages - 1

    def layers(self, count: int) -> range:
        """Which of a model's ``count`` layers are here."""
        return layers_of_stage(count, self.stages, self.stage)

    def holds(self, name: str, count: int, ties_ends: bool) -> bool:
        """Whether the parameter ``name`` of a model of ``count`` layers is here; one that it lacks counts as here."""
        layer = _LAYER.search(name)
        if layer:
            return int(layer.group(1)) >= count or int(layer.group(1)) in self.layers(count)
        if name.endswith("embed_tokens.weight"):
            return self.is_first or (self.is_last and ties_ends)
        return self.is_last  # final norm and heads


WHOLE = Placement()


def configure(config: Any, placement: Placement) -> None:
    """Tell PaddleNLP's layers which slice of each matrix to create.

    Raises: UsageError if the model cannot be divided so.
    """
    check_model(config, placement.tensor, placement.stages)
    config.tensor_parallel_degree = placement.tensor
    config.tensor_parallel_rank = placement.tensor_rank
    config.tensor_parallel_output = True
    config.sequence_parallel = placement.sequence_parallel


def keep_stage(model: nn.Layer, trunk: nn.Layer, placement: Placement, count: int) -> None:
    """Take away what other stages hold from a model that was built with this stage's number of layers.

    A stage other than the first reads hidden states, one other than the last gives them without the final norm.
    Sets ``model.placement`` and ``model.ties_ends``: the first and the last stage have the same embedding.
    """
    has_head = model is not trunk
    model.placement = placement
    model.ties_ends = placement.stages > 1 and has_head and model.config.tie_word_embeddings
    if placement.stages == 1:
        return
    names = map(str, placement.layers(count))
    trunk.layers._sub_layers = OrderedDict(zip(names, trunk.layers._sub_layers.values(), strict=True))
    if not placement.is_last:
        trunk.norm = nn.Identity()
        if has_head:
            del model.lm_head
    if not placement.is_first and not (placement.is_last and model.ties_ends):
        del trunk.embed_tokens


def follow_lengths(trunk: nn.Layer) -> None:
    """Let the layers of a sequence-parallel model read batches of any length.

    PaddleNLP's attention finds batch and length again by ``seq_length``, which it takes from the configuration.
    """
    for layer in trunk.layers:
        compute = layer.forward

        def forward(
            hidden: paddle.Tensor, position_ids: paddle.Tensor, *args: Any, layer=layer, compute=compute, **kwargs: Any
        ) -> Any:
            layer.self_attn.seq_length = position_ids.shape[1]
            return compute(hidden, position_ids, *args, **kwargs)

        layer.forward = forward


def is_tied(name: str, model: nn.Layer) -> bool:
    """Whether the first and the last stage both hold the parameter ``name``."""
    return model.ties_ends and name.endswith("embed_tokens.weight")


def is_copy(name: str, model: nn.Layer) -> bool:
    """Whether the parameter ``name`` here is the last stage's copy of one that the first stage holds."""
    return is_tied(name, model) and not model.placement.is_first


def names_of_all_layers(names: Iterable[str], count: int) -> set[str]:
    """What ``names``, those of some layers at least, are in a model of ``count`` layers."""
    return {_LAYER.sub(f".layers.{layer}.", name) for name in names for layer in range(count)}


def split_axis(parameter: paddle.Tensor) -> int | None:
    """The axis along which tensor parallelism divides a parameter; None for one that every process holds whole."""
    return parameter.split_axis if getattr(parameter, "is_distributed", False) else None


def own_slice(whole: Any, parameter: paddle.Tensor, placement: Placement) -> Any:
    """The part of a whole tensor (array or Paddle's) that belongs into ``parameter``."""
    axis = split_axis(parameter)
    if axis is None:
        return whole
    size = whole.shape[axis] // placement.tensor
    part = slice(placement.tensor_rank * size, (placement.tensor_rank + 1) * size)
    return whole[(slice(None),) * axis + (part,)]


def merged(tensor: paddle.Tensor, axis: int | None) -> paddle.Tensor:
    """The whole of a tensor that is divided along ``axis``; every tensor-parallel process must ask for it."""
    return tensor if axis is None else concat_over_tensor_group(tensor, axis)
