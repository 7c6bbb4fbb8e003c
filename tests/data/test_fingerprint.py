"""Samples are told from others by every value and its place."""

from __future__ import annotations

import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data.fingerprint import fingerprint_of

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def test_a_hand_worked_value():
    parts = [b"list 4 ", b"str 5 'ids'", b"<i4(2,)\x01\0\0\0\x02\0\0\0", b"str 3 'n'", b"int 2 -7"]
    wanted = hashlib.sha256(b"".join(parts)).hexdigest()
    assert fingerprint_of([{"ids": np.array([1, 2], "<i4"), "n": -7}]) == wanted


@given(st.lists(VALUES, max_size=4), st.lists(VALUES, max_size=4))
def test_different_exactly_where_the_values_are(one, other):
    assert (fingerprint_of(one) == fingerprint_of(other)) == (_flat(one) == _flat(other))


def _flat(value):
    """A mapping counts as the list of its keys and values."""
    if isinstance(value, dict):
        value = [part for entry in value.items() for part in entry]
    return [_flat(part) for part in value] if isinstance(value, list) else repr(value)


def test_arrays_by_type_shape_and_values():
    arrays = [np.zeros(4, "<i4"), np.zeros((2, 2), "<i4"), np.zeros(4, "<f4"), np.array([0, 0, 0, 1], "<i4")]
    assert len({fingerprint_of([array]) for array in arrays}) == 4
    assert fingerprint_of([arrays[0], arrays[0]]) != fingerprint_of([np.zeros(8, "<i4")])


def test_objects_count_by_their_type():
    assert fingerprint_of([object()]) == fingerprint_of([object()]) != fingerprint_of([set()])
