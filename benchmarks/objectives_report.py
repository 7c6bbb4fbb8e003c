"""Tables and plot of benchmarks.objectives."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from alignment.report.bands import color_of, draw_band, draw_frontier
from benchmarks.results import show_machine, show_table

COLUMNS = {  # metric: heading
    "judge_reward": "judge's reward",
    "judge_gain": "its gain",
    "win_rate": "win rate",
    "kl": "KL, nats",
    "reward": "trained reward",
}


def show(result: dict) -> None:
    """The machine, the search and the comparison."""
    show_machine(result["machine"])
    accuracies = [result[name]["accuracy"] for name in ("reward_model", "judge")]
    print("accuracy on held-out pairs: reward model {:.3f}, judge {:.3f}".format(*accuracies))
    rows = [
        (f"{name} {describe(tried['values'])}", *(f"{tried[key]:.3f}" for key in ("reward", "kl", "judge_reward")))
        for name, found in result["objectives"].items()
        for tried in found["search"]
    ]
    columns = ("objective", "trained reward", "KL, nats", "judge's reward")
    if rows:
        show_table("search: one seed, the largest trained reward is chosen", columns, rows)
    shown = COLUMNS | {"judge_reward_at_equal_kl": f"judge's reward at KL {result['equal_kl']:.3g}"}
    rows = [
        (f"{name} {describe(found['best'])}", *(cell(found["final"][key]) for key in shown))
        for name, found in result["objectives"].items()
    ]
    seeds = len(result["setting"]["seeds"])
    title = f"after {result['length']} {result['unit']}: mean and standard error over seeds ({seeds})"
    show_table(title, ("objective", *shown.values()), rows)


def describe(values: dict) -> str:
    """Arguments as a person would name them."""
    return ", ".join(f"{name} {value}" for name, value in values.items())


def cell(found: dict[str, float]) -> str:
    return f"{found['mean']:.3f} ± {found['sem']:.3f}"


def draw(result: dict, path: Path) -> None:
    """Judge's reward, win rate and KL over episodes with bands over seeds, and the frontier of reward against KL."""
    import matplotlib

    matplotlib.use("Agg")  # no display
    from matplotlib import pyplot as plt

    figure, ((reward, wins), (kl, frontier)) = plt.subplots(2, 2, figsize=(12, 8.4), layout="constrained")
    panels = ((reward, "judge_reward", "judge's reward"), (wins, "win_rate", "win rate against the initial policy"))
    for number, (name, found) in enumerate(result["objectives"].items()):
        label = ", ".join(filter(None, (name, describe(found["best"]))))
        colour = color_of(number)
        for axes, metric, title in (*panels, (kl, "kl", "KL to the initial policy, nats an answer")):
            draw_band(axes, np.array(found["runs"][0]["time"]), _over_runs(found["runs"], metric), label, colour)
            axes.set(title=title, xlabel=result["unit"])
        draw_frontier(frontier, *(_over_runs(found["runs"], name) for name in ("kl", "judge_reward")), label, colour)
    wins.axhline(0.5, color="#666666", linewidth=0.8, linestyle=":")
    frontier.axvline(result["equal_kl"], color="#666666", linewidth=0.8, linestyle="--", label="KL that all reach")
    frontier.set(title="judge's reward against KL", xlabel="KL, nats an answer", ylabel="judge's reward")
    for axes in (reward, frontier):
        axes.legend(fontsize=8)
    figure.suptitle(f"{len(result['setting']['seeds'])} seeds, mean ± standard error", fontsize=11)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _over_runs(runs: list[dict], name: str) -> np.ndarray:
    """float64 [runs, evaluations]"""
    return np.array([run[name] for run in runs], dtype=np.float64)
