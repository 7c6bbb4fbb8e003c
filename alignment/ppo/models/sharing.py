"""One storage for what several layers, or several models, hold alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

import paddle

from alignment.runtime.faults import UsageError


def build_sharing(build: Callable[[], paddle.nn.Layer], source: paddle.nn.Layer) -> paddle.nn.Layer:
    """The model that ``build`` makes, its parameters those of ``source``; no storage is taken meanwhile.

    Raises: UsageError as ``share_parameters``.
    """
    with paddle.LazyGuard():
        model = build()
    share_parameters(source, model)
    return model


def share_parameters(source: paddle.nn.Layer, target: paddle.nn.Layer) -> None:
    """Let ``target`` compute with the parameters of ``source`` that have the same names: all that it has.

    Raises: UsageError if ``source`` lacks one, or has it in another shape.
    """
    layers = dict(source.named_sublayers(include_self=True))
    for name, layer in target.named_sublayers(include_self=True):
        own = layers[name]._parameters if name in layers else {}
        for key, parameter in layer._parameters.items():
            twin = own.get(key)
            if parameter is None and twin is None:
                continue
            if parameter is None or twin is None or twin.shape != parameter.shape:
                raise UsageError(f"the models differ in {name}.{key}, so they cannot share their weights")
            layer._parameters[key] = twin


def share_rotary_tables(trunk: paddle.nn.Layer) -> None:
    """Let all layers read the first one's sines and cosines.

    PaddleNLP gives each layer tables of its own, 2 x [1, positions, 1, head size] in float32: 126 MB of SmolLM2-135M.
    """
    layers = list(trunk.layers)
    for layer in layers[1:]:
        layer.self_attn.rotary_emb = layers[0].self_attn.rotary_emb


def mark_shared(models: Iterable[paddle.nn.Layer]) -> None:
    """Set ``shared_parameters`` of each model: names (``Tensor.name``) of its parameters that others of them have too.

    Whoever moves or frees a model's parameters must leave these alone while another model needs them.
    """
    models = list(models)
    holders = Counter(parameter.name for model in models for parameter in model.parameters())
    for model in models:
        model.shared_parameters = frozenset(p.name for p in model.parameters() if holders[p.name] > 1)
