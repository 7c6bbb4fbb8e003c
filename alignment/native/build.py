"""Compile the kernels once per machine and keep the library in the cache directory."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import paddle

from alignment.ppo.models.default import cache_directory

FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp", "-Wno-unknown-pragmas")
_HERE = Path(__file__).parent


class BuildError(Exception):
    """Why there is no library, in one line."""


@cache
def load_library() -> ctypes.CDLL:
    """The compiled kernels.

    Raises: BuildError without a C++ compiler ($CXX, g++ or clang++), or if it cannot compile them.
    """
    compiler = shutil.which(os.environ.get("CXX") or "") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise BuildError("no C++ compiler ($CXX, g++ or clang++)")
    target = cache_directory() / f"kernels-{_fingerprint(compiler)}.so"
    if not target.exists():
        _compile(compiler, target)
    try:
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise BuildError(f"cannot load {target}: {error}") from None


def _compile(compiler: str, target: Path) -> None:
    """Into a temporary file first: processes that start together, or a kill, never see half a library."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as directory:
            compiled, linked = Path(directory) / "kernels.o", Path(directory) / "kernels.so"
            _run(compiler, *FLAGS, "-c", str(_HERE / "kernels.cpp"), "-o", str(compiled))
            _run(compiler, "-shared", str(compiled), "-o", str(linked), *_openmp())
            os.replace(linked, target)
    except OSError as error:
        raise BuildError(f"cannot write {target}: {error.strerror or error}") from None


def _openmp() -> list[str]:
    """Paddle's own OpenMP runtime where it has one: two would compete for the cores."""
    library = Path(paddle.__file__).parent / "libs" / "libiomp5.so"
    return [str(library)] if library.exists() else ["-fopenmp"]


def _run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if "error" in line] or [f"status {result.returncode}"]
        raise BuildError(f"{Path(command[0]).name} failed: {lines[0].strip()}")


def _fingerprint(compiler: str) -> str:
    """Of everything that the machine code depends on: sources, flags, compiler, Paddle and processor."""
    digest = hashlib.sha256()
    for file in sorted((*_HERE.glob("*.h"), *_HERE.glob("*.cpp"))):
        digest.update(file.read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True).stdout
    digest.update(repr((FLAGS, version, paddle.__version__, paddle.__file__, _processor())).encode())
    return digest.hexdigest()[:16]


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            wanted = ("flags", "Features", "model name")
            return "".join(sorted({line for line in file if line.startswith(wanted)}))
    except OSError:
        return platform.processor() or platform.machine()
