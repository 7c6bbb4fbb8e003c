"""Reads and writes the files of APO's rounds. Reading is strict: a fault names file, place in it and field."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import ValidationError

from alignment.apo.schemas import ANSWERS, Comparison, Golden, Item, Samples, Scores
from alignment.runtime.faults import UsageError
from alignment.runtime.files import write_text
from data.errors import DataError
from data.limits import ARRAY_BYTES, check_json, read_text, reason_of

ItemType = TypeVar("ItemType", bound=Item | Scores)
_SPACE = re.compile(r"[ \t\n\r]*")


class Placed(NamedTuple):
    """An item of one of the schemas, and where it was found: "file, line 3" or "file, item 2 (line 7)"."""

    item: Any
    where: str


def read_items(path: str | Path, schema: type[ItemType]) -> list[Placed]:
    """All items of a file: the entries of one JSON array, or one JSON object a line.

    Raises: UsageError for a file that cannot be read, has no items, or has one that ``schema`` refuses.
    """
    return [Placed(check_item(schema, values, where), where) for where, values in _read_objects(Path(path))]


def read_answers(path: str | Path) -> list[Placed]:
    """As ``read_items`` of a file with answers; the columns of its first item say which kind it is."""
    objects = _read_objects(Path(path))
    where, first = objects[0]
    columns = first if isinstance(first, dict) else {}
    if "text" in columns:
        schema = Comparison
    elif any(name.startswith("sample_") for name in columns):
        schema = Samples
    elif "golden" in columns:
        schema = Golden
    else:
        raise UsageError(
            f'{where}: has no answers: one of the columns "sample_0", "golden" and "text" is needed; it has: '
            f"{', '.join(columns) or 'none'}"
        )
    return [Placed(check_item(schema, values, where), where) for where, values in objects]


def check_item(schema: type[ItemType], values: Any, where: str) -> ItemType:
    """The item that a JSON value describes. Raises UsageError: ``where``, field, value, what is allowed."""
    try:
        return schema.model_validate(values)
    except ValidationError as fault:
        raise UsageError(f"{where}: {_describe(fault, values)}") from None


def index_by_query(entries: Sequence[Placed]) -> tuple[dict[str, Placed], int]:
    """The items by query_id, and how many were left out because an equal one stands before them.

    Raises: UsageError, naming both places, for two different items with one query_id.
    """
    found: dict[str, Placed] = {}
    for entry in entries:
        other = found.setdefault(entry.item.query_id, entry)
        if other.item != entry.item:
            raise UsageError(
                f'{entry.where}: field "query_id": {entry.item.query_id!r:.60} names another item too ({other.where})'
            )
    return found, len(entries) - len(found)


def describe_counts(counts: Mapping[str, int]) -> str:
    """The counts that are not 0, in words."""
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count) or "nothing left out"


def write_items(path: Path, items: Iterable[dict[str, Any]]) -> None:
    """One item a line, as one array where the name ends in .json. The file appears complete or not at all."""
    lines = [json.dumps(item, ensure_ascii=False, allow_nan=False) for item in items]
    text = "[\n" + ",\n".join(lines) + "\n]\n" if path.suffix == ".json" else "".join(line + "\n" for line in lines)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as fault:
        raise UsageError(f"{path}: cannot be written: {fault.strerror or fault}") from None


def _read_objects(path: Path) -> list[tuple[str, Any]]:
    """(where, JSON value) of every item."""
    try:
        text = read_text(path, ARRAY_BYTES)
    except DataError as fault:
        raise UsageError(str(fault)) from None
    except OSError as fault:
        raise UsageError(f"{path}: {fault.strerror or fault}") from None
    decoder = json.JSONDecoder(object_pairs_hook=_refuse_repeats, parse_constant=_refuse_constant)
    is_array = text.lstrip().startswith("[")
    objects = list(_walk_array(decoder, text, path) if is_array else _walk_lines(decoder, text, path))
    if not objects:
        raise UsageError(f"{path}: has no items")
    return objects


def _walk_lines(decoder: json.JSONDecoder, text: str, path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            value, end = _decode(decoder, line, _skip(line, 0), where)
            if line[end:].strip():
                raise UsageError(f"{where}: more than one JSON object; a .json file with one array is read too")
            yield where, value


def _walk_array(decoder: json.JSONDecoder, text: str, path: Path) -> Iterator[tuple[str, Any]]:
    place, line, counted = text.index("[") + 1, 1, 0
    number, more = 0, text[_skip(text, place) :][:1] != "]"
    while more:
        place, number = _skip(text, place), number + 1
        line, counted = line + text.count("\n", counted, place), place
        where = f"{path}, item {number} (line {line})"
        value, place = _decode(decoder, text, place, where)
        yield where, value
        place = _skip(text, place)
        if text[place : place + 1] not in (",", "]"):
            raise UsageError(f"{where}: a ',' or ']' is missing after it")
        more = text[place] == ","
        place += more
    if text[_skip(text, place) + 1 :].strip():
        raise UsageError(f"{path}: text follows the end of its array")


def _decode(decoder: json.JSONDecoder, text: str, start: int, where: str) -> tuple[Any, int]:
    try:
        value, end = decoder.raw_decode(text, start)
        check_json(text[start:end], value)
    except json.JSONDecodeError as fault:
        raise UsageError(f"{where}: no JSON: {fault.msg} at {text[fault.pos : fault.pos + 20]!r}") from None
    except (ValueError, RecursionError) as fault:
        raise UsageError(f"{where}: {reason_of(fault)}") from None
    return value, end


def _skip(text: str, place: int) -> int:
    """Where the next thing begins that is no white space."""
    return _SPACE.match(text, place).end()


def _refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f'field "{next(name for name in names if names.count(name) > 1)}": given twice')
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _describe(fault: ValidationError, values: Any) -> str:
    """The first thing that is wrong, in one line."""
    error = fault.errors(include_url=False)[0]
    field = ".".join(str(part) for part in error["loc"] if part not in (ANSWERS, "[key]")) or ANSWERS
    if error["type"] == "missing":
        has = ", ".join(map(str, values)) if isinstance(values, dict) else "none"
        return f'field "{field}": missing; the item has: {has or "none"}'
    message = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:  # the item as a whole
        return message if isinstance(values, dict) else f"{values!r:.60} is no JSON object"
    return f'field "{field}": {error["input"]!r:.60} is not allowed: {message[:1].lower()}{message[1:]}'
