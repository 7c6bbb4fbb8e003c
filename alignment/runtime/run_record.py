"""run.json: what a run was, so that it can be repeated: resolved arguments, versions, topology."""

from __future__ import annotations

import enum
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from alignment import __version__
from alignment.runtime.argument_fields import (
    HIDDEN,
    SECRET_ENDINGS,
    UNUSED_GROUP,
    Argument,
    arguments_of,
    hide_secrets,
)
from alignment.runtime.files import write_text
from alignment.runtime.metrics import is_main_process, told_faults

PACKAGES = ("paddlepaddle", "paddlepaddle-gpu", "paddlenlp", "numpy", "datasets", "safetensors", "tokenizers")


def write_run_record(output_dir: str | Path, stage: str, arguments: Sequence[Any]) -> None:
    """Writes output_dir/run.json on rank 0. `arguments`: the instances that alignment.runtime.arguments.parse gave.

    Raises: RunError if it cannot be written.
    """
    if not is_main_process():
        return
    record = {
        "stage": stage,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": [_hide_secret(word, before) for before, word in zip(["", *sys.argv], sys.argv, strict=False)],
        "arguments": resolved_arguments(arguments),
        "versions": _versions(),
        "topology": _topology(),
    }
    path = Path(output_dir) / "run.json"
    with told_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(record, indent=2, default=str) + "\n")


def resolved_arguments(arguments: Sequence[Any]) -> dict[str, Any]:
    """{name: value} of every argument that has an effect, as an argument file can hold it; secrets become "***"."""
    values: dict[str, Any] = {}
    for group in arguments:
        for argument in arguments_of(type(group)):
            if argument.group != UNUSED_GROUP:
                values[argument.name] = _plain(argument, getattr(group, argument.name))
    return hide_secrets(values)


def _plain(argument: Argument, value: Any) -> Any:
    if argument.kind is str and isinstance(value, list):  # PaddleNLP splits "sharding" into its words
        return " ".join(getattr(word, "value", word) for word in value)
    return value.value if isinstance(value, enum.Enum) else value


def _hide_secret(word: str, before: str) -> str:
    key, sign, _ = word.partition("=")
    if sign and key.endswith(SECRET_ENDINGS):
        return f"{key}={HIDDEN}"
    return HIDDEN if before.startswith("--") and before.endswith(SECRET_ENDINGS) else word


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "paddle-alignment": __version__}
    found |= {package: _version(package) for package in PACKAGES}
    return {name: version for name, version in found.items() if version}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _topology() -> dict[str, Any]:
    import paddle

    from alignment.parallel.topology import topology

    return {
        "layout": asdict(topology().layout),
        "processes": int(os.environ.get("PADDLE_TRAINERS_NUM") or 1),
        "processes_here": int(os.environ.get("PADDLE_LOCAL_SIZE") or 1),
        "nodes": int(os.environ.get("PADDLE_NNODES") or 1),
        "device": paddle.get_device(),
        "threads": int(os.environ.get("MKL_NUM_THREADS") or 0) or None,
        "machine": platform.machine(),
    }
