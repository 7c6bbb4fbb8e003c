"""Steps whose commands read an argument file, and how each kind goes on after an interruption."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.runtime import steps
from alignment.runtime.argument_fields import hide_secrets, without_secrets
from alignment.runtime.files import write_text
from alignment.runtime.steps import Step

SCRIPTS = {
    "sample": "apo/run_sample.py",
    "score": "apo/run_score.py",
    "reward": "rm/run_reward.py",
    "policy": "apo/run_update.py",
}


@dataclass(frozen=True)
class StageStep(Step):
    """A step whose command reads an argument file, which it writes before.

    stage: a key of SCRIPTS; arguments: what stands in the file.
    """

    stage: str = ""
    arguments: Mapping[str, Any] | None = None
    argument_file: Path = Path()

    def describe(self) -> dict[str, Any]:
        return super().describe() | without_secrets(self.arguments)

    def begin(self) -> str:
        command = super().begin()
        self.write_arguments()
        return command

    def write_arguments(self) -> None:
        """Write the file; one that holds a secret is for its owner's eyes only."""
        has_secret = hide_secrets(self.arguments) != self.arguments
        self.argument_file.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.argument_file, json.dumps(self.arguments, indent=2) + "\n", private=has_secret)


class TrainingStep(steps.TrainingStep, StageStep):
    """A stage of training."""


class FileStep(StageStep):
    """Keeps what is finished by itself, and writes its output in the end as one act."""

    def begin(self) -> str:
        self._partial.unlink(missing_ok=True)
        return super().begin()

    def go_on(self) -> str | None:
        if not self.output.exists():
            self.write_arguments()  # a secret may be another now
            return self.command
        self._partial.unlink(missing_ok=True)
        return None

    @property
    def _partial(self) -> Path:
        return self.output.with_name(f"{self.output.name}.partial.jsonl")
