"""A property as two tests: a few hundred examples in every run, thousands on request; and a guard against hangs."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

SECONDS = 30
"""That one example may take before it counts as hung; it takes some milliseconds."""
_QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture,
          HealthCheck.filter_too_much, HealthCheck.large_base_example]  # fmt: skip


class Hung(AssertionError):
    """An example that did not end."""


@contextlib.contextmanager
def must_end() -> Iterator[None]:
    """Raises Hung in what takes too long."""

    def hung(*_: Any) -> None:
        raise Hung(f"no end after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fuzz(few: int, many: int, **strategies: Any) -> Callable[[Callable[..., None]], tuple[Callable, Callable]]:
    """Decorates a property: (a test of `few` examples, one of `many` marked trust_full)."""

    def decorate(prop: Callable[..., None]) -> tuple[Callable, Callable]:
        def test(count: int) -> Callable[..., None]:
            def run(**values: Any) -> None:
                with must_end():
                    prop(**values)

            run.__doc__ = prop.__doc__
            quick = settings(max_examples=count, deadline=None, suppress_health_check=_QUIET, derandomize=count == few,
                             database=None, phases=(Phase.explicit, Phase.generate, Phase.shrink))  # fmt: skip
            return quick(given(**strategies)(run))

        return test(few), pytest.mark.trust_full(test(many))

    return decorate


def assert_one_line(fault: Exception) -> None:
    """A message is one line of a length that a person reads."""
    message = str(fault)
    assert message.strip() and "\n" not in message and len(message) < 4000, message[:500]
