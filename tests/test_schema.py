"""Readers of text from outside: bounded, strict, one line."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from pydantic import BaseModel, Field

from dbes.errors import ResultError
from dbes.schema import Strict, read_json, read_versioned, read_yaml, validated
from dbes.text import clipped, printable


class Point(Strict):
    schema_version: int
    x: int
    y: dict[str, int] = Field(default_factory=dict)


BOMB = "\n".join(["a0: &a0 [x, x, x, x, x, x, x, x, x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        pytest.param(b"{", "not JSON", id="cut short"),
        pytest.param(b"[" * 200_000, "nested more than", id="depth beyond the parser"),
        pytest.param(b"[" * 100 + b"]" * 100, "nested more than", id="depth"),
        pytest.param(b'{"x": NaN}', "NaN", id="NaN"),
        pytest.param(b'{"x": 1e999}', "beyond what a float holds", id="infinity"),
        pytest.param(b'{"x": ' + b"9" * 5000 + b"}", "5000 digits", id="huge integer"),
        pytest.param(b'{"x": "\xff"}', "not UTF-8", id="not UTF-8"),
        pytest.param(b"", "not JSON", id="empty"),
    ],
)
def test_json_that_is_none_gives_one_line(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ResultError, match=said) as caught:
        read_json(path, error=ResultError)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < len(str(path)) + 200


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/zero"), tmp_path):
        with pytest.raises(ResultError, match="expected a file"):
            read_json(path, error=ResultError)
    with pytest.raises(ResultError, match="nothing here"):
        read_json(tmp_path / "none", error=ResultError, missing="nothing here")
    (tmp_path / "big").write_bytes(b"1" * 100)
    with pytest.raises(ResultError, match="expected at most 10"):
        read_json(tmp_path / "big", error=ResultError, most=10)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"schema_version": 1, "x": 2, "z": 3}', "z: "),
        ('{"schema_version": 1}', "x: "),
        ('{"schema_version": 2, "x": 1}', "this dbes reads 1"),
        ('{"schema_version": true, "x": 1}', "this dbes reads 1"),
        ('{"schema_version": "9999999999999999999999999999999999", "x": 1}', "this dbes reads 1"),
        ("[1]", "expected a JSON object"),
        ('{"schema_version": 1, "x": 1, "y": {"' + "k" * 5000 + '": "text"}}', "y"),
    ],
)
def test_a_versioned_file_with_wrong_fields_names_the_field(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ResultError) as caught:
        read_versioned(path, Point, error=ResultError)
    assert said in str(caught.value) and len(str(caught.value)) < len(str(path)) + 600


def test_a_versioned_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"schema_version": 1, "x": 2}')
    assert read_versioned(tmp_path / "x.json", Point, error=ResultError) == Point(schema_version=1, x=2)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        pytest.param(BOMB, "unfold", id="aliases of aliases"),
        pytest.param("a: &a [*a]", "itself|undefined|recursive|themselves", id="an alias of itself"),
        pytest.param("[" * 90 + "]" * 90, "deep", id="depth"),
        pytest.param("[" * 9000 + "]" * 9000, "deep", id="depth beyond the parser"),
        pytest.param("a: 1\na: 2", "twice", id="a key twice"),
        pytest.param("a: !!python/object/apply:os.system [x]", "YAML", id="an object"),
        pytest.param("a: 2001-99-99", "YAML", id="an impossible date"),
        pytest.param("a: " + "9" * 5000, "YAML", id="a huge number"),
        pytest.param("a: [", "YAML", id="cut short"),
        pytest.param("\x00", "YAML", id="control character"),
        pytest.param("? [a, b]\n: 1\n? {c: d}\n: 2", "YAML", id="keys that cannot be hashed"),
    ],
)
def test_yaml_that_cannot_be_used_gives_one_line_at_once(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(content)
    started = time.perf_counter()
    with pytest.raises(ResultError, match=said) as caught:
        read_yaml(path, error=ResultError)
    assert time.perf_counter() - started < 20  # a bomb took more than a minute
    assert "\n" not in str(caught.value) and len(str(caught.value)) < len(str(path)) + 400


def test_yaml_with_a_few_aliases_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("base: &b {x: 1}\none: {<<: *b, y: 2}\ntwo: *b\n")
    assert read_yaml(path, error=ResultError) == {"base": {"x": 1}, "one": {"x": 1, "y": 2}, "two": {"x": 1}}
    path.write_text("")
    assert read_yaml(path, error=ResultError) is None


def test_values_nested_beyond_the_model_are_a_clear_line() -> None:
    class Any_(BaseModel):
        x: int

    with pytest.raises(ResultError, match="somewhere: x"):
        validated(Any_, {"x": "text"}, where="somewhere", error=ResultError)


def test_what_a_terminal_would_obey_is_written_out() -> None:
    assert printable("a\x1b[31mb\u202ec\u200bd\ud800e\x9bf\n") == r"a\x1b[31mb\u202ec\u200bd\ud800e\x9bf\n"
    assert printable("a\n\tb", lines=True) == "a\n\tb"
    assert printable("größe 日本 é 😀") == "größe 日本 é 😀"
    assert len(clipped("x" * 1000)) == 80 and clipped({"a": "\x1b"}) == "{'a': '\\x1b'}"
