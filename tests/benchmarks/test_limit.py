"""The machine's limit, by numbers that can be followed by hand."""

from __future__ import annotations

import pytest

from benchmarks.limit import Limit

# 1000 parameters: a step reads 4000 bytes in 4 s and multiplies 2000 flops a row in 0.5 s; 8 rows take as long
MACHINE = Limit(bytes_per_s=1000.0, flops_per_s=4000.0, body=900, head=100)


def test_few_rows_wait_for_the_weights():
    # prefill: 2 * (900 * 10 + 100) / 4000 = 4.55 s; then 4 steps of 4 s
    assert MACHINE.seconds([10], [5]) == pytest.approx(4.55 + 16)
    assert MACHINE.tokens_per_s([10], [5]) == pytest.approx(5 / 20.55)


def test_many_rows_wait_for_the_products():
    # prefill: 2 * (900 * 16 + 100 * 16) / 4000 = 8 s; then 16 * 4 tokens at 0.5 s, more than 4 steps of 4 s
    assert MACHINE.seconds([1] * 16, [5] * 16) == pytest.approx(8 + 32)


def test_both_bounds_meet_where_they_should():
    reading, multiplying = MACHINE.seconds([1] * 7, [3] * 7), MACHINE.seconds([1] * 9, [3] * 9)
    assert reading == pytest.approx(7 * 0.5 + 2 * 4)
    assert multiplying == pytest.approx(9 * 0.5 + 2 * 9 * 0.5)


def test_answers_of_unlike_length_are_bound_by_the_longest_or_by_the_sum():
    assert MACHINE.seconds([1, 1], [1, 9]) == pytest.approx(2 * 0.5 + 8 * 4)
    assert MACHINE.seconds([1] * 40, [2] * 39 + [3]) == pytest.approx(40 * 0.5 + 41 * 0.5)


def test_first_token_comes_from_the_prefill():
    assert MACHINE.seconds([3], [1]) == pytest.approx(2 * (900 * 3 + 100) / 4000)


def test_sixteen_bits_halve_the_reading_only():
    halves = Limit(1000.0, 4000.0, 900, 100, bytes_per_parameter=2)
    assert halves.seconds([1], [3]) == pytest.approx(0.5 + 2 * 2)
    assert halves.seconds([1] * 16, [5] * 16) == pytest.approx(8 + 32)
