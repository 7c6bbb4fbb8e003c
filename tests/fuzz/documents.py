"""Strategies for JSON documents, as text: valid, mutated and broken."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=-(10**400), max_value=10**400),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["", "null", "true", "\x00", "\ud800", "é" * 50, "-1", "1e999", "{}", "[", "ppo", "a:b", "../x"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
DEEP = st.integers(1, 3000).map(lambda depth: "[" * depth + "]" * depth)


def dump(value: Any) -> str:
    """JSON text; NaN and halves of surrogate pairs stay what they are."""
    return json.dumps(value)


@st.composite
def damaged(draw: st.DrawFn, texts: st.SearchStrategy[str]) -> bytes:
    """A text's bytes with some cut out, put in, or changed."""
    content = bytearray(draw(texts).encode("utf-8", "surrogatepass"))
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(content)))
        end = min(len(content), place + draw(st.integers(0, 10)))
        content[place:end] = draw(st.binary(max_size=6) | st.sampled_from([b'"', b"{", b"]", b",", b"\\", b"\\ud800"]))
    return bytes(content)


@st.composite
def changed(draw: st.DrawFn, objects: st.SearchStrategy[dict], keys: st.SearchStrategy[str]) -> dict[str, Any]:
    """An object with some entries of other values, left out, or new."""
    value = dict(draw(objects))
    for _ in range(draw(st.integers(0, 4))):
        key = draw(keys if not value else st.sampled_from(sorted(value)) | keys)
        if draw(st.booleans()) and key in value:
            del value[key]
        else:
            value[key] = draw(VALUES)
    return value
