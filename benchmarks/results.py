"""What benchmarks show and write: tables, a JSON file, and a plot beside it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.table import Table

COLOURS = {"ours": "#1f6fb2", "transformers": "#e08a1e", "paddlenlp": "#7a9a3a", "trl": "#e08a1e", "limit": "#666666"}
BUSY = 0.5  # load average over a minute
_WIDTH = 110


def show_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """A table on the screen, as wide in a log file as on a terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def show_machine(machine: dict) -> None:
    """One line of hardware, one of versions, and a notice if the machine did other things."""
    rates = [(name, unit) for name, unit in (("read_gb_per_s", "GB/s read"), ("gemm_gflops_per_s", "GFLOP/s fp32"))]
    shown = [f"{machine[name]:.0f} {unit}" for name, unit in rates if name in machine]
    print(f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB", *shown, sep=", ")
    if machine["load_before"] > BUSY:
        print(f"notice: {machine['load_before']} tasks were running before the start, so the figures say little")
    packages = {"python": machine["python"], **machine["packages"]}
    print(", ".join(f"{name} {version}" for name, version in packages.items()))


def run(
    options: argparse.Namespace,
    measure: Callable[[argparse.Namespace, ExitStack], dict],
    show: Callable[[dict], None],
    draw: Callable[[dict, Path], None],
) -> None:
    """Measure, show and, with ``options.json``, write. What ``measure`` enters into its stack has ended by then."""
    with ExitStack() as stack:
        result = measure(options, stack)
    show(result)
    if options.json:
        save(result, options.json, draw)


def save(result: dict, path: Path, draw: Callable[[dict, Path], None]) -> None:
    """Write ``result`` to ``path`` and its plot to the same name with .png."""
    path.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, path.with_suffix(".png"))
    print(f"written: {path} and {path.with_suffix('.png').name}")
