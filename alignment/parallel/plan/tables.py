"""A plan as tables: on a terminal, or as Markdown."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from rich.console import Console
from rich.table import Table

from alignment.parallel.plan.memory import Memory
from alignment.parallel.plan.planning import GB, Plan
from alignment.parallel.plan.traffic import Traffic

NOTE = (
    "Estimates of tensors only, for the longest sequences the arguments allow; fragmentation, the CUDA context and "
    "communication buffers come on top. GB = 1e9 bytes."
)
_PLAIN_WIDTH = 110
_MEMORY_HEADINGS = {"cache": "KV cache"}
_TRAFFIC_HEADINGS = {"rollout": "rollout *"}


@dataclass(frozen=True)
class Grid:
    """A table with its title; cells are text, the first column left-justified."""

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
    models = ", ".join(f"{model.name} {_billions(model)}" for model in plan.models)
    return (
        f"{plan.stage} on {plan.processes} processes: {' x '.join([*kinds, f'data {layout.data}'])}{sequence}; "
        f"{precision}\nmodels, in parameters: {models}"
    )


def _billions(model: Any) -> str:
    """Parameters of a whole model."""
    shape = model.shape
    head = shape.hidden_size - (0 if shape.tie_word_embeddings else shape.embedding_parameters())
    count = shape.parameters + (head if model.scores else 0)
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def grids(plan: Plan) -> list[Grid]:
    """Memory and communication; columns of nothing but zeros are left out."""
    memory = _grid(
        "Memory of a rank, GB", ["phase", "stage"], plan.memory, [f.name for f in fields(Memory)[2:]], _MEMORY_HEADINGS
    )
    if plan.processes == 1:
        return [memory]
    names = ["gradients", "weights", "tensor", "pipeline", "total", "rollout"]
    title = "Sent by a rank, GB an optimizer step" + " (* an iteration)" * any(t.rollout for t in plan.traffic)
    return [memory, _grid(title, ["stage"], plan.traffic, names, _TRAFFIC_HEADINGS)]


def _grid(
    title: str, labels: list[str], rows: Sequence[Memory | Traffic], names: list[str], headings: dict[str, str]
) -> Grid:
    if "total" not in names:
        names = [*names, "total"]
    shown = [name for name in names if name == "total" or any(getattr(row, name) for row in rows)]
    header = labels + [headings.get(name, name) for name in shown]
    cells = [
        [str(getattr(row, label)) for label in labels] + [f"{getattr(row, name) / GB:.2f}" for name in shown]
        for row in rows
    ]
    return Grid(title, header, cells)


def show(plan: Plan) -> None:
    """Print the plan with rich."""
    console = Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH, highlight=False)
    console.print(describe(plan))
    for grid in grids(plan):
        table = Table(title=grid.title, title_justify="left")
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
