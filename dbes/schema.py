"""What is read from text that dbes or somebody else wrote: one strict base, one reader of JSON, one of YAML.

Both readers are bounded (size, depth, aliases), refuse what is no regular file, and turn every fault into one line that names the
file; the caller says which of dbes's errors that is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from dbes.errors import DbesError
from dbes.files import read_bytes
from dbes.text import clipped

JSON_BYTES = 2**30
YAML_BYTES = 2**20
YAML_NODES = 20_000
"""Values of a YAML file at most, every alias counted as what it stands for."""

DEPTH = 64
DIGITS = 40


class Strict(BaseModel):
    """Frozen values that refuse fields they do not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Finite(Strict):
    """The same, with finite numbers."""

    model_config = ConfigDict(allow_inf_nan=False)


class Open(BaseModel):
    """The fields of a record that are read, frozen and with finite numbers; whatever else stands there is kept as it is."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)


Whole = Annotated[int, Field(ge=0, lt=2**63, strict=True)]


def _nan_when_null(number: Any) -> Any:
    return math.nan if number is None else number


Number = Annotated[float, Field(allow_inf_nan=True, strict=True), BeforeValidator(_nan_when_null)]
"""A float whose NaN is written as null: strict JSON has no NaN."""
"""A count that an array can hold."""

Real = Annotated[float, Field(gt=-(2**62), lt=2**62, strict=True)]
"""A measured number: finite, and also where it is written as a whole number one that an array can hold."""


Model = TypeVar("Model", bound=BaseModel)


def first_problem(problem: ValidationError) -> str:
    """``field.of.field: what is wrong``, of the first fault that pydantic found; never the value itself."""
    return told(problem.errors(include_url=False, include_input=False)[0])


def told(fault: Any) -> str:
    """One fault of a pydantic ValidationError in a line."""
    place = ".".join(clipped(str(part), 60) for part in fault["loc"])
    message = clipped(str(fault["msg"]).removeprefix("Value error, "), 400)
    return f"{place}: {message}" if place else message


def parse_json(text: str | bytes, *, where: object, error: type[DbesError]) -> Any:
    """The value of a strict JSON text: no NaN, no number of more than 40 digits, nested at most 64 deep.

    Args:
        where: file (and line) for the message.
        error: what to raise.
    """
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        value = json.loads(text, parse_constant=_no_number, parse_int=_whole, parse_float=_finite)
    except UnicodeDecodeError as problem:
        raise error(f"{where}: not UTF-8 (byte {problem.start})") from None
    except json.JSONDecodeError as problem:
        raise error(f"{where}: not JSON ({problem.msg}, line {problem.lineno}, column {problem.colno})") from None
    except RecursionError:
        raise error(f"{where}: nested more than {DEPTH} deep") from None
    except ValueError as problem:
        raise error(f"{where}: not strict JSON ({clipped(str(problem))})") from None
    if _deeper(value, DEPTH):
        raise error(f"{where}: nested more than {DEPTH} deep")
    return value


def read_json(path: Path, *, error: type[DbesError], missing: str | None = None, most: int = JSON_BYTES) -> Any:
    """The value in a JSON file, see `parse_json`.

    Args:
        error: raised when there is none, it cannot be read, or it is not strict JSON.
        missing: the whole message where there is no such file.
        most: bytes the file may have.
    """
    return parse_json(read_bytes(path, error=error, missing=missing, most=most), where=path, error=error)


def read_versioned(
    path: Path,
    model: type[Model],
    *,
    error: type[DbesError],
    versions: Collection[int] = (1,),
    missing: str | None = None,
    hint: str = "",
    most: int = JSON_BYTES,
) -> Model:
    """The value of one of dbes's own JSON files, whose ``schema_version`` is one of ``versions``.

    Args:
        hint: what to do about a file that cannot be used, for the end of the message.

    Raises:
        error: as `read_json`; not an object; another version; a field is missing, unknown or wrong.
    """
    return _versioned(path, model, error=error, versions=versions, missing=missing, hint=hint, most=most)[1]


def read_record(
    path: Path,
    model: type[BaseModel],
    *,
    error: type[DbesError],
    versions: Collection[int] = (1,),
    missing: str | None = None,
    hint: str = "",
    most: int = JSON_BYTES,
) -> dict[str, Any]:
    """As `read_versioned`, but the JSON values themselves once the model has found nothing wrong with them."""
    return _versioned(path, model, error=error, versions=versions, missing=missing, hint=hint, most=most)[0]


def _versioned(
    path: Path, model: type[Model], *, error: type[DbesError], versions: Collection[int], missing: str | None, hint: str, most: int
) -> tuple[dict[str, Any], Model]:
    end = f"; {hint}" if hint else ""
    try:
        content = read_json(path, error=error, missing=missing, most=most)
        if not isinstance(content, dict):
            raise error(f"{path}: expected a JSON object, found {type(content).__name__}")
        version = content.get("schema_version")
        if isinstance(version, bool) or not isinstance(version, int) or version not in versions:
            known = ", ".join(map(str, sorted(versions)))
            raise error(f"{path}: schema_version {clipped(version)}; this dbes reads {known}")
        return content, validated(model, content, where=path, error=error)
    except error as problem:
        if not end or str(problem) == missing:
            raise
        raise error(f"{problem}{end}") from None


def validated(model: type[Model], content: Any, *, where: object, error: type[DbesError]) -> Model:
    """The content as a value of the model; raises ``error`` with the first fault."""
    try:
        return model.model_validate(content)
    except ValidationError as problem:
        raise error(f"{where}: {first_problem(problem)}") from None
    except RecursionError:
        raise error(f"{where}: nested too deep") from None


class _Loader(yaml.SafeLoader):
    """The safe loader (no Python object can be built), but a key given twice is an error: YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []
        for node_of_key, _ in node.value:
            if node_of_key.tag == "tag:yaml.org,2002:merge":
                continue
            if (key := self.construct_object(node_of_key, deep=True)) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {clipped(repr(key))} is given twice", node.start_mark)
            seen.append(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, *, error: type[DbesError], missing: str | None = None) -> Any:
    """The value in a YAML file of at most 1 MiB: safe_load, no key twice, depth and what aliases unfold to bounded.

    Raises:
        error: as `read_json`.
    """
    content = read_bytes(path, error=error, missing=missing, most=YAML_BYTES)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise error(f"{path}: not UTF-8 (byte {problem.start})") from None
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            if (size := _unfolded(node)) is None or size > YAML_NODES:
                raise error(f"{path}: its aliases unfold to more than {YAML_NODES:,} values, or to themselves")
            value = loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as problem:
        mark = problem.problem_mark or problem.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise error(f"{path}: not readable as YAML ({clipped(str(problem.problem or problem.context), 200)}{place})") from None
    except yaml.YAMLError as problem:
        raise error(f"{path}: not readable as YAML ({clipped(' '.join(str(problem).split()), 200)})") from None
    except RecursionError:
        raise error(f"{path}: nested more than {DEPTH} deep") from None
    except ValueError as problem:  # an impossible date, a number of thousands of digits
        raise error(f"{path}: not readable as YAML ({clipped(' '.join(str(problem).split()), 200)})") from None
    if _deeper(value, DEPTH):
        raise error(f"{path}: nested more than {DEPTH} deep")
    return value


