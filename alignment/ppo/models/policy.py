"""The forward pass of any PaddleNLP Llama or Qwen2 model, and what a language-model head makes of its result.

A forward pass has two halves: ``hidden_states`` runs the layers that are here, whatever part of the model that is (see
alignment.parallel.pipeline), and the functions on final hidden states belong to the last stage.
"""
from __future__ import annotations

from functools import partial
from typing import NamedTuple

import paddle
from paddle.distributed.fleet.utils.sequence_parallel_utils import GatherOp

from alignment.parallel.collectives import copy_to_tensor_group
from alignment.parallel.pipeline import Pipeline
from alignment.parallel.topology import topology
from alignment.ppo.losses import entropy_from_logits, log_probs_from_logits
from alignment.ppo.models.vocabulary import split_entropy, split_log_probs


class Packed(NamedTuple):
    """Rows with their real tokens side by side from the left; targets are the tokens to predict."""

    input_ids: paddle.Tensor  # int64 [B, L]
    attention_mask: paddle.Tensor  # bool [B, L]
    target_mask: paddle.Tensor  # bool [B, L]


def trunk(model: paddle.nn.Layer) -> paddle.nn.Layer:
    """The transformer below the language-model head (PaddleNLP names it after the family: ``llama``, ``qwen2``)."""
    return getattr(model, model.base_model_prefix)


def position_ids_of(attention_mask: paddle.Tensor) -> paddle.Tensor:
    """int64 [B, L]: positions that count real tokens only, so left padding changes nothing."""
    return (attention_mask.astype("int64").cumsum(-1) - 1).clip(min=0)


def hidden_states(
    model: paddle.nn.Layer,
    input_ids: paddle.Tensor,
    attention_mask: paddle.Tensor,
    received: paddle.Tensor | None = None,
) -> paddle.Tensor:
    """Hidden states [B, L, H] after the layers that are here; the final ones where the last layer is.

    Args: input_ids int64 [B, L], attention_mask bool [B, L]; received: what the stage before gave, [B, L, H].
    """
    if model.placement.sequence_parallel:
        return _hidden_states_by_tokens(model, input_ids, attention_mask, received)
    return trunk(model)(
        input_ids=input_ids if received is None else None,
        inputs_embeds=received,
        attention_mask=attention_mask,
        position_ids=position_ids_of(attention_mask),
        use_cache=False,
        return_dict=False,
    )[0]


def _hidden_states_by_tokens(
    model: paddle.nn.Layer, input_ids: paddle.Tensor, attention_mask: paddle.Tensor, received: paddle.Tensor | None
) -> paddle.Tensor:
    """``hidden_states`` under sequence parallelism: between matrix products every process has some of the tokens."""
    batch, length = input_ids.shape
    extra = -length % model.placement.tensor  # the tokens must divide evenly: a little padding on the right
    input_ids, mask, received = (
        x if x is None else paddle.concat([x, paddle.zeros([batch, extra, *x.shape[2:]], dtype=x.dtype)], axis=1)
        for x in (input_ids, attention_mask.astype("int64"), received)
    )
    hidden = trunk(model)(
        input_ids=input_ids if received is None else None,
        inputs_embeds=received,
        attention_mask=mask.astype("bool"),
        position_ids=position_ids_of(mask),
        use_cache=False,
        return_dict=False,
    )[0]
    return GatherOp.apply(hidden).reshape([batch, length + extra, -1])[:, :length]


def passes_of(model: paddle.nn.Layer) -> Pipeline:
    """Forward and backward passes of a model of which this process may have a part."""
    if topology().layout.sharding_stage == 3:  # which computes a layer again by itself, in step with other processes
        for layer in model.sublayers(include_self=True):
            layer.enable_recompute = False
    return Pipeline(model, partial(hidden_states, model), trunk(model).layers)


def language_model_head(model: paddle.nn.Layer, hidden: paddle.Tensor) -> paddle.Tensor:
    """Logits [..., V] from final hidden states [..., H]; of this process's part of a divided vocabulary."""
    head = model.lm_head
    if head.weight.is_distributed:
        hidden = copy_to_tensor_group(hidden)
    return paddle.matmul(hidden, head.weight, transpose_y=head.transpose_y)


