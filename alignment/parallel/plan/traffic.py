"""Bytes that one rank sends: in every optimizer step, and before sampling."""

from __future__ import annotations

from dataclasses import dataclass

from alignment.parallel.plan.models import Model
from alignment.parallel.plan.setting import Pass, Setting

_SUMMED = 4  # bytes: gradients are summed over ranks in float32 buckets
# All-reduces of a layer's [rows, length, H]. Megatron-LM has 2 and 2 (arXiv:1909.08053, section 3); PaddleNLP's
# projections of queries, keys and values, and those to gate and up, each sum the gradient of their own input. Sequence
# parallelism turns one all-reduce into an all-gather and a reduce-scatter, which together send as much, and gathers
# the input of each of the five.
_FORWARD, _BACKWARD = 2.0, 5.0
_SEQUENCE_FORWARD = _SEQUENCE_BACKWARD = 3.5


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank of one pipeline stage sends in an optimizer step; rollout: before sampling, in an iteration.

    gradients: to sum them over the ranks that see other data; weights: to gather what ZeRO divides; tensor: partial
    sums of layers (those of embedding and logits, about 1 in 4 L, are left out); pipeline: to the neighbouring stages.
    """

    stage: int
    gradients: float
    weights: float
    tensor: float
    pipeline: float
    rollout: float

    @property
    def total(self) -> float:
        """Of an optimizer step."""
        return self.gradients + self.weights + self.tensor + self.pipeline


def traffic_of(setting: Setting) -> tuple[Traffic, ...]:
    """One for every pipeline stage."""
    return tuple(
        Traffic(
            stage,
            gradients=sum(_gradients(setting, model, stage) for model in setting.models if model.trained),
            weights=sum(_weights(setting, model, stage) for model in setting.models if model.trained),
            tensor=setting.sizes.gradient_accumulation_steps * sum(_tensor(done, stage) for done in setting.learning()),
            pipeline=setting.sizes.gradient_accumulation_steps
            * sum(_pipeline(done, stage) for done in setting.learning()),
            rollout=_rollout(setting, stage),
        )
        for stage in range(setting.layout.pipeline)
    )


def all_gather(size: float, ranks: int) -> float:
    """Bytes that a rank sends in a ring all-gather to ``size`` bytes, or a reduce-scatter of as many."""
    return (ranks - 1) / ranks * size


def all_reduce(size: float, ranks: int) -> float:
    """The same for a ring all-reduce: a reduce-scatter and an all-gather."""
    return 2 * all_gather(size, ranks)


def _gradients(setting: Setting, model: Model, stage: int) -> float:
    """Reduce-scatter over the sharding ranks, all-reduce of the shard over the others (ZeRO, arXiv:1910.02054, 7).

    From ZeRO stage 2 on no rank keeps whole gradients, so every micro-batch is scattered. The two copies of a tied
    embedding, at the ends of a pipeline, sum theirs besides.
    """
    layout, shape = setting.layout, model.shape
    size = _SUMMED * model.trained_parameters(layout, stage)
    times = setting.sizes.gradient_accumulation_steps if layout.sharding_stage >= 2 else 1
    sent = times * all_gather(size, layout.sharding) + all_reduce(size / layout.sharding, layout.data)
    if not layout.sharding_stage:
        sent = all_reduce(size, layout.data)
    is_end = layout.pipeline > 1 and stage in (0, layout.pipeline - 1)
    if is_end and shape.tie_word_embeddings and not model.scores and model.unfrozen is None:
        sent += all_reduce(_SUMMED * shape.embedding_parameters(layout.tensor), 2)
    return sent


def _weights(setting: Setting, model: Model, stage: int) -> float:
    """ZeRO 1 and 2 gather the new weights; ZeRO 3 gathers all of them for every forward and every backward pass."""
    layout, width = setting.layout, setting.precision.weight
    if layout.sharding_stage == 3:
        times = 2 * setting.sizes.gradient_accumulation_steps
        return times * all_gather(width * model.parameters(layout, stage), layout.sharding)
    return all_gather(width * model.trained_parameters(layout, stage), layout.sharding)


def _tensor(done: Pass, stage: int) -> float:
    """Partial sums of the layers; frozen ones have no backward pass, recomputed ones a second forward pass."""
    model, activations = done.model, done.activations
    layout = activations.layout
    sequence = layout.sequence_parallel
    forward, backward = (_SEQUENCE_FORWARD, _SEQUENCE_BACKWARD) if sequence else (_FORWARD, _BACKWARD)
    trained = model.trained_layers(layout, stage)
    times = forward * len(model.layers(layout, stage)) + (backward + forward * model.recompute) * trained
    size = activations.tokens * model.shape.hidden_size * activations.precision.activation
    return times * all_reduce(size, layout.tensor)


def _pipeline(done: Pass, stage: int) -> float:
    """Hidden states to the next stage, their gradient to the previous one, if that or one before it learns."""
    layout = done.activations.layout
    learns = any(done.model.trained_parameters(layout, before) for before in range(stage))
    return ((stage < layout.pipeline - 1) + learns) * done.activations.boundary


def _rollout(setting: Setting, stage: int) -> float:
    """To build eval_mode's copy out of the parts; without one ZeRO 3 gathers all weights for every token of a batch.

    What a rank receives, and on average sends.
    """
    sizes, layout, width = setting.sizes, setting.layout, setting.precision.weight
    if setting.stage != "ppo":
        return 0.0
    actor = setting.models[0]
    here = actor.parameters(layout, stage)
    held = here / layout.sharding if layout.sharding_stage == 3 else here
    if sizes.eval_mode:
        return max(0.0, width * (actor.parameters(setting.rollout_layout, 0) - held))
    batches = -(-sizes.per_device_prompt_batch_size * sizes.num_return_sequences // sizes.per_device_eval_batch_size)
    return batches * setting.answer_length * width * (here - held)
