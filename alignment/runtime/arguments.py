"""Reads a stage's arguments: a JSON file, then `--key value` overrides; all are checked before anything is built."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from alignment.runtime.argument_fields import (
    HIDDEN,
    SECRET_ENDINGS,
    UNUSED_GROUP,
    Argument,
    arguments_of,
    hide_secrets,
)
from alignment.runtime.command_line import CommandParser, did_you_mean
from alignment.runtime.faults import UsageError
from alignment.runtime.metrics import is_main_process
from alignment.runtime.paddlenlp_keys import NOTES
from data.errors import DataError
from data.limits import parse_json, read_text, reason_of

PRINT = "print_config"  # an option of every command that takes arguments, but no key: it stands in no file


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
    """As `parse`, but the checked values of all arguments by name, defaults included; independent of this machine.

    With --print_config they are printed, and the program ends as after --help.
    """
    known = {argument.name: argument for group in groups for argument in arguments_of(group)}
    given = _read_sources(list(argv), known, groups, program)
    printing = given.pop(PRINT, None) is not None
    values: dict[str, Any] = {PRINT: printing}  # whoever prints need not have started the job's processes
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
    del values[PRINT]
    idle = [n for n in given if n in known and known[n].group == UNUSED_GROUP and values[n] != known[n].default]
    _notify_without_effect(idle + [name for name in given if name not in known])
    if printing:
        _print_config(values, known)
        raise SystemExit(0)
    return values


def _print_config(values: dict[str, Any], known: dict[str, Argument]) -> None:
    """All arguments that have an effect, as an argument file holds them; secrets hidden. On rank 0."""
    shown = hide_secrets({name: value for name, value in values.items() if known[name].group != UNUSED_GROUP})
    if is_main_process():
        print(json.dumps(shown, indent=2, default=lambda member: member.value))


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
    content = read_json_object(file) if file else {}
    pairs = [(f"{file}: {json.dumps(key, ensure_ascii=False):.99}", key, value) for key, value in content.items()]
    _collect(pairs, names, given)
    overrides: dict[str, tuple[str, Any]] = {}
    _collect(_read_command_line(argv, known, names, program), names | {PRINT: PRINT}, overrides)
    given |= overrides
    return {name: pair for name, pair in given.items() if not (name.endswith(SECRET_ENDINGS) and pair[1] == HIDDEN)}


def _collect(pairs: list[tuple[str, str, Any]], names: dict[str, str], given: dict[str, tuple[str, Any]]) -> None:
    for source, key, value in pairs:
        if key not in names:
            raise UsageError(f"{source}: unknown key{_suggest(key, names)}")
        if names[key] in given:
            raise UsageError(f"{source}: given twice, also as {given[names[key]][0]}")
        given[names[key]] = (source, value)


def _suggest(key: str, names: dict[str, str]) -> str:
    return did_you_mean(key, names, "--help lists the keys")


def read_json_object(file: str | Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UsageError naming file, line and column."""
    try:
        text = read_text(Path(file))
        content = parse_json(text, object_pairs_hook=_refuse_repeats, parse_constant=_refuse_constant)
    except json.JSONDecodeError as fault:
        raise UsageError(f"{file}: line {fault.lineno}, column {fault.colno}: {fault.msg}") from None
    except DataError as fault:
        raise UsageError(str(fault)) from None
    except OSError as fault:
        raise UsageError(f"{file}: {fault.strerror or fault}") from None
    except ValueError as fault:
        raise UsageError(f"{file}: {reason_of(fault)}") from None
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


def _read_command_line(
    argv: list[str], known: dict[str, Argument], names: dict[str, str], program: str | None
) -> list[tuple[str, str, Any]]:
    parser = build_parser(known, program)
    parser.add_argument(
        f"--{PRINT}", action="store_true", help="Print the resolved arguments as a JSON file holds them, and leave."
    )
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
        raise UsageError(f"command line: --{key}: unknown key{_suggest(key, names | {PRINT: PRINT})}")
    pairs = [("", PRINT, True)] if vars(parsed).pop(PRINT, False) else []
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
    parser = CommandParser(
        prog=program,
        usage="%(prog)s [config.json] [--key value ...]",
        description="Arguments come from the JSON file; --key value overrides a key.",
        epilog=f"{UNUSED_GROUP}: {', '.join(idle)}" if idle else None,
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
    if not is_main_process():
        return
    noted = sorted(name for name in names if name in NOTES)
    others = ", ".join(sorted(name for name in names if name not in NOTES))
    for line in [f"{name}: {NOTES[name]}" for name in noted] + [others] * bool(others):
        print(f"notice: accepted, without effect here: {line}", file=sys.stderr, flush=True)
