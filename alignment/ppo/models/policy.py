"""The policy's forward pass: log-probabilities of given answers, for any PaddleNLP Llama or Qwen2 causal model."""
from __future__ import annotations

import paddle

from alignment.ppo.losses import entropy_from_logits, log_probs_from_logits


def trunk(model: paddle.nn.Layer) -> paddle.nn.Layer:
    """The transformer below the language-model head (PaddleNLP names it after the family: ``llama``, ``qwen2``)."""
    return getattr(model, model.base_model_prefix)


def language_model_head(model: paddle.nn.Layer, hidden: paddle.Tensor) -> paddle.Tensor:
    """Logits [..., V] from final hidden states [..., H]."""
    return model.lm_head(hidden.unsqueeze(0)).squeeze(0) if hidden.ndim == 2 else model.lm_head(hidden)


def position_ids_of(attention_mask: paddle.Tensor) -> paddle.Tensor:
    """int64 [B, L]: positions that count real tokens only, so left padding changes nothing."""
    return (attention_mask.astype("int64").cumsum(-1) - 1).clip(min=0)


def hidden_states(model: paddle.nn.Layer, input_ids: paddle.Tensor, attention_mask: paddle.Tensor) -> paddle.Tensor:
    """Final hidden states [B, L, H] of a padded batch; input_ids int64 [B, L], attention_mask bool [B, L]."""
    return trunk(model)(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids_of(attention_mask),
        use_cache=False,
        return_dict=False,
    )[0]


def pack(
    input_ids: paddle.Tensor, attention_mask: paddle.Tensor, target_mask: paddle.Tensor
) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
    """Rows with their real tokens side by side from the left, [B, longest row]; padding inside a row would cost time.

    Args: int64 [B, L], bool [B, L], bool [B, L]. The order of the tokens, and so of the targets, stays.
    """
    width = int(attention_mask.astype("int64").sum(-1).max())
    order = paddle.argsort(attention_mask.astype("int64"), axis=1, descending=True, stable=True)[:, :width]
    columns = (input_ids, attention_mask.astype("int64"), target_mask.astype("int64"))
    ids, mask, targets = (paddle.take_along_axis(column, order, axis=1) for column in columns)
    return ids, mask.astype("bool"), targets.astype("bool")


def target_logits(
    model: paddle.nn.Layer, input_ids: paddle.Tensor, attention_mask: paddle.Tensor, target_mask: paddle.Tensor
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Logits for the marked tokens only: they exist for these alone, never for [B, L, V].

    Args:
        input_ids: int64 [B, L]; attention_mask: bool [B, L].
        target_mask: bool [B, L], True at the n tokens to predict; column 0, which nothing precedes, is left out.
    Returns: logits [n, V] that predict them and the tokens int64 [n], in row-major order of ``target_mask``.
    """
    input_ids, attention_mask, target_mask = pack(input_ids, attention_mask, target_mask)
    hidden = hidden_states(model, input_ids, attention_mask)[:, :-1]
    wanted = paddle.nonzero(target_mask[:, 1:].flatten()).squeeze(-1)
    hidden = paddle.gather(hidden.reshape([-1, hidden.shape[-1]]), wanted)
    return language_model_head(model, hidden), paddle.gather(input_ids[:, 1:].flatten(), wanted)


def target_log_probs(
    model: paddle.nn.Layer,
    input_ids: paddle.Tensor,
    attention_mask: paddle.Tensor,
    target_mask: paddle.Tensor,
    temperature: float = 1.0,
    train_entropy: bool = False,
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Log-probability and entropy at the marked tokens; arguments as ``target_logits``.

    Args:
        temperature: logits are divided by it, as in sampling.
        train_entropy: whether a gradient flows through the entropy; a bonus needs it, a metric does not.
    Returns: log_probs float32 [n] and entropy float32 [n] in nats.
    """
    logits, targets = target_logits(model, input_ids, attention_mask, target_mask)
    with paddle.set_grad_enabled(train_entropy and paddle.is_grad_enabled()):
        entropy = entropy_from_logits(logits, temperature)
    return log_probs_from_logits(logits, targets, temperature), entropy


def response_targets(input_ids: paddle.Tensor, response_mask: paddle.Tensor) -> paddle.Tensor:
    """bool [B, P + T] that marks the answer tokens among input_ids [B, P + T]; response_mask bool [B, T]."""
    batch, length = input_ids.shape
    before = paddle.zeros([batch, length - response_mask.shape[1]], dtype="bool")
    return paddle.concat([before, response_mask], axis=1)


def response_log_probs(
    model: paddle.nn.Layer,
    input_ids: paddle.Tensor,
    attention_mask: paddle.Tensor,
    response_mask: paddle.Tensor,
    temperature: float = 1.0,
    train_entropy: bool = False,
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Log-probability and entropy of every answer token.

    Args:
        input_ids: int64 [B, P + T], prompts left-padded to P, answers right-padded to T; attention_mask: bool alike.
        response_mask: bool [B, T], True at answer tokens.
        temperature, train_entropy: as in ``target_log_probs``.
    Returns: log_probs and entropy, both float32 [B, T], 0 outside ``response_mask``.
    """
    target_mask = response_targets(input_ids, response_mask)
    chosen, entropy = target_log_probs(model, input_ids, attention_mask, target_mask, temperature, train_entropy)
    where = paddle.nonzero(response_mask)
    shape = response_mask.shape
    return paddle.scatter_nd(where, chosen, shape), paddle.scatter_nd(where, entropy, shape)