def line_of(path: Path, steps: Sequence[str]) -> int | None:
    """The line of a YAML file, from 1, on which a value stands: of the last of the keys (and places in lists) that is there.

    Args:
        path: of a file that `read_yaml` has read.
    """
    try:
        node = yaml.compose(path.read_text("utf-8-sig"), Loader=_Loader)
    except (OSError, ValueError, yaml.YAMLError):  # gone or altered since
        return None
    line = None
    for step in steps:
        if isinstance(node, yaml.MappingNode):
            key, value = next(((key, value) for key, value in node.value if key.value == step), (None, None))
        elif isinstance(node, yaml.SequenceNode) and step.isdigit() and int(step) < len(node.value):
            key = value = node.value[int(step)]
        else:
            break
        if key is None:
            break
        node, line = value, key.start_mark.line + 1
    return line


def read_named(path: Path, *, error: type[DbesError], missing: str | None = None) -> dict[str, Any]:
    """The settings by name in a YAML file; none in an empty one.

    Raises:
        error: as `read_yaml`, or it holds something else.
    """
    content = read_yaml(path, error=error, missing=missing)
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise error(f"{path}: expected settings, one `name: value` a line")
    return content


def _unfolded(root: yaml.Node) -> int | None:
    """How many values a node stands for once each alias is replaced by what it names; None where one holds itself."""
    sizes: dict[int, int] = {}
    open_now: set[int] = set()
    stack: list[tuple[yaml.Node, Iterator[yaml.Node] | None]] = [(root, None)]
    while stack:
        node, below = stack.pop()
        if below is None:
            if id(node) in sizes:
                continue
            if id(node) in open_now:
                return None
            open_now.add(id(node))
            stack.append((node, iter(())))
            stack.extend((child, None) for child in _children(node) if id(child) not in sizes)
            if any(id(child) in open_now for child in _children(node)):
                return None
            continue
        open_now.discard(id(node))
        sizes[id(node)] = 1 + sum(sizes[id(child)] for child in _children(node))
        if sizes[id(node)] > YAML_NODES:
            return sizes[id(node)]
    return sizes[id(root)]


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _deeper(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        level = [
            part
            for each in level
            if isinstance(each, dict | list)
            for part in (each.values() if isinstance(each, dict) else each)
            if isinstance(part, dict | list)
        ]
        if not level:
            return False
    return True


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _whole(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"a whole number of {len(digits)} digits")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{clipped(digits, 40)} is beyond what a float holds")
    return value
