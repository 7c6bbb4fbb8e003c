"""Bytes that one rank needs in each phase of a stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace

from alignment.parallel.layout import Layout
from alignment.parallel.plan.activations import Activations
from alignment.parallel.plan.models import Model
from alignment.parallel.plan.setting import Pass, Setting
from alignment.parallel.plan.traffic import all_gather

Moment = dict[str, float]  # fields of Memory that a phase adds to what is resident, in bytes, at one point of its work

# Arrays of float32 as large as the logits that exist at once; 16-bit logits are there besides. As measured.
_ARRAYS_WITH_ENTROPY = 4  # logits, probabilities, these clipped, their logarithms
_ARRAYS_OF_CROSS_ENTROPY = 2  # logits, probabilities
_ARRAYS_OF_ILQL = 7  # the same of the policy and of two Q heads, and the gradient of one


@dataclass(frozen=True)
class Memory:
    """Bytes on each rank of one pipeline stage in one phase.

    weights: of all models; copy: of an actor that samples in another layout; gathered: what ZeRO stage 3 has brought
    from other ranks; cache: keys and values.
    """

    phase: str
    stage: int
    weights: float
    optimizer: float
    copy: float
    gradients: float = 0.0
    gathered: float = 0.0
    cache: float = 0.0
    activations: float = 0.0
    logits: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self)[2:])


def memory_of(setting: Setting) -> tuple[Memory, ...]:
    """Every phase of the stage on every pipeline stage, in the order of the work, at the moment that needs most."""
    phases: dict[str, Callable[[Setting, int], Iterator[Moment]]] = {"update": _update}
    if setting.samples:
        phases = {"rollout": _rollout, "score": _judge, "update": _update}
    elif setting.evaluates:
        phases["evaluate"] = _judge
    return tuple(
        replace(_resident(setting, name, stage), **max(moments(setting, stage), key=lambda parts: sum(parts.values())))
        for name, moments in phases.items()
        for stage in range(setting.layout.pipeline)
    )


def _resident(setting: Setting, phase: str, stage: int) -> Memory:
    """What is on the rank all the time, once the first optimizer step is done.

    ZeRO (arXiv:1910.02054) divides the optimizer state, and in stage 3 the layers of every model.
    """
    layout = setting.layout
    copied = setting.models[0].parameters(setting.rollout_layout, 0) if setting.has_copy else 0
    return Memory(
        phase,
        stage,
        weights=sum(
            model.parameters(layout, stage) * setting.width(model).weight - _elsewhere(setting, model, stage)
            for model in setting.models
        ),
        optimizer=_held(setting, setting.models, "optimizer", stage) / layout.sharding,
        copy=copied * setting.precision.weight,
    )


def _elsewhere(setting: Setting, model: Model, stage: int) -> float:
    """Bytes of a model's layers that stage 3 leaves to other ranks while nothing computes."""
    if setting.layout.sharding_stage < 3:
        return 0.0
    return all_gather(
        model.layer_parameters(setting.layout, stage) * setting.precision.weight, setting.layout.sharding
    )


def _rollout(setting: Setting, stage: int) -> Iterator[Moment]:
    """Sampling: the copy is filled; later the fused engine decodes with all slots taken by the longest texts.

    One layer's keys and values are gathered for the rows, and again transposed. (On a CPU the engine gathers nothing,
    but packs the weights once more.)
    """
    actor, layout, width = setting.models[0], setting.rollout_layout, setting.precision
    sizes, shape = setting.sizes, actor.shape
    rows = sizes.rollout_batch_size
    if setting.stage == "ppo":
        rows = min(rows, sizes.per_device_prompt_batch_size * sizes.num_return_sequences)
    brought = _elsewhere(setting, actor, stage)
    gathered = {"gathered": 0.0 if setting.has_copy else brought}
    stage = 0 if setting.has_copy else stage
    longest = setting.prompt_length + setting.answer_length
    layers = len(actor.layers(layout, stage))
    each = 2 * shape.key_value_size * width.activation / layout.tensor  # keys and values of a token in one layer
    yield {"gathered": brought}
    yield gathered | {
        "cache": layers * each * (rows * longest + setting.prompt_length),
        "activations": 2 * each * rows * longest,
        "logits": rows * shape.vocab_size * _logit_bytes(setting) * (stage == layout.pipeline - 1),
    }


