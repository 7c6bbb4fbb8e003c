"""Reads a stage's arguments: a JSON file, then `--key value` overrides; all are checked before anything is built."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from alignment.runtime.argument_fields import UNUSED_GROUP, Argument, arguments_of
from alignment.runtime.faults import UsageError


def parse(argv: Sequence[str], groups: Sequence[type], program: str | None = None) -> tuple[Any, ...]:
    """One instance of every dataclass in `groups`, in their order, from `[config.json] [--key value ...]`.

    Raises UsageError (one line: where, key, value, what is allowed) for an unknown key, a wrong type, a value out of
    bounds, a combination that a class's `validate` refuses, and a file that is missing or no JSON object.
    """
    return instances(resolve(argv, groups, program), groups)


def instances(values: dict[str, Any], groups: Sequence[type]) -> tuple[Any, ...]:
    """One instance of every dataclass in `groups`, in their order, from all arguments by name."""
    return tuple(group(**{f.name: values[f.name] for f in fields(group) if f.init}) for group in groups)


def resolve(argv: Sequence[str], groups: Sequence[type], program: str | None = None) -> dict[str, Any]:
    """As `parse`, but the checked values of all arguments by name, defaults included; independent of this machine."""
    known = {argument.name: argument for group in groups for argument in arguments_of(group)}
    given = _read_sources(list(argv), known, groups, program)
    values: dict[str, Any] = {}
    for name, argument in known.items():
        if name in given:
            source, value = given[name]
            values[name] = _check(argument, value, source)
        elif argument.required:
            raise UsageError(f'"{name}": required; give it in the JSON file or as --{name} ({argument.help})')
        else:
            values[name] = argument.check(argument.default)
    for group in groups:
        if hasattr(group, "validate"):
            group.validate(values)
    idle = [n for n in given if n in known and known[n].group == UNUSED_GROUP and values[n] != known[n].default]
    _notify_without_effect(idle + [name for name in given if name not in known])
    return values


def _check(argument: Argument, value: Any, source: str) -> Any:
    try:
        return argument.check(value)
    except ValueError as fault:
        raise UsageError(f"{source}: {fault}") from None


def _read_sources(
    argv: list[str], known: dict[str, Argument], groups: Sequence[type], program: str | None
) -> dict[str, tuple[str, Any]]:
    """{name: (where it was given, raw value)}; the command line wins over the file."""
    names = {alias: argument.name for argument in known.values() for alias in (argument.name, *argument.aliases)}
    names |= {name: name for group in groups for name in getattr(group, "LEGACY", ())}
    file = argv.pop(0) if argv and not argv[0].startswith("-") else None
    given: dict[str, tuple[str, Any]] = {}
    pairs = [(f'{file}: "{key}"', key, value) for key, value in (read_json_object(file) if file else {}).items()]
    _collect(pairs, names, given)
    overrides: dict[str, tuple[str, Any]] = {}
    _collect(_read_command_line(argv, known, names, program), names, overrides)
    return given | overrides


def _collect(pairs: list[tuple[str, str, Any]], names: dict[str, str], given: dict[str, tuple[str, Any]]) -> None:
    for source, key, value in pairs:
        if key not in names:
            raise UsageError(f"{source}: unknown key{_suggest(key, names)}")
        if names[key] in given:
            raise UsageError(f"{source}: given twice, also as {given[names[key]][0]}")
        given[names[key]] = (source, value)


def _suggest(key: str, names: dict[str, str]) -> str:
    near = difflib.get_close_matches(key, names, n=1)
    return f' (did you mean "{near[0]}"?)' if near else "; --help lists the keys"


def read_json_object(file: str | Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UsageError naming file, line and column."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
        content = json.loads(text, object_pairs_hook=_refuse_repeats, parse_constant=_refuse_constant)
    except json.JSONDecodeError as fault:
        raise UsageError(f"{file}: line {fault.lineno}, column {fault.colno}: {fault.msg}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{file}: not a UTF-8 text file") from None
    except OSError as fault:
        raise UsageError(f"{file}: {fault.strerror or fault}") from None
    except (ValueError, RecursionError) as fault:
        raise UsageError(f"{file}: {fault}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{file}: must hold one JSON object of arguments, not {type(content).__name__}")
    return content


def _refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise ValueError(f'"{key}": given twice')
        seen[key] = value
    return seen


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UsageError(f"command line: {message}")


def _read_command_line(
    argv: list[str], known: dict[str, Argument], names: dict[str, str], program: str | None
) -> list[tuple[str, str, Any]]:
    parser = build_parser(known, program)
    for name in names.keys() - known.keys():
        if names[name] == name:
            parser.add_argument(
                f"--{name}", nargs="?", const="true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
            )
    parsed, rest = parser.parse_known_args(argv)
    for text in rest:
        if not text.startswith("--"):
            raise UsageError(f"command line: unexpected {text!r}; the JSON file comes first, then --key value")
        key = text[2:].partition("=")[0]
        raise UsageError(f"command line: --{key}: unknown key{_suggest(key, names)}")
    pairs = []
    for name, raw in vars(parsed).items():
        source = f"command line: --{name}"
        pairs.append((source, name, _read_text(known[name], raw, source) if name in known else raw))
    return pairs


def _read_text(argument: Argument, raw: str | list[str], source: str) -> Any:
    words = raw if isinstance(raw, list) else [raw]
    try:
        read = [argument.read_text(word) for word in words]
    except ValueError as fault:
        raise UsageError(f"{source}: {fault}") from None
    return read if len(words) > 1 else read[0]


def build_parser(known: dict[str, Argument], program: str | None = None) -> argparse.ArgumentParser:
    """The command line's grammar and --help: our groups in order; names only for what has no effect."""
    idle = [name for name, argument in known.items() if argument.group == UNUSED_GROUP]
    parser = _Parser(
        prog=program,
        usage="%(prog)s [config.json] [--key value ...]",
        description="Arguments come from the JSON file; --key value overrides a key.",
        epilog=f"{UNUSED_GROUP}: {', '.join(idle)}" if idle else None,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    headings: dict[str, Any] = {}
    for name, argument in known.items():
        heading = headings.setdefault(argument.group, None) or parser.add_argument_group(argument.group)
        headings[argument.group] = heading
        settings: dict[str, Any] = {"help": argparse.SUPPRESS if name in idle else _help_line(argument)}
        if argument.is_list:
            settings["nargs"] = "+"
        elif argument.is_flag:
            settings |= {"nargs": "?", "const": "true"}
        options = [f"--{option}" for option in (name, *argument.aliases)]
        heading.add_argument(*options, dest=name, metavar=name.rsplit("_", 1)[-1].upper(), **settings)
    return parser


def _help_line(argument: Argument) -> str:
    default = "required" if argument.required else f"default {json.dumps(argument.default, default=str)}"
    return f"{argument.help} [{argument.describe_allowed()}; {default}]".replace("%", "%%")


def _notify_without_effect(names: list[str]) -> None:
    if names and int(os.environ.get("PADDLE_TRAINER_ID") or 0) == 0:
        print(f"notice: accepted, without effect here: {', '.join(sorted(names))}", file=sys.stderr, flush=True)
