"""Tables and plot of benchmarks.rollout."""

from __future__ import annotations

from pathlib import Path

from benchmarks.results import COLOURS, show_machine, show_table


def show(result: dict) -> None:
    """The machine, and every setting with its ratios."""
    show_machine(result["machine"])
    for name, share in result["greedy_agreement"].items():
        print(f"greedy answers: {share:.0%} of the tokens of {name} are ours")
    columns = ("setting", "contender", "tokens/s", "vs_<contender>", "fraction_of_bandwidth_limit", "pairs")
    rows = [row for name, setting in result["settings"].items() for row in _rows(name, setting)]
    show_table(f"rollout, engine {result['engine']}: median ratios, ours as a multiple", columns, rows)
    if result["scaling"]:
        points = result["scaling"]["batch"] + result["scaling"]["length"]
        show_table("scaling", columns, [row for point in points for row in _rows("", point)])


def _rows(name: str, setting: dict) -> list[tuple[str, ...]]:
    """Ours, then a row for each peer."""
    ours, lengths = setting["ours"], f"{setting['prompts']} x {setting['longest']}"
    label = f"{name} {lengths}".strip()
    rows = [(label, "ours", f"{ours['tokens_per_s']:.1f}", "", f"{setting['fraction_of_bandwidth_limit']:.3f}", "")]
    for peer, found in setting["peers"].items():
        fewer = f" ({found['prompts']} prompts)" if found["prompts"] != setting["prompts"] else ""
        speed, share = f"{found['tokens_per_s']:.1f}", f"{found['fraction_of_bandwidth_limit']:.3f}"
        rows.append((label, peer + fewer, speed, f"{found['ratio']:.2f}", share, str(len(found["pairs"]))))
    return rows


def draw(result: dict, path: Path) -> None:
    """Bars of the settings and, with --scaling, curves over batch and length, both with the machine's limit."""
    import matplotlib

    matplotlib.use("Agg")  # no display
    from matplotlib import pyplot as plt

    scaling = result["scaling"]
    figure, panels = plt.subplots(1, 3 if scaling else 1, figsize=(15 if scaling else 6.5, 4.4), squeeze=False)
    _draw_settings(panels[0][0], result["settings"])
    if scaling:
        _draw_curve(panels[0][1], scaling["batch"], "prompts", "prompts at once, 32 new tokens each")
        _draw_curve(panels[0][2], scaling["length"], "longest", "new tokens, 8 prompts")
    machine = result["machine"]
    figure.suptitle(f"Rollout, engine {result['engine']}: {machine['cpu']}, {machine['cores']} cores", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_settings(axes, settings: dict) -> None:
    """A group of bars for each setting."""
    names = ["ours", *dict.fromkeys(peer for setting in settings.values() for peer in setting["peers"])]
    for place, setting in enumerate(settings.values()):
        found = {"ours": setting["ours"], **setting["peers"]}
        for number, contender in enumerate(names):
            if contender in found:
                speed, at = found[contender]["tokens_per_s"], place + (number - (len(names) - 1) / 2) * 0.27
                label = contender if place == 0 else None
                axes.bar(at, speed, 0.25, color=COLOURS[contender], label=label)
                axes.annotate(f"{speed:.3g}", (at, speed), ha="center", va="bottom", fontsize=9)
        limit, label = setting["ours"]["limit_tokens_per_s"], "machine's limit" if place == 0 else None
        axes.hlines(limit, place - 0.45, place + 0.45, color=COLOURS["limit"], linestyle="--", label=label)
    labels = [f"{name}\n{one['prompts']} prompts, {_lengths(one)} tokens" for name, one in settings.items()]
    axes.set_xticks(range(len(settings)), labels)
    axes.set_ylim(top=1.25 * max(setting["ours"]["limit_tokens_per_s"] for setting in settings.values()))
    axes.set_ylabel("useful tokens a second")
    axes.legend(fontsize=8, ncol=2, loc="upper center")


def _lengths(setting: dict) -> str:
    return str(setting["longest"]) if setting["shortest"] == setting["longest"] else f"up to {setting['longest']}"


def _draw_curve(axes, points: list[dict], key: str, label: str) -> None:
    where = [point[key] for point in points]
    curves = {"ours": [point["ours"]["tokens_per_s"] for point in points]}
    for peer in points[0]["peers"]:
        curves[peer] = [point["peers"][peer]["tokens_per_s"] for point in points]
    for name, speeds in curves.items():
        axes.plot(where, speeds, marker="o", color=COLOURS[name], label=name)
    limits = [point["ours"]["limit_tokens_per_s"] for point in points]
    axes.plot(where, limits, linestyle="--", color=COLOURS["limit"], label="machine's limit")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:.4g}")
    axes.set_xticks(where, [str(value) for value in where])
    axes.set_xlabel(label)
    axes.set_ylabel("useful tokens a second")
    axes.set_ylim(top=3 * max(limits))  # room for the legend
    axes.legend(fontsize=8, loc="upper left", ncol=3)
