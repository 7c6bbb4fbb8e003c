"""The pipeline's schedule: every stage does the right passes in an order in which nobody waits forever."""

from __future__ import annotations

import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.parallel import pipeline, topology
from alignment.parallel.layout import Layout
from alignment.parallel.pipeline import MicroBatch, Pipeline
from alignment.parallel.topology import Topology

IDS, MASK = paddle.zeros([1, 2], dtype="int64"), paddle.ones([1, 2], dtype="bool")


class Stage(paddle.nn.Layer):
    """Multiplies by its weight."""

    class config:  # noqa: N801 (as PaddleNLP's models have it)
        dtype, hidden_size = "float32", 3

    def __init__(self, trained: bool) -> None:
        super().__init__()
        self.weight = self.create_parameter([1], default_initializer=paddle.nn.initializer.Constant(2.0))
        self.weight.stop_gradient = not trained


def events_of(stages: int, stage: int, count: int, trained: list[bool], monkeypatch) -> tuple[list, Stage, list]:
    """What a stage does, in order: ("run", n), ("send" or "receive", direction); its model and its reports."""
    place = Topology(Layout(pipeline=stages), stage=stage)
    monkeypatch.setattr(topology, "_current", place)
    monkeypatch.setattr(pipeline, "gather_objects", lambda item, group: trained)
    monkeypatch.setattr(pipeline, "from_head", lambda item: item)
    events: list[tuple[str, int]] = []

    def receive(shape, dtype, direction):
        events.append(("receive", direction))
        return paddle.ones(shape, dtype=dtype)

    monkeypatch.setattr(pipeline, "receive", receive)
    monkeypatch.setattr(pipeline, "send", lambda tensor, direction: events.append(("send", direction)))
    model = Stage(trained[stage])

    def run_layers(ids, mask, received):
        events.append(("run", 0))
        return (paddle.ones([1, 2, 3]) if received is None else received) * model.weight

    passes = Pipeline(model, run_layers)
    micro_batches = [MicroBatch(IDS, MASK, lambda hidden, n=n: (hidden.sum(), n)) for n in range(count)]
    reports = passes.forward_backward(micro_batches)
    return events, model, reports


def finish_together(stages: list[list[tuple[str, int]]]) -> bool:
    """Whether all stages come to the end when a send waits for its receive, and a receive for its send."""
    at = [0] * len(stages)
    moved = True
    while moved:
        moved = False
        for stage, events in enumerate(stages):
            while at[stage] < len(events) and events[at[stage]][0] == "run":
                at[stage] += 1
                moved = True
            if at[stage] == len(events):
                continue
            kind, direction = events[at[stage]]
            peer = stage + direction
            answer = ("receive" if kind == "send" else "send", -direction)
            if at[peer] < len(stages[peer]) and stages[peer][at[peer]] == answer:
                at[stage] += 1
                at[peer] += 1
                moved = True
    return all(place == len(events) for place, events in zip(at, stages, strict=True))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(0, 8), st.data())
def test_all_stages_finish(stages, count, data):
    trained = data.draw(st.lists(st.booleans(), min_size=stages, max_size=stages))
    with pytest.MonkeyPatch.context() as patch:
        events = [events_of(stages, stage, count, trained, patch)[0] for stage in range(stages)]
    assert finish_together(events)


@pytest.mark.parametrize("stage", range(4))
def test_passes_and_memory(stage, monkeypatch):
    stages, count = 4, 6
    events, model, reports = events_of(stages, stage, count, [True] * stages, monkeypatch)
    assert sum(kind == "run" for kind, _ in events) == count
    # The gradient of sum(w * x) is the sum of x times what came back: 6 ones a micro-batch, on every stage.
    assert float(model.weight.grad) == 6 * count
    assert reports == (list(range(count)) if stage == stages - 1 else [])
    running = largest = 0
    for kind, direction in events:
        running += (kind == "run") - (stage < stages - 1 and (kind, direction) == ("receive", +1))
        largest = max(largest, running)
    if stage < stages - 1:  # one forward pass, one backward pass: no more in memory than stages from here on
        assert largest == stages - stage


def test_nothing_travels_back_to_stages_that_do_not_learn(monkeypatch):
    events, model, _ = events_of(3, 1, 4, [False, False, True], monkeypatch)
    assert ("send", -1) not in events and ("receive", +1) not in events
    assert model.weight.grad is None
