"""Arguments as dataclass fields: how one is declared, what it accepts, and how it is described to a person."""

from __future__ import annotations

import dataclasses
import enum
import json
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from alignment.runtime.command_line import did_you_mean

BOUND_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
UNUSED_GROUP = "Accepted from PaddleNLP, without effect"
SECRET_ENDINGS = ("_token", "_api_key")
HIDDEN = "***"
LONGEST_SHOWN = 200  # characters of a value in a message


def argument(
    default: Any, help: str, *, group: str, choices: Sequence[str] = (), aliases: Sequence[str] = (), **bounds: float
) -> Any:
    """A dataclass field with help, bounds (gt, ge, lt, le) or choices, other accepted names, and a heading for --help.

    A mutable default is given as a function without parameters.
    """
    metadata = {"help": help, "group": group, "choices": tuple(choices), "aliases": tuple(aliases), **bounds}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Argument:
    """One key: its type, default, and what is allowed. `required` means that it has no default."""

    name: str
    kind: Any
    default: Any
    required: bool
    help: str
    group: str
    choices: tuple[str, ...]
    aliases: tuple[str, ...]
    bounds: dict[str, float]

    @property
    def is_list(self) -> bool:
        return any(typing.get_origin(part) is list for part in self._parts)

    @property
    def is_flag(self) -> bool:
        return bool in self._parts

    @property
    def optional(self) -> bool:
        return type(None) in self._parts

    @property
    def _parts(self) -> tuple[Any, ...]:
        union = typing.get_origin(self.kind) in (typing.Union, types.UnionType)
        return typing.get_args(self.kind) if union else (self.kind,)

    def check(self, value: Any) -> Any:
        """`value`, from JSON or as command-line text, in this argument's type. Raises ValueError: what is allowed."""
        mixes_bool = isinstance(value, bool) and not self.is_flag
        words = value.replace(",", " ").split() if isinstance(value, str) and self.is_list else value
        written = json.dumps(value, default=str)
        shown = HIDDEN if self.name.endswith(SECRET_ENDINGS) else f"{written:.{LONGEST_SHOWN}}"
        if '\\u0000' in written or '\\ud' in written and not is_text(value):
            raise ValueError(f"{shown} is not allowed; it holds a character that is no text")
        try:
            if not mixes_bool:  # pydantic would take true for the number 1
                return self._adapter.validate_python(words)
        except (ValidationError, OverflowError):  # a whole number that is too long for a float
            pass
        given = words if isinstance(words, list) else [words]
        near = did_you_mean(str(next((word for word in given if word not in self.choices), "")), self.choices)
        raise ValueError(f"{shown} is not allowed; it must be {self.describe_allowed()}{near}")

    def read_text(self, text: str) -> Any:
        """Command-line text as a value for `check`: JSON for lists and mappings; null or none where it is allowed."""
        if self.optional and text.lower() in ("none", "null"):
            return None
        if text[:1] in ("{", "[") and (self.is_list or "dict" in str(self.kind)):
            try:
                return json.loads(text)
            except json.JSONDecodeError as fault:
                raise ValueError(
                    f"{text:.{LONGEST_SHOWN}} is not valid JSON: {fault.msg} at character {fault.pos + 1}"
                ) from None
            except RecursionError:
                raise ValueError(f"{text:.{LONGEST_SHOWN}} is nested too deeply") from None
        return text

    @property
    def _adapter(self) -> TypeAdapter:
        kinds = [self._constrain(kind) for kind in self._parts]
        return TypeAdapter(typing.Union[tuple(kinds)])  # noqa: UP007 (a union made at run time)

    def _constrain(self, kind: Any) -> Any:
        if self.choices and kind is str:
            return Literal[self.choices]
        if self.choices and typing.get_origin(kind) is list:
            return list[Literal[self.choices]]
        if kind is float:
            return Annotated[float, Field(allow_inf_nan=False, **self.bounds)]
        return Annotated[int, Field(**self.bounds)] if kind is int else kind

    def describe_allowed(self) -> str:
        """E.g. "a number > 0 and <= 1", "one of ppo, apa, awr"."""
        words = [self._describe(kind) for kind in self._parts if kind is not type(None)]
        return " or ".join(words) + (" or null" if self.optional else "")

    def _describe(self, kind: Any) -> str:
        if isinstance(kind, type) and issubclass(kind, enum.Enum):
            return "one of " + ", ".join(member.value for member in kind)
        if typing.get_origin(kind) is list:
            inner = ", ".join(self.choices)
            return f"a list of {inner}" if inner else f"a list of {self._describe(typing.get_args(kind)[0])}"
        if kind is str and self.choices:
            return "one of " + ", ".join(choice or '""' for choice in self.choices)
        names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
        limits = " and ".join(f"{BOUND_SIGNS[key]} {bound}" for key, bound in self.bounds.items())
        return (names.get(kind, "a mapping") + (f" {limits}" if kind in (int, float) else "")).strip()


def is_text(value: Any) -> bool:
    """Whether all texts in a JSON value can be written as UTF-8, so hold no half of a surrogate pair."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return False
    return True


def hide_secrets(values: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name, with secrets that are set replaced by HIDDEN, also in an argument that is an object."""
    shown = {name: hide_secrets(value) if isinstance(value, dict) else value for name, value in values.items()}
    return {name: HIDDEN if value and name.endswith(SECRET_ENDINGS) else value for name, value in shown.items()}


def without_secrets(values: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name, but no secret: what they come to does not depend on these."""
    return {name: value for name, value in values.items() if not name.endswith(SECRET_ENDINGS)}


def arguments_of(owner: type) -> list[Argument]:
    """The arguments a dataclass declares: its own in order of declaration, then inherited PaddleNLP ones by heading.

    A class that inherits fields it did not write gives them headings in `INHERITED` ({group: names}) and limits in
    `LIMITS` ({name: bounds or choices}); inherited fields under no heading have no effect (UNUSED_GROUP).
    """
    hints = typing.get_type_hints(owner)
    headings = {name: group for group, names in getattr(owner, "INHERITED", {}).items() for name in names}
    limits = getattr(owner, "LIMITS", {})
    fields = [field for field in dataclasses.fields(owner) if field.init]
    places = {name: place for place, name in enumerate(headings)}
    fields.sort(key=lambda field: -1 if "group" in field.metadata else places.get(field.name, len(places)))
    return [
        _read_field(field, hints[field.name], headings.get(field.name, UNUSED_GROUP), limits.get(field.name, {}))
        for field in fields
    ]


def _read_field(field: dataclasses.Field, kind: Any, heading: str, limits: dict[str, Any]) -> Argument:
    metadata = {**field.metadata, **limits}
    required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    default = None if required else field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    if default is None and not required:
        kind = kind | None
    return Argument(
        name=field.name,
        kind=kind,
        default=default,
        required=required,
        help=metadata.get("help", ""),
        group=metadata.get("group", heading),
        choices=tuple(metadata.get("choices", ())),
        aliases=tuple(metadata.get("aliases", ())),
        bounds={key: metadata[key] for key in BOUND_SIGNS if key in metadata},
    )
