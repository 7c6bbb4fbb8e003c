"""The stages' commands on two hosts that tests/two_hosts.sh makes out of network namespaces."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.stages import SCRIPTS

SCRIPT = Path(__file__).with_suffix(".sh")
LAUNCHER = ["-m", "paddle.distributed.launch", "--master", "{master}", "--nnodes", "2", "--rank", "{node}"]


def refusal() -> str | None:
    """Why this machine cannot be split into two hosts (it makes them, and they are gone again); None: it can."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    result = subprocess.run(["bash", SCRIPT, "true"], capture_output=True, text=True)
    return None if result.returncode == 0 else f"no network namespaces here: {result.stderr.strip()[-300:]}"


def run(folder: Path, stage: str, *overrides: object, processes: int = 2, **environment: str) -> tuple[int, str]:
    """(exit status, everything shown) of a stage's command in ``folder``, with so many processes on each host."""
    launcher = [*LAUNCHER, "--host", "{address}", "--nproc_per_node", str(processes), "--log_dir", "log_{node}"]
    command = [sys.executable, "-u", *launcher, str(SCRIPTS[stage]), f"{stage}.json", *map(str, overrides)]
    result = subprocess.run(
        ["bash", SCRIPT, *command], cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True
    )
    return result.returncode, result.stdout + result.stderr
