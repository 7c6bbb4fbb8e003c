"""Random experience with garbage at padding, for the tests of what reads it."""

from __future__ import annotations

from dataclasses import fields

import numpy as np

from alignment.ppo.experience import Experience


def make_experience(seed: int, prompts: list[int], answers: list[int], garbage: float = 0.0) -> Experience:
    """prompts, answers: tokens of each row; ``garbage`` stands at padding, in floats and, as an integer, in ids."""
    random = np.random.default_rng(seed)
    count, p, t = len(prompts), max(prompts), max(answers)
    prompt_mask = np.arange(p) >= p - np.array(prompts)[:, None]
    response_mask = np.arange(t) < np.array(answers)[:, None]
    filler = int(garbage) if np.isfinite(garbage) else 13

    def real(mask):
        return np.where(mask, random.normal(-1, 1, mask.shape), garbage).astype(np.float32)

    return Experience(
        row=np.arange(count),
        prompt_id=random.integers(0, 9, count),
        prompt_ids=np.where(prompt_mask, random.integers(4, 48, prompt_mask.shape), filler),
        prompt_mask=prompt_mask,
        response_ids=np.where(response_mask, random.integers(4, 48, response_mask.shape), filler),
        response_mask=response_mask,
        finished=random.random(count) < 0.6,
        log_probs=real(response_mask),
        entropy=real(response_mask),
        ref_log_probs=real(response_mask),
        values=real(response_mask),
        scores=random.normal(0, 3, count).astype(np.float32),
    )


def assert_same(first: Experience, second: Experience) -> None:
    for field in fields(Experience):
        x, y = getattr(first, field.name), getattr(second, field.name)
        assert x.dtype == y.dtype, field.name
        np.testing.assert_array_equal(x, y, err_msg=field.name)
