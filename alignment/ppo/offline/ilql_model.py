"""A policy with ILQL's heads (Snell et al. 2022, arXiv:2206.11871) beside the language-model head on the last stage.

They are saved in a file of their own, in which matrices are [in, out] as Paddle has them.
"""

from __future__ import annotations

from pathlib import Path

import paddle
from paddle import nn

from alignment.ppo.losses import log_probs_from_logits
from alignment.ppo.models.placement import Placement, merged, own_slice, split_axis
from alignment.ppo.models.policy import Packed, before_targets, target_log_probs
from alignment.ppo.models.saving import ILQL_HEADS
from alignment.ppo.models.vocabulary import split_chosen, split_log_probs
from alignment.ppo.models.weights import WeightFiles, is_writer
from alignment.ppo.offline.ilql_heads import IlqlHeads
from alignment.ppo.offline.ilql_losses import ActionValues
from alignment.ppo.rollout.protocol import AdjustLogits
from alignment.runtime.faults import UsageError
from alignment.runtime.files import Files

HEADS_FILE = "ilql_heads.safetensors"


class HeadFiles(WeightFiles):
    """The heads in a model directory."""

    single, index = HEADS_FILE, f"{HEADS_FILE}.index.json"


def add_heads(policy: nn.Layer, seed: int, directory: Path | None = None) -> None:
    """Give the policy ``ilql_heads``, a sublayer on its last stage, all but the targets to be trained.

    They are what ``save_heads`` wrote into ``directory``, or new ones where there is nothing. Comes after
    ``set_trainable_layers`` or ``add_adapters``, which choose among the policy's own parameters.

    Raises: UsageError if the stored heads are for another model.
    """
    if not policy.placement.is_last:
        return
    is_split = bool(policy.lm_head.weight.is_distributed)
    columns = policy.config.vocab_size // (policy.placement.tensor if is_split else 1)
    heads = IlqlHeads(policy.config.hidden_size, columns, is_split)
    if directory is not None and (directory / HEADS_FILE).is_file():
        _read_heads(heads, HeadFiles(directory), policy.placement)
    else:
        heads.initialize(seed)
    setattr(policy, ILQL_HEADS, heads)


def save_heads(policy: nn.Layer, files: Files) -> None:
    """Add the heads, whole, to the weights that ``collect_model`` adds. Every process of the job calls it.

    Who loads the policy does not see them: they stand in a file of their own.
    """
    if not policy.placement.is_last:
        return
    parameters = policy.ilql_heads.named_parameters()
    weights = {name: merged(value.detach(), split_axis(value)) for name, value in parameters}
    if is_writer():
        files.add_tensors(HEADS_FILE, {name: value.contiguous().cpu() for name, value in weights.items()})


def _read_heads(heads: IlqlHeads, files: HeadFiles, placement: Placement) -> None:
    file, parameters = files.directory / HEADS_FILE, dict(heads.named_parameters())
    differing = parameters.keys() ^ files.names()
    if differing:
        raise UsageError(f"{file}: {min(differing)} is in the file or in the model, but not in both")
    for name, parameter in parameters.items():
        value = own_slice(files.read(name), parameter, placement)
        if value.shape != parameter.shape:
            raise UsageError(f"{file}: {name} has shape {value.shape}, the model needs {parameter.shape}")
        parameter.set_value(value)


def action_values(
    policy: nn.Layer, hidden: paddle.Tensor, packed: Packed, response_mask: paddle.Tensor
) -> ActionValues:
    """What policy and heads say about every answer token. Logits exist for these positions alone, never [B, L, V],
    and of the target heads only the column of the token.

    Args: hidden: final hidden states [B, L, H] of ``packed``, from ``pack_responses``; response_mask: bool [B, T].
    """
    heads, split = policy.ilql_heads, policy.lm_head.weight.is_distributed
    states = before_targets(hidden, packed).astype("float32")
    tokens = paddle.masked_select(packed.input_ids[:, 1:], packed.target_mask[:, 1:])
    logits = [head(states) for head in heads.q]
    with paddle.no_grad():
        target_q = paddle.minimum(*(head.of_tokens(states, tokens) for head in heads.target_q))
    flat = [
        target_log_probs(policy, hidden, packed),
        *((split_chosen if split else _chosen)(q, tokens) for q in logits),
        *((split_log_probs if split else log_probs_from_logits)(q, tokens) for q in logits),
        target_q,
        heads.values(states),
    ]
    where, shape = paddle.nonzero(response_mask), response_mask.shape
    return ActionValues(*(paddle.scatter_nd(where, x, shape) for x in flat))


def _chosen(logits: paddle.Tensor, tokens: paddle.Tensor) -> paddle.Tensor:
    return paddle.take_along_axis(logits, tokens.unsqueeze(-1), axis=-1).squeeze(-1)


def advantage_shift(policy: nn.Layer, beta: float) -> AdjustLogits:
    """For ``adjust_logits`` of a rollout engine: the policy softmax(log pi + beta (min Q_target - V)).

    The normaliser of log pi is the same for all tokens of a state and so changes nothing; neither does V, but it keeps
    the sum near the logits, where rounding is small.
    """

    def adjust(hidden: paddle.Tensor, logits: paddle.Tensor) -> paddle.Tensor:
        """Args: hidden: final [n, H]; logits: float32 [n, columns here]. Returns: logits."""
        return logits + beta * policy.ilql_heads.advantages(hidden)

    return adjust
