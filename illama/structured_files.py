"""The gate for JSON and YAML from outside: one typed value, or one error in one line.

A file is read into a type: a dataclass, or ``dict[str, float]`` and the like. Every value must have the type that its
field declares (pydantic in strict mode: no text becomes a number), and an unknown key is an error. YAML may hold only
what JSON can: no aliases, no tags, no dates. Size and depth are limited before anything is built.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, cast, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, Event, NodeEvent

from illama.errors import UserError, shorten

T = TypeVar("T")
Unknown = Literal["forbid", "ignore"]
MAX_JSON_BYTES, MAX_YAML_BYTES, MAX_TEXT_BYTES = 256 << 20, 1 << 20, 16 << 20
MAX_DEPTH = 50  # of lists and mappings in a YAML file; JSON's limit is pydantic's, 200
# Scalars of YAML 1.2: its tag, the pattern, and the characters that it starts with. All others are text.
_SCALARS = (
    ("null", r"null|Null|NULL|~|", [*"nN~", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", [*"-+0123456789"]),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        [*"-+0123456789."],
    ),
)
_REASONS: dict[type[Exception], str] = {FileNotFoundError: "it does not exist", IsADirectoryError: "it is a folder"}


def read_json(path: Path, kind: type[T], unknown: Unknown = "forbid") -> T:
    """Reads a JSON file into ``kind``.

    Args:
        kind: a dataclass, whose fields may be dataclasses too, or another type that pydantic validates.
        unknown: what to do with keys that a dataclass does not have.

    Raises:
        UserError: the file cannot be read, is larger than :data:`MAX_JSON_BYTES`, or does not fit ``kind``.
    """
    return parse_json(read_bytes(path, MAX_JSON_BYTES), kind, str(path), unknown)


def parse_json(text: str | bytes, kind: type[T], name: str, unknown: Unknown = "forbid") -> T:
    """Returns JSON text as ``kind``; see :func:`read_json`.

    Args:
        name: name of the text's source for error messages.
    """
    whole = text if isinstance(text, bytes) else text.encode()
    try:
        # In a tuple, because pydantic takes no settings for a dataclass itself.
        return cast("tuple[T]", _adapter(cast(Any, kind), unknown).validate_json(b"[" + whole + b"\n]"))[0]
    except ValidationError as error:
        raise UserError(f"{name} is damaged: {_first(error)}") from error
    except UserError as error:  # of a dataclass that checks its values
        raise UserError(f"{name}: {error}") from error


def read_yaml(path: Path, kind: type[T]) -> T:
    """Reads a YAML file into ``kind``, as :func:`read_json` does; an empty file is an empty mapping.

    Raises:
        UserError: the file cannot be read, is larger than :data:`MAX_YAML_BYTES`, holds what JSON has no word for, or
            does not fit ``kind``.
    """
    content = read_bytes(path, MAX_YAML_BYTES)
    try:
        _check_events(yaml.parse(content, Loader=yaml.SafeLoader))
        values = yaml.load(content, Loader=_PlainLoader)
        text = json.dumps({} if values is None else values)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"cannot read {path} as YAML: {_problem(error)}") from error
    return parse_json(text, kind, str(path))


def to_yaml(values: Mapping[str, Any]) -> str:
    """Returns plain values as YAML that :func:`read_yaml` reads back: text that looks like a number is quoted."""
    return yaml.dump(values, Dumper=_PlainDumper, sort_keys=False, width=120)


def read_text(path: Path) -> str:
    """Returns a UTF-8 file; raises UserError if it cannot be read, exceeds :data:`MAX_TEXT_BYTES`, or is not text."""
    try:
        return read_bytes(path, MAX_TEXT_BYTES).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a UTF-8 text file") from error


def read_bytes(path: Path, limit: int) -> bytes:
    """Returns the content of a regular file of at most ``limit`` bytes; raises UserError for any other path."""
    check_regular(path)
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise UserError(f"{path} is larger than {limit >> 20} MiB: it cannot be such a file")
    return content


def read_lines(path: Path) -> list[str]:
    """Returns the lines of a UTF-8 file that are not empty, without spaces around them.

    Raises:
        UserError: the file cannot be read, is larger than :data:`MAX_TEXT_BYTES`, or is not text.
    """
    lines = read_text(path).splitlines()
    return [line.strip() for line in lines if line.strip()]


def check_regular(path: Path) -> None:
    """Raises UserError unless a file can be opened and is no folder, pipe or device, which could block or never end."""
    try:
        if not (path.is_file() or path.is_dir()) and path.stat():
            raise UserError(f"cannot read {path}: it is not a regular file")
        path.open("rb").close()
    except (OSError, ValueError) as error:  # ValueError: the path holds a NUL byte
        reason = _REASONS.get(type(error)) or getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot read {path}: {reason}") from error


_PROBLEMS = dict.fromkeys(("unexpected_keyword_argument", "extra_forbidden"), "unknown key")
_PROBLEMS |= {"missing_argument": "missing key"}


def check_fields(instance: Any, name_of: Callable[[str], str] = str) -> None:
    """Raises UserError for the first field of a dataclass, also of one inside it, whose value does not fit its type.

    Args:
        name_of: field -> its name in the message.
    """
    hints = get_type_hints(type(instance), include_extras=True)
    for each in fields(instance):
        value = getattr(instance, each.name)
        if is_dataclass(value):
            check_fields(value, name_of)
            continue
        try:
            _adapter(hints[each.name], "forbid").validate_python((value,))
        except ValidationError as error:
            raise UserError(f"{name_of(each.name)}: {_message(error)}, not {value!s:.40}") from error


@cache
def _adapter(kind: Any, unknown: Unknown) -> TypeAdapter[Any]:
    return TypeAdapter(tuple[kind], config=ConfigDict(extra=unknown, strict=True, hide_input_in_errors=True))


def _first(error: ValidationError) -> str:
    """Returns the first problem with its place, such as "preprocessing.size.0: input should be a valid integer"."""
    place = ".".join(shorten(str(key), 60) for key in error.errors()[0]["loc"][1:])
    return f"{place}: {_message(error)}" if place else _message(error)


def _message(error: ValidationError) -> str:
    first = error.errors()[0]
    return _PROBLEMS.get(first["type"]) or first["msg"][0].lower() + first["msg"][1:]


class _PlainLoader(yaml.SafeLoader):
    """Builds the values that JSON has, and mappings with text keys only; an unquoted date is a text."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if repeated := next((key for key in keys if keys.count(key) > 1), None):
            raise ValueError(f"the key {shorten(str(repeated), 60)!r} is given twice")
        return super().construct_mapping(node, deep)


class _PlainDumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would read as another type, such as 1E1."""


for _tag, _pattern, _first_characters in _SCALARS:
    for _kind in (_PlainLoader, _PlainDumper):
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _first_characters)


def _check_events(events: Iterable[Event]) -> None:
    """Raises ValueError for an alias, an explicit tag, or nesting that is too deep."""
    depth = 0
    for event in events:
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if isinstance(event, AliasEvent):
            raise ValueError("it uses an alias (*name): write the value out")
        if isinstance(event, NodeEvent) and getattr(event, "tag", None):
            raise ValueError("it uses a tag (!name): only plain values are read")
        if depth > MAX_DEPTH:
            raise ValueError(f"its values are nested more than {MAX_DEPTH} deep")


def _problem(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    return f"{problem}, line {mark.line + 1}" if mark else problem
