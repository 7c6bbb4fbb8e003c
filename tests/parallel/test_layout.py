"""Degrees from arguments, and who owns what."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from alignment.parallel.layout import Layout, resolve_layout
from alignment.parallel.sharding import assign_owners
from alignment.runtime.faults import UsageError

DEFAULTS = {
    "tensor_parallel_degree": -1,
    "pipeline_parallel_degree": -1,
    "sharding_parallel_degree": -1,
    "sharding_degree": -1,
    "sharding": "",
    "sequence_parallel": False,
}
degrees = st.integers(1, 4)


@given(degrees, degrees, degrees, degrees)
def test_data_parallelism_takes_what_is_left(data, pipeline, sharding, tensor):
    assume(sharding > 1)
    values = DEFAULTS | {
        "tensor_parallel_degree": tensor,
        "pipeline_parallel_degree": pipeline,
        "sharding_parallel_degree": sharding,
        "sharding": "stage1",
    }
    layout = resolve_layout(values, data * pipeline * sharding * tensor)
    assert layout == Layout(data, pipeline, sharding, tensor, 1)
    assert layout.processes == data * pipeline * sharding * tensor


@pytest.mark.parametrize(
    ("changes", "processes", "expected"),
    [
        ({}, 1, Layout()),
        ({}, 6, Layout(data=6)),
        ({"sharding": "stage2"}, 6, Layout(sharding=6, sharding_stage=2)),
        ({"sharding": "stage3", "sharding_parallel_degree": 2}, 6, Layout(data=3, sharding=2, sharding_stage=3)),
        ({"sharding": "stage1", "sharding_degree": 3}, 6, Layout(data=2, sharding=3, sharding_stage=1)),
        ({"sharding": "stage1", "tensor_parallel_degree": 6}, 6, Layout(tensor=6)),  # nothing is left to shard over
        ({"tensor_parallel_degree": 2, "sequence_parallel": True}, 2, Layout(tensor=2, sequence_parallel=True)),
    ],
)
def test_layouts(changes, processes, expected):
    assert resolve_layout(DEFAULTS | changes, processes) == expected


@pytest.mark.parametrize(
    ("changes", "processes", "words"),
    [
        ({"tensor_parallel_degree": 3}, 4, "= 3 must divide .* are 4; start a multiple of 3"),
        ({"tensor_parallel_degree": 2}, 1, "start a multiple of 2"),
        ({"pipeline_parallel_degree": 2, "sharding": "stage3"}, 4, '"stage3" does not go with .* use "stage1"'),
        ({"sharding": "stage1", "sharding_parallel_degree": 4}, 6, '"sharding_parallel_degree": 4 must divide the 6'),
        ({"sharding_parallel_degree": 2}, 2, 'needs "sharding": "stage1"'),
        ({"sharding": "stage1 offload"}, 2, '"sharding": "stage1 offload" must be one of'),
        ({"tensor_parallel_degree": 0}, 2, '"tensor_parallel_degree": 0 must be at least 1, or -1'),
        ({"sharding": "stage1", "sharding_degree": -2}, 2, '"sharding_degree": -2 must be'),
        ({"sequence_parallel": True}, 2, '"sequence_parallel": true needs "tensor_parallel_degree"'),
    ],
)
def test_what_cannot_work(changes, processes, words):
    with pytest.raises(UsageError, match=words):
        resolve_layout(DEFAULTS | changes, processes)


@given(st.lists(st.integers(0, 1000), max_size=40), st.integers(1, 8))
def test_owners_have_about_as_much(sizes, members):
    owners = assign_owners(sizes, members)
    loads = [sum(size for size, owner in zip(sizes, owners, strict=True) if owner == m) for m in range(members)]
    assert len(owners) == len(sizes) and all(0 <= owner < members for owner in owners)
    assert max(loads) - min(loads) <= max(sizes, default=0)
