"""Table and plot of benchmarks.ppo_iteration."""

from __future__ import annotations

from pathlib import Path

from benchmarks.results import COLOURS, show_machine, show_table

PHASES = ("rollout", "score", "update")
SHADES = {"rollout": "#1f6fb2", "score": "#5fa3d9", "update": "#a9cdec", "rest": "#d9d9d9"}


def show(result: dict) -> None:
    """The machine, and both contenders' seconds."""
    show_machine(result["machine"])
    setting = result["setting"]
    title = (
        f"PPO iteration, engine {result['engine']}: {setting['batch']} answers of {setting['new_tokens']} tokens, "
        f"{setting['minibatches']} optimizer steps"
    )
    rows = []
    for name in ("ours", "trl"):
        if name in result:
            phases = result[name]["phases"]
            shown = [f"{phases[phase]:.2f}" if phase in phases else "" for phase in PHASES]
            ratio = f"{result['vs_trl']:.2f}" if name == "trl" else ""
            rows.append((name, f"{result[name]['seconds']:.2f}", *shown, ratio))
    show_table(title, ("contender", "seconds", *PHASES, "vs_trl"), rows)


def draw(result: dict, path: Path) -> None:
    """Stacked phases, TRL's second and third being one, and the seconds of every pair."""
    import matplotlib

    matplotlib.use("Agg")  # no display
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    _draw_phases(left, {name: result[name] for name in ("ours", "trl") if name in result})
    for name in ("ours", "trl"):
        if name in result:
            seconds = [run["seconds"] for run in result[name]["runs"]]
            right.plot(range(1, len(seconds) + 1), seconds, marker="o", color=COLOURS[name], label=name)
    right.set_ylim(bottom=0)
    right.set_xticks(range(1, len(result["ours"]["runs"]) + 1))
    right.set_xlabel("pair" if "trl" in result else "iteration")
    right.set_ylabel("seconds")
    right.legend(fontsize=8)
    machine = result["machine"]
    title = f"PPO iteration, engine {result['engine']}: {machine['cpu']}, {machine['cores']} cores"
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_phases(axes, contenders: dict[str, dict]) -> None:
    """One bar each; what no phase covers is the rest of the iteration."""
    labelled = set()
    for place, found in enumerate(contenders.values()):
        phases = {name: found["phases"][name] for name in PHASES if name in found["phases"]}
        rest = "rest" if "update" in phases else "score and update"
        bottom = 0.0
        for name, seconds in {**phases, rest: max(found["seconds"] - sum(phases.values()), 0.0)}.items():
            label = None if name in labelled else name
            axes.bar(place, seconds, 0.6, bottom=bottom, color=SHADES.get(name, "#f0c48a"), label=label)
            labelled.add(name)
            bottom += seconds
        axes.annotate(f"{found['seconds']:.2f} s", (place, bottom), ha="center", va="bottom")
    axes.set_xticks(range(len(contenders)), list(contenders))
    axes.set_ylabel("median seconds of an iteration")
    axes.margins(y=0.12)
    axes.legend(fontsize=8)
