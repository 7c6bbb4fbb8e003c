"""Every layout trains the same model: the same global batch gives the same trajectory as one process.

Each layout is one launch through Paddle's launcher that runs every scenario of tests/parallel/trajectories.py (SFT,
reward models, PPO, APA, AWR, logged answers; Llama and Qwen2 with grouped-query attention; tied and untied embeddings;
an uneven last batch, partial freezing, evaluation), and is compared with the launch of a single process: metrics,
sampled tokens, and weights of every checkpoint.

    python -m pytest tests -m layouts         sets of scenarios in their own layouts; part of the whole suite
    python -m pytest tests -m layouts_full    more layouts for every set
"""

from __future__ import annotations

import pytest

from tests.parallel.comparison import Launch, assert_same_trajectory
from tests.parallel.trajectories import ONLINE, SETS, SUPERVISED, write_models

TP2, PP2, SP = "--tensor_parallel_degree 2", "--pipeline_parallel_degree 2", "--sequence_parallel true"
RECOMPUTE = "--recompute true"
SINGLE = Launch("single")
FAST = [
    Launch("accumulate4", accumulation=4),
    Launch("dp2", 2, 2),
    Launch("sharding2_stage1", 2, 2, 2, "--sharding stage1"),
    Launch("sharding2_stage2", 2, 2, 2, "--sharding stage2"),
    Launch("sharding2_stage3", 2, 2, 4, f"--sharding stage3 {RECOMPUTE}"),
    Launch("tp2", 2, 1, 2, TP2),
    Launch("tp2_sp_recompute", 2, 1, 1, f"{TP2} {SP} {RECOMPUTE}"),
    Launch("pp2", 2, 1, 4, PP2),
    Launch("tp2_pp2", 4, 1, 4, f"{TP2} {PP2}"),
    Launch("dp2_tp2", 4, 2, 2, f"{TP2} {RECOMPUTE}"),
]
FAST_ROLLOUT = [
    Launch("pp2_single", 2, 1, 2, f"{PP2} --eval_mode single"),
    Launch("tp2_pp2_single", 4, 1, 2, f"{TP2} {PP2} --eval_mode single"),
    Launch("tp2_pp2_tensor_parallel", 4, 1, 2, f"{TP2} {PP2} --eval_mode tensor_parallel"),
    Launch("tp2_pp2_sharding2", 8, 2, 2, f"{TP2} {PP2} --sharding stage1 --sharding_parallel_degree 2"),
]
LORA = [
    Launch("accumulate4", accumulation=4),
    Launch("sharding2_stage2", 2, 2, 2, "--sharding stage2"),
    Launch("sharding2_stage3", 2, 2, 2, f"--sharding stage3 {RECOMPUTE}"),
    Launch("tp2", 2, 1, 2, TP2),
    Launch("tp2_sp_recompute", 2, 1, 1, f"{TP2} {SP} {RECOMPUTE}"),
    Launch("pp2", 2, 1, 4, PP2),
    Launch("tp2_pp2_single", 4, 1, 2, f"{TP2} {PP2} --eval_mode single"),
]
OFFLINE = [
    Launch("dp2", 2, 2, 2),
    Launch("sharding2_stage3", 2, 2, 2, f"--sharding stage3 {RECOMPUTE}"),
    Launch("tp2", 2, 1, 2, TP2),
    Launch("pp2", 2, 1, 4, PP2),
]
EACH = [Launch("dp2", 2, 2, 2), Launch("tp2", 2, 1, 2, TP2), Launch("pp2", 2, 1, 4, PP2)]
TRUNK = [
    Launch("sharding2_stage3", 2, 2, 2, f"--sharding stage3 {RECOMPUTE}"),
    Launch("tp2_sp_recompute", 2, 1, 1, f"{TP2} {SP} {RECOMPUTE}"),
    Launch("pp2", 2, 1, 4, PP2),
]
FULL = [
    *FAST,
    *FAST_ROLLOUT,
    Launch("dp4", 4, 4),
    Launch("dp2_sharding2_stage2", 4, 4, 1, "--sharding stage2 --sharding_parallel_degree 2"),
    Launch("sharding4_stage3", 4, 4, 1, "--sharding stage3"),
    Launch("tp2_sharding2_stage3", 4, 2, 2, f"{TP2} --sharding stage3"),
    Launch("tp2_sharding2_stage2_sp", 4, 2, 2, f"{TP2} {SP} --sharding stage2"),
    Launch("pp2_recompute", 2, 1, 8, f"{PP2} {RECOMPUTE}"),
    Launch("pp2_tensor_parallel", 2, 1, 2, f"{PP2} --eval_mode tensor_parallel"),
    Launch("pp3", 3, 1, 8, "--pipeline_parallel_degree 3"),
    Launch("dp2_pp2", 4, 2, 2, PP2),
    Launch("tp2_pp2_sp", 4, 1, 4, f"{TP2} {PP2} {SP} {RECOMPUTE}"),
    Launch("tp2_single", 2, 1, 1, f"{TP2} --eval_mode single"),
]
EVERY_RUN = {
    "fast": FAST,
    "rl": FAST_ROLLOUT,
    "lora": LORA,
    "offline": OFFLINE,
    "ilql": EACH,
    "trunk": TRUNK,
    "apo": EACH,
    "update": EACH,
}
ILQL_FULL = [launch for launch in FULL if "eval_mode" not in launch.arguments]  # its heads stay where they are trained
MISTAKES = [
    ("mean_gradients", Launch("dp2", 2, 2), "supervised"),
    ("no_tied_sum", Launch("pp2", 2, 1, 2, PP2), "supervised"),
    ("no_copy_gradient", Launch("tp2", 2, 1, 1, TP2), "supervised"),
    ("no_norm_sum", Launch("pp2", 2, 1, 2, PP2), "supervised"),
    ("same_slices", Launch("tp2", 2, 1, 2, TP2), "lora"),
]


