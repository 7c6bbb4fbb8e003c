"""Telling finite tensors from others; what is done about it stands in tests/test_nonfinite.py."""

from __future__ import annotations

import math

import paddle
import pytest

from alignment.training.nonfinite import _is_finite

CASES = [
    ([1.0, -2.0, 0.0], True),
    ([3e38] * 9, True),  # their sum is not
    ([1.0, math.nan], False),
    ([1.0, math.inf, -math.inf], False),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("values", "finite"), CASES)
def test_finite(values, finite, dtype):
    assert _is_finite(paddle.to_tensor(values).astype(dtype)) is finite
