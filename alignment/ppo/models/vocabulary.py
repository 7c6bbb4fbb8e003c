"""Log-probabilities and entropies of a vocabulary that is divided over tensor-parallel processes.

Each holds the logits of V / T consecutive tokens and never sees the others': what travels is a number a row.
"""

from __future__ import annotations

import paddle
import paddle.distributed as dist

from alignment.parallel.collectives import copy_to_tensor_group, sum_over_tensor_group
from alignment.parallel.topology import topology
from alignment.ppo.losses import sum_last_axis


def split_log_probs(logits: paddle.Tensor, ids: paddle.Tensor, temperature: float = 1.0) -> paddle.Tensor:
    """log softmax(logits / temperature)[ids] in float32.

    Args: logits: [n, V / T], this process's columns; ids: int64 [n], of the whole vocabulary.
    Returns: float32 [n], the same on every process of the tensor-parallel group.
    """
    logits = logits.astype("float32") / temperature
    return split_chosen(logits, ids) - _log_sum_exp(logits)


def split_chosen(logits: paddle.Tensor, ids: paddle.Tensor) -> paddle.Tensor:
    """logits[ids], [n], with gradient; arguments as ``split_log_probs``."""
    local, mine = own_columns(ids, logits.shape[-1])
    chosen = paddle.take_along_axis(logits, local.unsqueeze(-1), axis=-1).squeeze(-1)
    return sum_over_tensor_group(paddle.where(mine, chosen, paddle.zeros_like(chosen)))


def own_columns(ids: paddle.Tensor, width: int) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Columns int64 [n] of ids among the ``width`` that are here, any for those elsewhere, and bool [n]: which are."""
    local = ids - topology().tensor_rank * width
    return local.clip(0, width - 1), (local >= 0) & (local < width)


def split_entropy(logits: paddle.Tensor, temperature: float = 1.0) -> paddle.Tensor:
    """Entropy in nats of softmax(logits / temperature), float32 [n]; arguments as ``split_log_probs``.

    log Z, the same everywhere, meets different columns on every process: hence the copy, for its gradient. Logits
    must be finite.
    """
    logits = logits.astype("float32") / temperature
    log_probs = logits - copy_to_tensor_group(_log_sum_exp(logits)).unsqueeze(-1)
    return -sum_over_tensor_group(sum_last_axis(log_probs.exp() * log_probs))


def _log_sum_exp(logits: paddle.Tensor) -> paddle.Tensor:
    largest = logits.detach().max(-1)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=topology().group("tensor"))
    return largest + sum_over_tensor_group(sum_last_axis((logits - largest.unsqueeze(-1)).exp())).log()
