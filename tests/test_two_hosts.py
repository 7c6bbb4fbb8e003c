"""Two hosts, two processes on each, give the trajectory of one process. The hosts are network namespaces."""

from __future__ import annotations

import pytest

from tests.parallel.comparison import assert_same_trajectory
from tests.stages import run, write_project
from tests.two_hosts import refusal
from tests.two_hosts import run as run_on_two_hosts

pytestmark = pytest.mark.layouts
LAYOUTS = {"tp2_dp2": "--tensor_parallel_degree", "pp2_dp2": "--pipeline_parallel_degree"}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    reason = refusal()
    if reason:
        pytest.skip(reason)
    folder = write_project(tmp_path_factory.mktemp("project"))
    status, shown = run(folder, "ppo", "--output_dir", "one", "--per_device_train_batch_size", 8)
    assert status == 0, shown
    return folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_ppo(project, name):
    batches = ("--per_device_prompt_batch_size", 2, "--per_device_train_batch_size", 2)
    more = ("--gradient_accumulation_steps", 2, LAYOUTS[name], 2)
    status, shown = run_on_two_hosts(project, "ppo", "--output_dir", name, *batches, *more)
    assert status == 0, shown[-5000:]
    assert "10.77.0.2" in shown  # the second host's launcher says where it is
    assert_same_trajectory(project / "one", project / name)
