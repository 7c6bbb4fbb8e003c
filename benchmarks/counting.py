"""How many tokens an engine really gave."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np


def useful_lengths(response_ids: np.ndarray, eos_token_ids: Collection[int]) -> np.ndarray:
    """int64 [N]: tokens of each answer up to and including its first EOS, all T where there is none.

    Args: response_ids: int [N, T], what was generated, with anything after EOS; eos_token_ids: ids that end an answer.
    """
    is_end = np.isin(response_ids, list(eos_token_ids))
    first = is_end.argmax(axis=1) + 1
    return np.where(is_end.any(axis=1), first, response_ids.shape[1]).astype(np.int64)


def pad_left(prompts: Collection[Collection[int]], pad_token_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int64 [N, L] with every prompt at the right edge, and their mask int64 [N, L], 1 for prompt tokens."""
    width = max(map(len, prompts))
    ids = np.full([len(prompts), width], pad_token_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return ids, mask
