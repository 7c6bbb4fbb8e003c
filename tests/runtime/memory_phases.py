"""Prints, as JSON, what phases say of their memory; in a process of its own, for where glibc was told to keep freed
memory (alignment.runtime.bootstrap) none goes back to the system."""

from __future__ import annotations

import json

import numpy as np

from alignment.runtime import timing
from alignment.runtime.timing import PhaseTimer, peak_memory_gb


def use_memory(megabytes: int) -> None:
    np.ones(megabytes * 1_000_000 // 8)  # far over the size from which memory goes back to the system at once


def run_phases() -> dict[str, float]:
    """An outer phase that uses 400 MB, one inside it with 200, all that in another timer's, and then one with next to
    nothing; the peak."""
    timer, loop = PhaseTimer(), PhaseTimer()
    with loop("evaluation"):
        with timer("score"):
            with timer("offload"):
                use_memory(200)
            use_memory(400)
        use_memory(1)
    with timer("update"):
        use_memory(1)
    found = {name: value for name, value in (timer.pop() | loop.pop()).items() if name.startswith("memory_gb/")}
    return found | {"peak": peak_memory_gb()}


def main() -> None:
    timing.end_memory_span()  # imports Paddle, which the process then holds
    use_memory(1000)  # before all of them: the mark that Linux keeps is already higher
    found = {"reset": run_phases()}
    timing._reset_high_water_mark = lambda: False  # as in some sandboxes
    use_memory(1500)
    timing.end_memory_span()
    print(json.dumps(found | {"not reset": run_phases()}))


if __name__ == "__main__":
    main()
