"""A policy with ILQL's heads (Snell et al. 2022, arXiv:2206.11871) beside the language-model head on the last stage.

They are saved in a file of their own, in which matrices are [in, out] as Paddle has them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import paddle
from paddle import nn
from safetensors.paddle import save_file

from alignment.ppo.losses import log_probs_from_logits
from alignment.ppo.models.placement import merged, own_slice, split_axis
from alignment.ppo.models.policy import Packed, before_targets, target_log_probs, trunk
from alignment.ppo.models.vocabulary import split_chosen, split_log_probs
from alignment.ppo.models.weights import WeightFiles, is_writer
from alignment.ppo.offline.ilql_heads import IlqlHeads
from alignment.ppo.offline.ilql_losses import ActionValues
from alignment.runtime.faults import UsageError

HEADS_FILE = "ilql_heads.safetensors"


class HeadFiles(WeightFiles):
    """The heads in a model directory."""

    single, index = HEADS_FILE, f"{HEADS_FILE}.index.json"


class IlqlPolicy(nn.Layer):
    """This process's part of a causal language model and, on the last stage, ``heads``.

    It stands for the policy wherever one is trained or sampled from. ``set_trainable_layers`` and ``add_adapters`` are
    for the policy, before it comes here; all heads but the targets are trained.
    """

    base_model_prefix = "trunk"

    def __init__(self, policy: nn.Layer) -> None:
        super().__init__()
        self.policy, self.config = policy, policy.config
        self.placement, self.ties_ends = policy.placement, policy.ties_ends
        if self.placement.is_last:
            is_split = bool(policy.lm_head.weight.is_distributed)
            columns = self.config.vocab_size // (self.placement.tensor if is_split else 1)
            self.heads = IlqlHeads(self.config.hidden_size, columns, is_split)

    @property
    def trunk(self) -> nn.Layer:
        """The transformer."""
        return trunk(self.policy)

    @property
    def lm_head(self) -> nn.Layer:
        """The language-model head; only on the last stage."""
        return self.policy.lm_head


def add_heads(policy: nn.Layer, seed: int, directory: Path | None = None) -> IlqlPolicy:
    """The policy with the heads that ``directory`` has (see ``save_heads``); without them, new ones.

    Raises: UsageError if those are for another model.
    """
    model = IlqlPolicy(policy)
    stored = directory is not None and (directory / HEADS_FILE).is_file()
    if model.placement.is_last:
        if stored:
            _read_heads(model, HeadFiles(directory))
        else:
            model.heads.initialize(seed)
    return model


def save_heads(model: IlqlPolicy, directory: Path) -> None:
    """Write the heads, whole, beside the weights that ``save_model(model.policy, ...)`` writes.

    Every process calls it. Who loads the policy does not see them: they stand in a file of their own.
    """
    if not model.placement.is_last:
        return
    weights = {name: merged(p.detach(), split_axis(p)).contiguous() for name, p in model.heads.named_parameters()}
    if is_writer():
        path = directory / HEADS_FILE
        save_file({name: value.cpu() for name, value in weights.items()}, str(path))
        path.chmod(0o644)  # safetensors creates 0600


def _read_heads(model: IlqlPolicy, files: HeadFiles) -> None:
    parameters = dict(model.heads.named_parameters())
    differing = parameters.keys() ^ files.names()
    if differing:
        raise UsageError(f"{files.directory / HEADS_FILE}: {min(differing)} is in the file or the model, not in both")
    for name, parameter in parameters.items():
        value = own_slice(files.read(name), parameter, model.placement)
        if value.shape != parameter.shape:
            raise UsageError(f"{files.directory / HEADS_FILE}: {name} has shape {value.shape}, not {parameter.shape}")
        parameter.set_value(value)


def action_values(
    model: IlqlPolicy, hidden: paddle.Tensor, packed: Packed, response_mask: paddle.Tensor
) -> ActionValues:
    """What policy and heads say about every answer token. Logits exist for these positions alone, never [B, L, V],
    and of the target heads only the column of the token.

    Args: hidden: final hidden states [B, L, H] of ``packed``, from ``pack_responses``; response_mask: bool [B, T].
    """
    heads, split = model.heads, model.lm_head.weight.is_distributed
    states = before_targets(hidden, packed).astype("float32")
    tokens = paddle.masked_select(packed.input_ids[:, 1:], packed.target_mask[:, 1:])
    logits = [head(states) for head in heads.q]
    with paddle.no_grad():
        target_q = paddle.minimum(*(head.of_tokens(states, tokens) for head in heads.target_q))
    flat = [
        target_log_probs(model, hidden, packed),
        *((split_chosen if split else _chosen)(q, tokens) for q in logits),
        *((split_log_probs if split else log_probs_from_logits)(q, tokens) for q in logits),
        target_q,
        heads.values(states),
    ]
    where, shape = paddle.nonzero(response_mask), response_mask.shape
    return ActionValues(*(paddle.scatter_nd(where, x, shape) for x in flat))


def _chosen(logits: paddle.Tensor, tokens: paddle.Tensor) -> paddle.Tensor:
    return paddle.take_along_axis(logits, tokens.unsqueeze(-1), axis=-1).squeeze(-1)


def advantage_shift(model: IlqlPolicy, beta: float) -> Callable[[paddle.Tensor, paddle.Tensor], paddle.Tensor]:
    """For ``adjust_logits`` of a rollout engine: the policy softmax(log pi + beta (min Q_target - V)).

    The normaliser of log pi is the same for all tokens of a state and so changes nothing; neither does V, but it keeps
    the sum near the logits, where rounding is small.
    """

    def adjust(hidden: paddle.Tensor, logits: paddle.Tensor) -> paddle.Tensor:
        """Args: hidden: final [n, H]; logits: float32 [n, columns here]. Returns: logits."""
        return logits + beta * model.heads.advantages(hidden)

    return adjust