def pack(input_ids: paddle.Tensor, attention_mask: paddle.Tensor, target_mask: paddle.Tensor) -> Packed:
    """Rows without padding between their tokens, [B, longest row]: padding inside a row would cost time.

    Args: int64 [B, L], bool [B, L], bool [B, L]. The order of the tokens, and so of the targets, stays.
    """
    width = int(attention_mask.astype("int64").sum(-1).max())
    order = paddle.argsort(attention_mask.astype("int64"), axis=1, descending=True, stable=True)[:, :width]
    columns = (input_ids, attention_mask.astype("int64"), target_mask.astype("int64"))
    ids, mask, targets = (paddle.take_along_axis(column, order, axis=1) for column in columns)
    return Packed(ids, mask.astype("bool"), targets.astype("bool"))


def pack_responses(
    input_ids: paddle.Tensor, attention_mask: paddle.Tensor, response_mask: paddle.Tensor
) -> Packed:
    """As ``pack``, the targets being the answers' tokens.

    Args: int64 [B, P + T], prompts left-padded to P, answers right-padded to T; bool alike; response_mask bool [B, T].
    """
    batch, length = input_ids.shape
    before = paddle.zeros([batch, length - response_mask.shape[1]], dtype="bool")
    return pack(input_ids, attention_mask, paddle.concat([before, response_mask], axis=1))


def before_targets(states: paddle.Tensor, packed: Packed) -> paddle.Tensor:
    """Of per-token states [B, L, ...], those one place before each target, [n, ...] in row-major order.

    A target in the first column, which nothing precedes, is left out.
    """
    wanted = paddle.nonzero(packed.target_mask[:, 1:].flatten()).squeeze(-1)
    states = states[:, :-1]
    return paddle.gather(states.reshape([-1, *states.shape[2:]]), wanted)


def target_log_probs(
    model: paddle.nn.Layer, hidden: paddle.Tensor, packed: Packed, temperature: float = 1.0
) -> paddle.Tensor:
    """float32 [n]: log-probabilities of the targets. Logits exist for these alone, never for [B, L, V].

    Args: hidden: final hidden states [B, L, H] of ``packed``; temperature: logits are divided by it, as in sampling.
    """
    return _log_probs(*_target_logits(model, hidden, packed), temperature, model.lm_head.weight.is_distributed)


def response_log_probs(
    model: paddle.nn.Layer,
    hidden: paddle.Tensor,
    packed: Packed,
    response_mask: paddle.Tensor,
    temperature: float = 1.0,
    train_entropy: bool = False,
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Log-probability and entropy (nats) of every answer token, both float32 [B, T], 0 outside ``response_mask``.

    Args:
        hidden, temperature: as in ``target_log_probs``; packed: from ``pack_responses``.
        response_mask: bool [B, T], True at answer tokens.
        train_entropy: whether a gradient flows through the entropy; a bonus needs it, a metric does not.
    """
    split = model.lm_head.weight.is_distributed
    logits, targets = _target_logits(model, hidden, packed)
    with paddle.set_grad_enabled(train_entropy and paddle.is_grad_enabled()):
        entropy = (split_entropy if split else entropy_from_logits)(logits, temperature)
    chosen = _log_probs(logits, targets, temperature, split)
    where, shape = paddle.nonzero(response_mask), response_mask.shape
    return paddle.scatter_nd(where, chosen, shape), paddle.scatter_nd(where, entropy, shape)


def _target_logits(
    model: paddle.nn.Layer, hidden: paddle.Tensor, packed: Packed
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Logits [n, V] (or [n, V / T]) that predict the targets, and the targets int64 [n]."""
    wanted = paddle.nonzero(packed.target_mask[:, 1:].flatten()).squeeze(-1)
    logits = language_model_head(model, before_targets(hidden, packed))
    return logits, paddle.gather(packed.input_ids[:, 1:].flatten(), wanted)


def _log_probs(logits: paddle.Tensor, targets: paddle.Tensor, temperature: float, split: bool) -> paddle.Tensor:
    return (split_log_probs if split else log_probs_from_logits)(logits, targets, temperature)
