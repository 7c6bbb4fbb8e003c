"""Puts a report together: a self-contained page, and for one directory also report.md with its plots in report/."""

from __future__ import annotations

import base64
import html
import os
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from alignment.report import tables
from alignment.report.answers import lay_out
from alignment.report.bands import color_of
from alignment.report.comparison import draw_comparison
from alignment.report.groups import differences, group_runs
from alignment.report.overview import anchors, compare_groups, overview
from alignment.report.plots import draw_stage
from alignment.report.reading import STAGE_TITLES, Stage, read_stages
from alignment.runtime.faults import UsageError
from alignment.runtime.files import write_text

MARK = '<meta name="generator" content="alignment.report">'
MARK_WITHIN = 1000  # bytes from the start of a page


def write_report(output_dir: str | Path) -> Path:
    """Write report.html, report.md and report/*.png into `output_dir`; return the path of the HTML file.

    output_dir: a stage's directory, or a pipeline's with the stages' directories in it.
    Raises UsageError if there is nothing to report; nothing is written then.
    """
    output_dir = Path(output_dir)
    page = describe(read_stages(output_dir), f"Report on {output_dir.resolve().name}")
    texts = {name: render(name, page) for name in ("report.html", "report.md")}
    images = output_dir / "report"
    images.mkdir(exist_ok=True)
    for section in (*page["comparisons"], *page["runs"]):
        for picture in section["pictures"]:
            (images / f"{section['anchor']}_{picture.key}.png").write_bytes(picture.png)
    for name, text in texts.items():
        write_text(output_dir / name, text)
    return output_dir / "report.html"


def write_page(output_dirs: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Write one page about all runs in `output_dirs` (see alignment.report.reading.read_stages); return its path.

    output: the page's file; default: comparison.html in the directory that all runs share.
    Raises UsageError if there is nothing to report, or `output` is there and no page of this command.
    """
    directories = [Path(path) for path in output_dirs]
    stages = read_stages(*directories)
    parents = [path.resolve().parent for path in directories]
    path = Path(output) if output else Path(os.path.commonpath(parents), "comparison.html")
    _check_replaceable(path)
    title = f"Report on {len(stages)} runs" if len(stages) > 1 else f"Report on {stages[0].directory.name}"
    text = render("report.html", describe(stages, title))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as fault:
        raise UsageError(f"{path}: cannot be written: {fault.strerror}; name another file with --output") from fault
    return path


def _check_replaceable(path: Path) -> None:
    if path.is_dir() or (path.exists() and MARK.encode() not in path.read_bytes()[:MARK_WITHIN]):
        raise UsageError(f"{path} is there and is no page of this command; name another file with --output")


def describe(stages: Sequence[Stage], title: str) -> dict[str, Any]:
    """What the templates show. Runs of the same kind are compared; a run that is alone of its kind has own plots."""
    names = dict(zip([id(stage) for stage in stages], anchors(stages), strict=True))
    by_kind = {kind: [stage for stage in stages if stage.kind == kind] for kind in STAGE_TITLES}
    groups = {kind: group_runs(own, stages) for kind, own in by_kind.items() if len(own) > 1}
    colors = {
        id(stage): color_of(place)
        for by_label in groups.values()
        for place, group in enumerate(by_label.values())
        for stage in group
    }
    rows = overview(stages) if len(stages) > 1 else []
    heads = [{"anchor": names[id(s)], "name": s.name, "color": colors.get(id(s)), "notes": s.notes} for s in stages]
    return {
        "title": title,
        "written": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "mark": MARK,
        "overview": [head | {"cells": row} for head, row in zip(heads, rows, strict=False)],
        "comparisons": [_describe_comparison(kind, by_label) for kind, by_label in groups.items()],
        "runs": [_describe_run(stage, names[id(stage)], stage.kind in groups) for stage in stages],
    }


def _describe_comparison(kind: str, groups: dict[str, list[Stage]]) -> dict[str, Any]:
    stages = [stage for group in groups.values() for stage in group]
    return {
        "title": f"{STAGE_TITLES[kind]}: {len(stages)} runs compared",
        "anchor": f"compare_{kind}",
        "colors": {label: color_of(place) for place, label in enumerate(groups)},
        "has_bands": any(len(group) > 1 for group in groups.values()),
        "table": compare_groups(kind, groups),
        "pictures": draw_comparison(groups),
        "answers": lay_out({label: group[0].samples for label, group in groups.items()}),
        "names": [stage.name for stage in stages if stage.run],
        "differences": differences(stages),
    }


def _describe_run(stage: Stage, anchor: str, is_compared: bool) -> dict[str, Any]:
    paired = tables.compare_rewards(stage.samples)
    return {
        "title": stage.title,
        "anchor": anchor,
        "notes": stage.notes,
        "alerts": tables.summarize_alerts(stage.alerts),
        "headline": tables.headline(stage),
        "paired": paired,
        "verdict": tables.verdict(paired),
        "pictures": [] if is_compared else draw_stage(stage),
        "answers": [] if is_compared else lay_out({"": stage.samples}),
        "settings": tables.describe_record(stage),
    }


def render(template: str, page: dict[str, Any]) -> str:
    """One of templates/ filled in. All text of runs is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=lambda name: bool(name) and name.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=tables.number, base64=_encode_base64, cell=_escape_cell)
    text = environment.get_template(template).render(page)
    return text.encode("utf-8", "replace").decode("utf-8")  # JSON can hold half of a surrogate pair


def _encode_base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _escape_cell(text: Any) -> str:
    """Text as it is, in one cell of a Markdown table: no markup, no pipes, line breaks kept."""
    escaped = re.sub(r"([\\`*_{}\[\]()#+!|~])", r"\\\1", html.escape(str(text), quote=False))
    return escaped.strip().replace("\r", "").replace("\n", "<br>")
