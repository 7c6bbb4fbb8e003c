"""What a benchmark ran on: names and sizes, and the two rates that bound a language model on a CPU."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import numpy as np
import psutil

GEMM_SIZE, GEMM_REPEATS = 4096, 5
READ_BYTES, READ_REPEATS = 1 << 30, 8


def core_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_machine() -> dict[str, object]:
    """Processor, cores, memory (GB), load before the run, Python and kernel."""
    return {
        "cpu": _processor(),
        "cores": core_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
    }


def versions_of(*packages: str) -> dict[str, str]:
    """Installed versions; packages that are not there are left out."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def measure_machine() -> dict[str, float]:
    """{"read_gb_per_s", "gemm_gflops_per_s"}: the best of several tries on all cores; takes 1 GiB and some seconds."""
    return {"read_gb_per_s": _read_rate(core_count()) / 1e9, "gemm_gflops_per_s": _gemm_rate() / 1e9}


def _read_rate(threads: int) -> float:
    """Bytes a second when every core reads its own part: dot products, for sums are bound by additions."""
    parts = [np.ones(READ_BYTES // 4 // threads, dtype=np.float32) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        seconds = _best(READ_REPEATS, lambda: list(pool.map(lambda part: np.dot(part, part), parts)))
    return sum(part.nbytes for part in parts) / seconds


def _gemm_rate() -> float:
    """Flops a second of a product of large float32 squares, by the BLAS that NumPy brings."""
    square = np.random.default_rng(0).random([GEMM_SIZE, GEMM_SIZE], dtype=np.float32)
    return 2 * GEMM_SIZE**3 / _best(GEMM_REPEATS, lambda: square @ square)


def _best(repeats: int, work: Callable[[], object]) -> float:
    """Least seconds of several runs: what disturbs a run only makes it slower."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