def _judge(setting: Setting, stage: int) -> Iterator[Moment]:
    """Forward passes of whole models: one layer at work; then what the last one gave, and its logits."""
    for done in setting.judging():
        gathered = {"gathered": _elsewhere(setting, done.model, stage)}
        yield gathered | {"activations": done.activations.forward}
        yield gathered | {"activations": done.activations.boundary, "logits": _logits(setting, done, stage)}


def _update(setting: Setting, stage: int) -> Iterator[Moment]:
    """Passes with backward: what is kept, and beside it the logits or one layer at work; at last one layer alone.

    Layers under the lowest trained one keep nothing.
    """
    for done in setting.learning():
        model, activations = done.model, done.activations
        layers = model.trained_layers(setting.layout, stage)
        first, last = _gradients(setting, model, stage)
        one_layer = model.shape.layer_parameters(setting.layout.tensor) * setting.precision.weight
        gathered = {"gathered": one_layer if setting.layout.sharding_stage == 3 else 0.0}
        kept = activations.boundary if done.recomputes else activations.kept
        kept = _flying(setting, stage) * (layers * kept + _between_stages(setting.layout, stage, activations))
        at_work = activations.backward - (0 if done.recomputes else activations.kept)
        if stage == setting.layout.pipeline - 1:
            final, logits = kept + activations.final_norm, _logits(setting, done, stage)
            yield {"gradients": first, "activations": final, "logits": logits}
        yield gathered | {"gradients": first, "activations": kept + (at_work if layers else activations.forward)}
        yield gathered | {"gradients": last, "activations": activations.backward if layers else 0.0}


def _gradients(setting: Setting, model: Model, stage: int) -> tuple[float, float]:
    """Bytes of the gradients that exist at once when the last backward pass of ``model`` begins and when it ends.

    From ZeRO stage 2 on a rank keeps the float32 sums of those it owns; beside them one pass's gradients are whole
    until it ends (stage 2), or those of a layer and of what is no layer (stage 3).
    """
    layout, width = setting.layout, setting.precision.gradient
    together = setting.learning_with(model)
    if layout.sharding_stage < 2:
        return (_held(setting, together, "gradient", stage),) * 2
    sums = 4 * sum(other.trained_parameters(layout, stage) for other in together) / layout.sharding
    own = _held(setting, setting.optimized_with(model), "gradient", stage)
    if layout.sharding_stage == 2:
        return sums, sums + own
    each = model.shape.layer_parameters(layout.tensor)
    layers = model.trained_layers(layout, stage)
    return (sums + own - (layers - min(layers, 1)) * each * width,) * 2


def _held(setting: Setting, models: Iterable[Model], part: str, stage: int) -> int:
    """Bytes of a ``part`` (field of Precision) of what is trained of the models on a rank."""
    counts = {model: model.trained_parameters(setting.layout, stage) for model in models}
    return sum(count * getattr(setting.width(model), part) for model, count in counts.items())


def _flying(setting: Setting, stage: int) -> int:
    """Micro-batches that a stage keeps at once under 1F1B (arXiv:2104.04473, section 2.2)."""
    return min(setting.layout.pipeline - stage, setting.sizes.gradient_accumulation_steps)


def _between_stages(layout: Layout, stage: int, activations: Activations) -> float:
    """What a stage has sent, and under sequence parallelism received: its layers then keep a part of that besides."""
    sent, received = stage < layout.pipeline - 1, stage > 0 and layout.sequence_parallel
    return (sent + received) * activations.handed_on


def _logits(setting: Setting, done: Pass, stage: int) -> float:
    """Of the last stage's pass; every rank has its part of the vocabulary."""
    if stage < setting.layout.pipeline - 1:
        return 0.0
    return done.targets * done.model.shape.vocabulary_part(setting.layout.tensor) * _logit_bytes(setting)


def _logit_bytes(setting: Setting) -> int:
    arrays = _ARRAYS_WITH_ENTROPY if setting.samples else _ARRAYS_OF_CROSS_ENTROPY
    if setting.stage == "offline" and setting.sizes.policy_loss == "ilql":
        arrays = _ARRAYS_OF_ILQL
    return 4 * arrays + (2 if setting.precision.activation == 2 else 0)
