"""Which runs differ in nothing but the seed, and what tells the others apart."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from alignment.report.reading import Stage
from alignment.report.tables import flatten

Settings = dict[str, str]
SEEDS = ("seed", "data_seed")
PLACES = ("output_dir", "logging_dir", "overwrite_output_dir", "resume_from_checkpoint")
SHOWN = ("disable_tqdm", "log_level", "report_to", "logging_steps")  # what a run tells of itself, not what it does
SAVED = ("save_strategy", "save_steps", "save_total_limit")
MAIN = ("policy_loss", "policy_update")  # their values name a run well enough without the argument's name
LONGEST = 32  # characters of a value in a label


def group_runs(stages: Sequence[Stage], everything: Sequence[Stage]) -> dict[str, list[Stage]]:
    """{label: runs with the same settings and layout, but for the seed}, in the order given.

    A run without run.json is alone. The label is what tells a group from the others, or its first run's name.

    Args: stages: of one kind; everything: all runs of the page, one of which another may have started from.
    """
    origins = {str(other.arguments["output_dir"]): other for other in everything if other.arguments.get("output_dir")}
    groups: dict[Any, list[Stage]] = {}
    for stage in stages:
        settings = settings_of(stage, origins)
        groups.setdefault(tuple(sorted(settings.items())) if settings else str(stage.directory), []).append(stage)
    known = {key: dict(key) for key in groups if isinstance(key, tuple)}
    parts = tell_apart(list(known.values()))
    labels = dict(zip(known, (", ".join(part) for part in parts), strict=True))
    named = {key: labels.get(key) or group[0].name for key, group in groups.items()}
    shown = list(named.values())
    return {
        name if shown.count(name) == 1 else f"{name} ({groups[key][0].name})": groups[key]
        for key, name in named.items()
    }


def settings_of(stage: Stage, origins: Mapping[str, Stage]) -> Settings:
    """What makes a run what it is, without its seed and its places; empty where run.json does not say.

    A model that another run of the page made counts by that run's settings, so that pipelines of several seeds match.
    """
    ignored = {*SEEDS, *PLACES, *SHOWN, *SAVED}
    arguments = {name: value for name, value in stage.arguments.items() if name not in ignored}
    if not arguments:
        return {}
    for name, value in arguments.items():
        if isinstance(value, str) and (origin := _origin(value, stage, origins)):
            arguments[name] = f"{origin.kind} of {sorted(settings_of(origin, origins).items())}"
    layout = stage.run.get("topology", {}) if isinstance(stage.run.get("topology"), dict) else {}
    return flatten({**arguments, "layout": describe_layout(layout)})


def _origin(path: str, stage: Stage, origins: Mapping[str, Stage]) -> Stage | None:
    """The run that wrote a path; only of an earlier stage, so that following it comes to an end."""
    for output_dir, other in origins.items():
        if (path == output_dir or path.startswith(f"{output_dir}/")) and other.rank < stage.rank:
            return other
    return None


def tell_apart(settings: Sequence[Settings]) -> list[list[str]]:
    """For each of several different settings the few values that tell it from the others."""
    if len(settings) < 2:
        return [[] for _ in settings]
    key = max(_differing(settings), key=lambda name: (name in MAIN, len({one.get(name) for one in settings})))
    labels: list[list[str]] = [[] for _ in settings]
    values = list(dict.fromkeys(one.get(key) for one in settings))
    for value, text in zip(values, shorten(values), strict=True):
        places = [place for place, one in enumerate(settings) if one.get(key) == value]
        deeper = tell_apart([settings[place] for place in places])
        for place, more in zip(places, deeper, strict=True):
            labels[place] = [text if key in MAIN else f"{key} {text}", *more]
    return labels


def _differing(settings: Sequence[Settings]) -> Iterator[str]:
    for name in dict.fromkeys(name for one in settings for name in one):
        if len({one.get(name) for one in settings}) > 1:
            yield name


def shorten(values: Sequence[str | None]) -> list[str]:
    """Different values for a label; of long ones what is between the words that all begin and end with."""
    texts = ["not set" if value is None else value for value in values]
    if max(map(len, texts)) <= LONGEST:
        return texts
    start = len(re.match(r"(.*\W)?", os.path.commonprefix(texts), re.DOTALL)[0])
    rests = [text[start:][::-1] for text in texts]
    end = len(re.match(r"(.*\W)?", os.path.commonprefix(rests), re.DOTALL)[0])
    middles = [rest[end:][::-1] for rest in rests]
    cut = [middle if len(middle) <= LONGEST else f"{middle[:LONGEST]}…" for middle in middles]
    return [f"{'…' if start else ''}{middle}{'…' if end else ''}" for middle in cut]


def differences(stages: Sequence[Stage]) -> dict[str, list[str]]:
    """{argument, version or topology that is not the same in all runs: its value in each}; places are left out."""
    flat = [
        flatten(
            {
                **{name: value for name, value in stage.arguments.items() if name not in PLACES},
                **{part: stage.run[part] for part in ("versions", "topology") if part in stage.run},
            }
        )
        for stage in stages
        if stage.run
    ]
    return {name: [one.get(name, "") for one in flat] for name in _differing(flat)}


def describe_layout(topology: Mapping[str, Any]) -> str:
    """The degrees over 1 of run.json's topology, such as "data 2 × tensor 2"."""
    layout = topology.get("layout")
    if not isinstance(layout, dict):
        return ""
    degrees = [
        f"{name} {size}" for name, size in layout.items() if isinstance(size, int) and size > 1 and "stage" not in name
    ]
    device = str(topology.get("device", "")).partition(":")[0]
    return f"{' × '.join(degrees)}, {device}" if degrees else f"1 {device}"
