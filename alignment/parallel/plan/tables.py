"""A plan as tables: on a terminal, or as Markdown."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from alignment.parallel.layout import Layout
from alignment.parallel.plan.memory import Memory
from alignment.parallel.plan.models import Model
from alignment.parallel.plan.planning import GB, Plan
from alignment.parallel.plan.traffic import Traffic

NOTE = (
    "Estimates of tensors only, each phase at its largest moment with the longest sequences the arguments allow. "
    "Fragmentation, the CUDA context and communication buffers come on top. GB = 1e9 bytes."
)
_PLAIN_WIDTH = 110
# field: heading
_MEMORY = {
    "weights": "weights",
    "optimizer": "optimizer",
    "copy": "copy",
    "gradients": "gradients",
    "gathered": "gathered",
    "cache": "KV cache",
    "activations": "activations",
    "logits": "logits",
    "total": "total",
}
_TRAFFIC = {
    "gradients": "gradients",
    "weights": "weights",
    "tensor": "tensor",
    "pipeline": "pipeline",
    "total": "total",
    "iteration": "iteration *",
}


@dataclass(frozen=True)
class Grid:
    """A table with its title; cells are text."""

    title: str
    header: list[str]
    rows: list[list[str]]


def describe(plan: Plan) -> str:
    """The layout, the precision and the models, in a line each."""
    layout, sizes = plan.layout, plan.sizes
    kinds = [f"tensor {layout.tensor}", f"pipeline {layout.pipeline}", f"sharding {layout.sharding}"]
    kinds[-1] += f" (stage {layout.sharding_stage})" if layout.sharding_stage else ""
    precision = f"bfloat16 {sizes.fp16_opt_level}" if sizes.bf16 else "float32"
    sequence = ", sequence parallel" if layout.sequence_parallel else ""
    models = ", ".join(f"{model.name} {_count(model)}" for model in plan.models)
    return (
        f"{plan.stage} on {plan.processes} processes: {' x '.join([*kinds, f'data {layout.data}'])}{sequence}; "
        f"{precision}\nmodels, in parameters: {models}"
    )


def _count(model: Model) -> str:
    """Parameters of a whole model, in words."""
    count = model.parameters(Layout(), 0)
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def grids(plan: Plan) -> list[Grid]:
    """Memory and, of several processes, communication; columns of nothing but zeros are left out."""
    memory = _grid("Memory of a rank, GB", ["phase", "stage"], plan.memory, _MEMORY)
    if plan.processes == 1:
        return [memory]
    mark = " (* besides, an iteration)" if any(traffic.iteration for traffic in plan.traffic) else ""
    return [memory, _grid(f"Sent by a rank, GB an optimizer step{mark}", ["stage"], plan.traffic, _TRAFFIC)]


def _grid(title: str, labels: list[str], rows: Sequence[Memory | Traffic], columns: Mapping[str, str]) -> Grid:
    shown = [name for name in columns if name == "total" or any(getattr(row, name) for row in rows)]
    cells = [
        [str(getattr(row, label)) for label in labels] + [f"{getattr(row, name) / GB:.2f}" for name in shown]
        for row in rows
    ]
    return Grid(title, labels + [columns[name] for name in shown], cells)


def show(plan: Plan) -> None:
    """Print the plan with rich."""
    console = Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH, highlight=False)
    console.print(describe(plan))
    for grid in grids(plan):
        console.print(f"\n{grid.title}")
        table = Table()
        for number, name in enumerate(grid.header):
            table.add_column(name, justify="right" if number else "left")
        for row in grid.rows:
            table.add_row(*row)
        console.print(table)
    console.print(NOTE)


def markdown(plan: Plan) -> str:
    """The same as Markdown."""
    parts = [describe(plan)]
    for grid in grids(plan):
        rule = ["---"] + ["---:"] * (len(grid.header) - 1)
        lines = [f"| {' | '.join(cells)} |" for cells in (grid.header, rule, *grid.rows)]
        parts.append(f"**{grid.title}**\n\n" + "\n".join(lines))
    return "\n\n".join([*parts, NOTE])
