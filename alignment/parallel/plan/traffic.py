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
    return tuple(_of_stage(setting, stage) for stage in range(setting.layout.pipeline))


def _of_stage(setting: Setting, stage: int) -> Traffic:
    trained = [model for model in setting.models if model.trained]
    passes = list(setting.learning()) * setting.sizes.gradient_accumulation_steps
    return Traffic(
        stage,
        gradients=sum(_gradients(setting, model, stage) for model in trained),
        weights=sum(_weights(setting, model, stage) for model in trained),
        tensor=sum(_tensor(done, stage) for done in passes),
        pipeline=sum(_pipeline(done, stage) for done in passes),
        rollout=_rollout(setting, stage),
    )


def all_gather(size: float, ranks: int) -> float:
    """Bytes that a rank sends in a ring all-gather to ``size`` bytes, or a reduce-scatter of as many."""
    return (ranks - 1) / ranks * size


def all_reduce(size: float, ranks: int) -> float:
    """The same for a ring all-reduce: a reduce-scatter and an all-gather."""
    return 2 * all_gather(size, ranks)


def _gradients(setting: Setting, model: Model, stage: int) -> float:
    """All-reduce over all ranks that see other data; from ZeRO stage 2 on every micro-batch goes to the owners only.

    The owners of a shard, one in each data-parallel replica, then sum theirs (arXiv:1910.02054, section 7). The two
    copies of a tied embedding, at the ends of a pipeline, are summed besides.
    """
    layout, shape = setting.layout, model.shape
    size = _FLOAT32 * model.trained_parameters(layout, stage)
    if layout.sharding_stage < 2:
        sent = all_reduce(size, layout.data * layout.sharding)
    else:
        to_owners = all_gather(size, layout.sharding) * setting.sizes.gradient_accumulation_steps
        sent = to_owners + all_reduce(size / layout.sharding, layout.data)
    is_end = layout.pipeline > 1 and stage in (0, layout.pipeline - 1)
    if is_end and shape.tie_word_embeddings and not model.scores and model.unfrozen is None:
        sent += all_reduce(_FLOAT32 * shape.embedding_parameters(layout.tensor), 2)
    return sent


def _weights(setting: Setting, model: Model, stage: int) -> float:
    """ZeRO 1 and 2 hand on the updated weights; ZeRO 3 gathers all of them for every forward and backward pass."""
    layout = setting.layout
    if layout.sharding_stage < 3:
        return all_gather(_FLOAT32 * model.trained_parameters(layout, stage), layout.sharding)
    times = 2 * setting.sizes.gradient_accumulation_steps
    return times * all_gather(setting.precision.weight * model.parameters(layout, stage), layout.sharding)


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
    return ((stage < layout.pipeline - 1) + learns) * done.activations.handed_on


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
