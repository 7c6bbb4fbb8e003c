"""Bytes that one rank sends: in every optimizer step, and before sampling."""

from __future__ import annotations

from dataclasses import dataclass

from alignment.parallel.plan.models import Model
from alignment.parallel.plan.setting import Pass, Setting

_FLOAT32 = 4  # bytes: gradients are summed, and updated weights handed on, in float32 buckets
# All-reduces of a layer's [rows, length, H]. Megatron-LM has 2 and 2 (arXiv:1909.08053, section 3); PaddleNLP's
# projections of queries, keys and values, and those to gate and up, each sum the gradient of their own input. Sequence
# parallelism turns one all-reduce into an all-gather and a reduce-scatter, which together send as much, and gathers
# the input of each of the five.
_FORWARD, _BACKWARD = 2.0, 5.0
_SEQUENCE_FORWARD = _SEQUENCE_BACKWARD = 3.5


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank of one pipeline stage sends in an optimizer step, and besides in an ``iteration`` of ppo.

    gradients: to sum them over the ranks that see other data; weights: to hand on what ZeRO divides; tensor: partial
    sums of layers (those of embedding and logits, about 1 in 4 L, are left out); pipeline: to the neighbouring stages.
    """

    stage: int
    gradients: float
    weights: float
    tensor: float
    pipeline: float
    iteration: float

    @property
    def total(self) -> float:
        """Of an optimizer step."""
        return self.gradients + self.weights + self.tensor + self.pipeline


def traffic_of(setting: Setting) -> tuple[Traffic, ...]:
    """One for every pipeline stage."""
    return tuple(_of_stage(setting, stage) for stage in range(setting.layout.pipeline))


def _of_stage(setting: Setting, stage: int) -> Traffic:
    trained = [model for model in setting.models if model.trained]
    passes = list(setting.learning()) * setting.sizes.gradient_accumulation_steps
    return Traffic(
        stage,
        gradients=sum(_summed(setting, model, stage) for model in trained)
        + sum(_collected(setting, done, stage) for done in passes),
        weights=sum(_updated(setting, model, stage) for model in trained) + sum(_brought(d, stage) for d in passes),
        tensor=sum(_tensor(done, stage) for done in passes),
        pipeline=sum(_pipeline(done, stage) for done in passes),
        iteration=_iteration(setting, stage) if setting.stage == "ppo" else 0.0,
    )


def all_gather(size: float, ranks: int) -> float:
    """Bytes that a rank sends in a ring all-gather to ``size`` bytes, or a reduce-scatter of as many."""
    return (ranks - 1) / ranks * size


def all_reduce(size: float, ranks: int) -> float:
    """The same for a ring all-reduce: a reduce-scatter and an all-gather."""
    return 2 * all_gather(size, ranks)


def _summed(setting: Setting, model: Model, stage: int) -> float:
    """Once a step: gradients over all ranks that see other data; from ZeRO stage 2 on over the owners of each alone.

    The two copies of a tied embedding, at the ends of a pipeline, are summed besides.
    """
    layout, shape = setting.layout, model.shape
    size = _FLOAT32 * model.trained_parameters(layout, stage)
    if layout.sharding_stage < 2:
        sent = all_reduce(size, layout.data * layout.sharding)
    else:
        sent = all_reduce(size / layout.sharding, layout.data)
    is_end = layout.pipeline > 1 and stage in (0, layout.pipeline - 1)
    if is_end and shape.tie_word_embeddings and not model.scores and model.unfrozen is None:
        sent += all_reduce(_FLOAT32 * shape.embedding_parameters(layout.tensor), 2)
    return sent


def _collected(setting: Setting, done: Pass, stage: int) -> float:
    """With every micro-batch, from ZeRO stage 2 on: gradients to their owners (arXiv:1910.02054, section 7)."""
    layout = done.activations.layout
    if layout.sharding_stage < 2:
        return 0.0
    learnt = sum(model.trained_parameters(layout, stage) for model in setting.optimized_with(done.model))
    return all_gather(_FLOAT32 * learnt, layout.sharding)


def _updated(setting: Setting, model: Model, stage: int) -> float:
    """Once a step: updated weights from their owners; in ZeRO stage 3 of what is no layer."""
    layout = setting.layout
    updated = model.trained_parameters(layout, stage)
    if layout.sharding_stage == 3:
        updated -= model.trained_layers(layout, stage) * model.shape.layer_parameters(layout.tensor)
    return all_gather(_FLOAT32 * updated, layout.sharding)


def _brought(done: Pass, stage: int) -> float:
    """With every micro-batch, in ZeRO stage 3: each layer's weights, for a trained one also to go backward."""
    layout, model = done.activations.layout, done.model
    if layout.sharding_stage < 3:
        return 0.0
    times = len(model.layers(layout, stage)) + model.trained_layers(layout, stage)
    return all_gather(_FLOAT32 * times * model.shape.layer_parameters(layout.tensor), layout.sharding)


def _tensor(done: Pass, stage: int) -> float:
    """Partial sums of the layers; frozen ones have no backward pass, recomputed ones a second forward pass."""
    model, activations = done.model, done.activations
    layout = activations.layout
    sequence = layout.sequence_parallel
    forward, backward = (_SEQUENCE_FORWARD, _SEQUENCE_BACKWARD) if sequence else (_FORWARD, _BACKWARD)
    trained = model.trained_layers(layout, stage)
    times = forward * len(model.layers(layout, stage)) + (backward + forward * done.recomputes) * trained
    size = activations.tokens * model.shape.hidden_size * activations.precision.activation
    return times * all_reduce(size, layout.tensor)


def _pipeline(done: Pass, stage: int) -> float:
    """Hidden states to the next stage, their gradient to the previous one, if that or one before it learns."""
    layout = done.activations.layout
    learns = any(done.model.trained_parameters(layout, before) for before in range(stage))
    return ((stage < layout.pipeline - 1) + learns) * done.activations.handed_on


def _iteration(setting: Setting, stage: int) -> float:
    """Once an iteration: the copy that samples, out of the parts (what a rank receives, and on average sends).

    ZeRO stage 3 brings every model's layers together to score, and the actor's to sample.
    """
    layout, actor = setting.layout, setting.models[0]
    sent = 0.0
    if setting.has_copy:
        missing = actor.parameters(setting.rollout_layout, 0) - actor.parameters(layout, stage)
        sent += setting.precision.weight * max(0, missing)
    if layout.sharding_stage == 3:
        layers = sum(model.layer_parameters(layout, stage) for model in (*setting.models, actor))
        sent += all_gather(_FLOAT32 * layers, layout.sharding)
    return sent
