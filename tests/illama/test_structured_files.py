"""The gate for JSON and YAML: typed values, or one error in one line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from illama.errors import MAX_MESSAGE, UserError
from illama.structured_files import parse_json, read_json, read_yaml, to_yaml

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@dataclass(frozen=True)
class Part:
    size: tuple[int, int]
    mean: tuple[float, ...] = ()


@dataclass(frozen=True)
class Whole:
    part: Part
    name: str = ""


@settings(deadline=None)
@given(st.dictionaries(st.text(), PLAIN, max_size=4))
def test_what_json_and_yaml_write_is_read_back(values: dict[str, Any]) -> None:
    assert parse_json(json.dumps(values), dict[str, Any], "values") == values


@settings(deadline=None)
@given(st.dictionaries(st.text("abc .:-#'\"", min_size=1), st.integers() | st.text("ab1eE.:-~ #") | st.floats(-9, 9)))
@example({":": "1E1"})  # text for YAML 1.1, a number for YAML 1.2
def test_yaml_of_plain_values_is_read_back(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("yaml") / "values.yaml"
    path.write_text(to_yaml(values))
    assert read_yaml(path, dict[str, Any]) == values


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 0.001), ("2024-13-45", "2024-13-45"), ("yes", "yes"), ("12:30", "12:30"), ("0x10", "0x10"), ("~", None)],
)
def test_scalars_are_those_of_yaml_1_2(tmp_path: Path, text: str, value: object) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(f"key: {text}\n")
    assert read_yaml(path, dict[str, Any]) == {"key": value}


BAD_YAML = {
    "tag": "summary: !!int ''",
    "python": "a: !!python/object/apply:os.getcwd []",
    "alias": "a: &x [1]\nb: *x",
    "bomb": "a: &a [1, 1]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)),
    "deep lists": "[" * 100_000,
    "deep mappings": "{a: " * 10_000,
    "deep blocks": "- " * 10_000 + "1",
    "repeated key": "a: 1\na: 2",
    "list as a key": "? [a]\n: 1",
    "long number": "a: " + "9" * 5000,
    "NUL": "\x00",
    "two documents": "--- 1\n--- 2",
    "a list": "[1]",
    "unfinished": "a: [1",
}


@pytest.mark.parametrize("text", BAD_YAML.values(), ids=BAD_YAML)
def test_yaml_that_is_not_plain_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    assert_refused(path, lambda: read_yaml(path, dict[str, Any]))


BAD_JSON = {
    "empty": "",
    "text for a number": '{"part": {"size": [1, "2"]}}',
    "true for a number": '{"part": {"size": [1, true]}}',
    "three sizes": '{"part": {"size": [1, 2, 3]}}',
    "missing": '{"part": {}}',
    "unknown": '{"part": {"size": [1, 2]}, "x\\ny": 1}',
    "deep": "[" * 100_000,
    "long number": '{"part": {"size": [1, ' + "9" * 5000 + "]}}",
    "long key": json.dumps({"part": {"size": [1, 2]}, "k" * 100_000: 1}),
    "comment": '{"part": {"size": [1, 2]}} // a comment',
    "two values": '{"part": {"size": [1, 2]}}, {}',
}


@pytest.mark.parametrize("text", BAD_JSON.values(), ids=BAD_JSON)
def test_json_that_does_not_fit_its_type_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    assert_refused(path, lambda: read_json(path, Whole))


def test_json_is_read_into_nested_dataclasses(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"part": {"size": [1, 2], "mean": [1]}, "new": 0}')
    assert read_json(path, Whole, unknown="ignore") == Whole(Part((1, 2), (1.0,)))
    with pytest.raises(UserError, match="new"):
        read_json(path, Whole)


@pytest.mark.parametrize("name", ["missing", "n" * 5000, "nul\0", ".", "loop", "/dev/zero", "line\nbreak"])
def test_paths_that_cannot_be_read_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert_refused(Path("/dev/zero") if name == "/dev/zero" else tmp_path, lambda: read_json(tmp_path / name, Whole))


def test_a_long_message_keeps_its_beginning_and_its_end() -> None:
    message = str(UserError(f"first {'x' * 1000} last"))
    assert len(message) == MAX_MESSAGE and message.startswith("first x") and message.endswith("x last")


def test_an_error_of_a_data_loaders_worker_is_its_last_line() -> None:
    traceback = 'Traceback (most recent call last):\n  File "a.py", line 1\nillama.errors.UserError: too large\n'
    assert str(UserError(traceback)) == "too large"


def assert_refused(path: Path, read: Any) -> None:
    with pytest.raises(UserError) as caught:
        read()
    message = str(caught.value)
    assert "\n" not in message and len(message) <= MAX_MESSAGE and str(path)[:40] in message