def of_set(scenarios, *values):
    """A case that shares its launches with the others of this set of scenarios: one worker runs them all."""
    named = [getattr(value, "name", value) for value in values]
    group = pytest.mark.xdist_group(f"layouts_{scenarios}")
    return pytest.param(scenarios, *values, marks=group, id="-".join([scenarios, *named]))


def cases(launches):
    return [of_set(scenarios, launch) for scenarios, some in launches.items() for launch in some]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def trajectories(project):
    """(launch, set of scenarios) -> folder of their output directories; each launched once."""
    done = {}

    def trajectory(launch, scenarios):
        key = (launch.name, scenarios)
        if key not in done:
            done[key] = launch.run(project, project / "out" / f"{launch.name}-{scenarios}", scenarios)
        return done[key]

    return trajectory


def assert_same(trajectories, launch, scenarios):
    expected, found = trajectories(SINGLE, scenarios), trajectories(launch, scenarios)
    for scenario in SETS[scenarios]:
        assert_same_trajectory(expected / scenario, found / scenario)


@pytest.mark.layouts
@pytest.mark.parametrize(("scenarios", "launch"), cases(EVERY_RUN))
def test_training(trajectories, scenarios, launch):
    assert_same(trajectories, launch, scenarios)


@pytest.mark.layouts
@pytest.mark.xdist_group("layouts_mistakes")
@pytest.mark.parametrize(("name", "launch", "scenarios"), MISTAKES, ids=[name for name, *_ in MISTAKES])
def test_a_mistake_is_noticed(project, trajectories, name, launch, scenarios):
    expected = trajectories(SINGLE, scenarios)
    found = launch.run(project, project / "out" / name, scenarios, "--mistake", name)
    for scenario in SETS[scenarios]:
        with pytest.raises(AssertionError, match="Not equal to tolerance"):
            assert_same_trajectory(expected / scenario, found / scenario)


@pytest.mark.layouts
@pytest.mark.parametrize(
    ("scenarios", "saved", "resumed"),
    [
        of_set("fast", "tp2_pp2", "dp2"),
        of_set("fast", "dp2", "tp2_pp2"),
        of_set("lora", "tp2", "pp2"),
        of_set("trunk", "pp2", "tp2"),
        of_set("offline", "dp2", "pp2"),
        of_set("ilql", "tp2_pp2", "dp2"),
        of_set("ilql", "dp2", "tp2"),
    ],
)
def test_resume_in_another_layout(project, trajectories, scenarios, saved, resumed):
    by_name = {launch.name: launch for launch in FAST}
    expected, start = trajectories(SINGLE, scenarios), trajectories(by_name[saved], scenarios)
    out = project / "out" / f"{resumed}_after_{saved}"
    by_name[resumed].run(project, out, scenarios, "--resume", start)
    for scenario in SETS[scenarios]:
        done = (ONLINE if (expected / scenario / "policy").exists() else SUPERVISED)["save_steps"]
        assert_same_trajectory(expected / scenario, out / scenario, after=done)


@pytest.mark.layouts_full
@pytest.mark.parametrize(("scenarios", "launch"), cases({"full": FULL, "ilql": ILQL_FULL}))
def test_everything(trajectories, scenarios, launch):
    assert_same(trajectories, launch, scenarios)
