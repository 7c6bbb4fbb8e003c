"""Bytes that one rank needs in each phase of a stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

from alignment.parallel.plan.activations import Activations
from alignment.parallel.plan.layout import Layout
from alignment.parallel.plan.setting import Pass, Setting

Moment = dict[str, float]  # fields of Memory that a phase adds to what is resident, in bytes, at one point of its work

# Arrays of float32 as large as the logits that exist at once; 16-bit logits are there besides. As measured.
_ARRAYS_WITH_ENTROPY = 4  # logits, probabilities, these clipped, their logarithms
_ARRAYS_OF_CROSS_ENTROPY = 2  # logits, probabilities


@dataclass(frozen=True)
class Memory:
    """Bytes on each rank of one pipeline stage in one phase.

    weights: of all models, and of the one layer that ZeRO stage 3 has gathered; copy: the actor's, for sampling;
    cache: keys and values.
    """

    phase: str
    stage: int
    weights: float
    optimizer: float
    gradients: float = 0.0
    copy: float = 0.0
    cache: float = 0.0
    activations: float = 0.0
    logits: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self)[2:])


def memory_of(setting: Setting) -> tuple[Memory, ...]:
    """Every phase of the stage on every pipeline stage, in the order of the work, at the moment that needs most."""
    phases: dict[str, Callable[[Setting, int], Iterator[Moment]]] = {"update": _update}
    if setting.stage == "ppo":
        phases = {"rollout": _rollout, "score": _judge, "update": _update}
    elif setting.sizes.evaluation_strategy != "no":
        phases["evaluate"] = _judge
    return tuple(
        replace(_resident(setting, name, stage), **max(moments(setting, stage), key=lambda parts: sum(parts.values())))
        for name, moments in phases.items()
        for stage in range(setting.layout.pipeline)
    )


def _resident(setting: Setting, phase: str, stage: int) -> Memory:
    """What is on the rank all the time, once the first optimizer step is done.

    ZeRO (arXiv:1910.02054) divides the optimizer state, from stage 2 on the gradients, in stage 3 the weights of the
    models that are trained; models that are not stay whole.
    """
    layout, width = setting.layout, setting.precision
    sharded = layout.sharding if layout.sharding_stage == 3 else 1
    trained = [model for model in setting.models if model.trained]
    weights = sum(m.parameters(layout, stage) / (sharded if m.trained else 1) for m in setting.models)
    gathered = max(m.largest_unit(layout) for m in trained) if sharded > 1 else 0
    optimizer = _learnt(setting, stage) * width.optimizer / layout.sharding
    return Memory(phase, stage, (weights + gathered) * width.weight, optimizer)


def _learnt(setting: Setting, stage: int) -> int:
    """Trained parameters of all models on a rank."""
    return sum(model.trained_parameters(setting.layout, stage) for model in setting.models)


def _rollout(setting: Setting, stage: int) -> Iterator[Moment]:
    """Sampling: one layer at work on the prompts; then the last token.

    The eager engine makes a new cache for every token while it still has the old one. One layer's keys and values are
    repeated to all heads, and that copied again to be transposed.
    """
    actor, layout, width = setting.models[0], setting.rollout_layout, setting.precision
    stage = 0 if setting.sizes.eval_mode else stage
    rows, prompt = setting.sizes.per_device_eval_batch_size, setting.prompt_length
    copy = actor.parameters(layout, stage) * width.weight if setting.sizes.eval_mode else 0.0
    each = 2 * rows * width.activation / layout.tensor  # keys and values of one layer: bytes per token and width
    cache = len(actor.layers(layout, stage)) * each * actor.shape.key_value_size
    prompts = Activations(actor.shape, layout, width, rows, prompt)
    longest = prompt + setting.answer_length
    repeated = 2 * each * longest * actor.shape.hidden_size
    logits = rows * actor.shape.vocab_size * _logit_bytes(setting) * (stage == layout.pipeline - 1)
    yield {"copy": copy, "cache": cache * prompt, "activations": prompts.forward}
    yield {"copy": copy, "cache": 2 * cache * longest, "activations": repeated, "logits": logits}


def _judge(setting: Setting, stage: int) -> Iterator[Moment]:
    """Forward passes: one layer at work; then what the last one gave, and its logits."""
    for done in setting.judging():
        yield {"activations": done.activations.forward}
        yield {"activations": done.activations.boundary, "logits": _logits(setting, done, stage)}


def _update(setting: Setting, stage: int) -> Iterator[Moment]:
    """Passes with backward: what is kept, and beside it the logits or, later, one layer at work.

    Layers under the lowest trained one keep nothing. Gradients of all models are there until the step.
    """
    is_last = stage == setting.layout.pipeline - 1
    divided = setting.layout.sharding if setting.layout.sharding_stage >= 2 else 1
    gradients = {"gradients": _learnt(setting, stage) * setting.precision.gradient / divided}
    for done in setting.learning():
        model, activations = done.model, done.activations
        layers = model.trained_layers(setting.layout, stage)
        kept = activations.boundary if model.recompute else activations.kept
        kept = _flying(setting, stage) * (layers * kept + _between_stages(setting.layout, stage, activations))
        at_work = activations.backward - (0 if model.recompute else activations.kept)
        if is_last:
            logits = _logits(setting, done, stage)
            yield gradients | {"activations": kept + activations.final_norm, "logits": logits}
        yield gradients | {"activations": kept + (at_work if layers else activations.forward)}


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
    arrays = _ARRAYS_WITH_ENTROPY if setting.stage == "ppo" else _ARRAYS_OF_CROSS_ENTROPY
    return 4 * arrays + (2 if setting.precision.activation == 2 else 0)
