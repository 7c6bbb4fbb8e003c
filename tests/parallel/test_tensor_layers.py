"""Tensor-parallel layers over gloo, on two real processes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.stages import CHECKOUT


@pytest.mark.layouts
def test_tensor_layers(tmp_path):
    launcher = ["-m", "paddle.distributed.launch", "--nproc_per_node", "2"]
    command = [sys.executable, *launcher, str(CHECKOUT / "tests/parallel/tensor_layers.py")]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    shown = result.stdout + result.stderr
    assert result.returncode == 0, shown
    assert "all checks passed" in shown
