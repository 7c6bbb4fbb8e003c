"""One style for every plot of a report: colours, axes, and how they become pictures."""

from __future__ import annotations

import io
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

TRAIN, HELD_OUT, THIRD = "#3b6fb6", "#d9772b", "#5b9a68"  # told apart also by colour-blind readers
EXTRA = ("#8d6cab", "#b5504f", "#6b7280", "#c29b2e")
RUNS = (TRAIN, HELD_OUT, THIRD, *EXTRA, "#2b9aa6", "#c8699e", "#7a5a3c", "#96ad32", "#27406b")
MARKERS = "osD^vPX*<>hd"
NEUTRAL = "#9aa0a6"
PHASES = {  # phase: its colour in every plot
    "training": TRAIN,
    "rollout": TRAIN,
    "score": HELD_OUT,
    "update": THIRD,
    "evaluation": EXTRA[0],
    "saving": EXTRA[3],
    "reshard": EXTRA[1],
    "offload": EXTRA[2],
}
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa0a6",
    "axes.labelcolor": "#3c4043",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e4e7eb",
    "grid.linewidth": 0.8,
    "xtick.color": "#3c4043",
    "ytick.color": "#3c4043",
    "legend.frameon": False,
    "legend.fontsize": 9,
}
WIDTH, HEIGHT, DPI = 6.4, 3.4, 140  # inches
SHADES = 96  # colours of a picture: as many as lines, bands and smooth edges need


@dataclass(frozen=True)
class Picture:
    """A drawn plot: `key` is its file name without .png, `alt` says in words what it shows; sizes in pixels."""

    key: str
    title: str
    alt: str
    png: bytes
    width: int
    height: int


def new_axes(title: str, x_label: str, y_label: str, height: float = HEIGHT) -> Axes:
    """Axes of a figure of their own. Args: height: inches."""
    axes = Figure(figsize=(WIDTH, height), layout="constrained").subplots()
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return axes


def count_steps(axes: Axes) -> Axes:
    """Whole numbers on the axis below."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    return axes


def finish(axes: Axes, key: str, alt: str) -> Picture:
    """The figure as a small PNG file."""
    drawn, packed = io.BytesIO(), io.BytesIO()
    axes.figure.savefig(drawn, format="png", dpi=DPI)
    image = Image.open(drawn).convert("RGB").quantize(SHADES, dither=Image.Dither.NONE)
    image.save(packed, format="png", optimize=True)
    title = axes.get_title(loc="left")
    return Picture(key, title, f"{title}: {alt}", packed.getvalue(), image.width, image.height)


def phase_colors(phases: list[str]) -> dict[str, str]:
    """{phase: colour} in the order in which phases are shown: known ones first, others by name."""
    known = [phase for phase in PHASES if phase in phases]
    others = sorted(set(phases) - set(PHASES))
    return {phase: PHASES[phase] for phase in known} | {
        phase: RUNS[(len(PHASES) + place) % len(RUNS)] for place, phase in enumerate(others)
    }
