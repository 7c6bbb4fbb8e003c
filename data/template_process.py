"""Renders chat templates, which come with a model from anywhere, in a process of their own.

Jinja's sandbox keeps a template from Python's insides, but not from running for ever or from filling the memory:
``{{ 9 ** 9 ** 9 }}`` does either in one operation that nothing in the same process could interrupt. So the sandbox
runs in a process whose memory, and processor time for each text, are limited.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

SECONDS = 2
"""Processor time for one text."""
MEMORY_BYTES = 1 << 30


class TemplateError(ValueError):
    """A template cannot be compiled or rendered, or not within the limits; one line says why."""


class _Renderer:
    """The process and the lines to and from it: JSON [source, variables] -> {"text": ...} or {"error": ...}."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path[1:])},
            cwd="/",
        )

    def ask(self, source: str, variables: dict[str, Any]) -> dict[str, str]:
        """The answer. Raises TemplateError if the process ends without one."""
        try:
            self.process.stdin.write(json.dumps([source, variables]).encode() + b"\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (OSError, ValueError):
            status = self.close()
            raise TemplateError(
                f"it takes more than {SECONDS} s of processor time or {MEMORY_BYTES >> 30} GiB of memory ({status})"
            ) from None

    def close(self) -> str:
        """End the process; how it ended."""
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.kill()
        return f"its process ended with {self.process.wait()}"


_renderer: _Renderer | None = None


def render_apart(source: str, variables: dict[str, Any]) -> str:
    """The text of a Jinja template. variables: JSON values by name. Raises TemplateError."""
    global _renderer
    if _renderer is None or _renderer.owner != os.getpid() or _renderer.process.poll() is not None:
        _renderer = _Renderer()
    answer = _renderer.ask(source, variables)
    if "error" in answer:
        raise TemplateError(answer["error"])
    return answer["text"]


def _serve() -> None:
    """The process: limits itself, then answers line after line."""
    import resource
    import signal

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that asks
    compiled: dict[str, Any] = {}
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # its signal ends the process, whatever it is at
        try:
            source, variables = json.loads(line)
            if source not in compiled:
                compiled = {source: _compile(source)}
            answer = {"text": compiled[source].render(**variables)}
        except MemoryError:
            break
        except Exception as error:  # a template may raise anything
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _compile(source: str) -> Any:
    """As transformers compiles chat templates."""
    from datetime import datetime

    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(Extension):
        """``{% generation %}`` marks answers for training masks; here it only shows what it encloses."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **settings: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **settings)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment.from_string(source)


if __name__ == "__main__":
    del sys.path[0]  # this folder, whose files are named like other things
    _serve()
