"""Read YAML with the scalars of YAML 1.2 and no duplicate keys; errors name the key, the value and the fix."""

import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails
from typing_extensions import Self

from commopt.errors import ConfigError, did_you_mean


class MistakesError(ValueError):
    """Mistakes that concern several keys: (key, what is wrong) pairs."""

    def __init__(self, found: Sequence[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{key}: {text}" for key, text in found))
        self.found = found


class SpecModel(BaseModel):
    """A part of a YAML file: frozen, and without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def mistakes(self) -> Iterable[tuple[str, str]]:
        """(key, what is wrong) pairs for keys that are valid one by one, but not together."""
        return ()

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if found := list(self.mistakes()):
            raise MistakesError(found)
        return self


_LONGEST_BYTES = 1 << 16  # about a second of PyYAML
_DEEPEST = 20


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2, and without what a settings file does not need."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        problem = None
        if isinstance(event, yaml.AliasEvent):
            problem = f"alias '*{event.anchor:.40}': write the value itself"
        elif getattr(event, "tag", None) is not None:
            problem = f"tag '{event.tag:.40}': write the value without it"
        elif isinstance(event, yaml.ScalarEvent) and re.search(r"[\0\ud800-\udfff]", event.value):
            problem = "the text holds a NUL or half a character; write it without"
        elif self._depth == _DEEPEST:
            problem = f"is nested more than {_DEEPEST} deep"
        if problem is not None:
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float) or not str(key).isprintable() or len(str(key)) > 255:
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}
_NUMBER = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)"
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", rf"{_NUMBER}(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+0123456789."),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def _construct_int(_: _Loader, node: yaml.ScalarNode) -> int:
    text = node.value
    if len(text) > 100:
        raise yaml.constructor.ConstructorError(None, None, "a number has too many digits", node.start_mark)
    return int(text, 8 if text.startswith("0o") else 16 if text.startswith("0x") else 10)


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file. Raises ConfigError, with the line where that is known."""
    try:
        with path.open("rb") as file:
            raw = file.read(_LONGEST_BYTES + 1)
        text = raw[:_LONGEST_BYTES].decode(errors="strict" if len(raw) <= _LONGEST_BYTES else "ignore")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not text in UTF-8; write YAML") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        why = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{path}: cannot be read: {why.lower()}") from None
    if len(raw) > _LONGEST_BYTES:
        raise ConfigError(f"{path}: is longer than {_LONGEST_BYTES >> 10} KiB; write a shorter file")
    try:
        data = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ConfigError(f"{path}: {line}{error.problem or 'is not YAML'}") from None
    except yaml.reader.ReaderError as error:
        number = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{path}: line {number}: {text[error.position]!r} is not allowed in YAML") from None
    if data is None:
        raise ConfigError(f"{path}: is empty; write keys and values, as in 'nodes: 4'")
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: is not a set of keys and values; write one, as in 'nodes: 4'")
    return data


_MOST_LINES = 20
_Spec = TypeVar("_Spec", bound=BaseModel)
_SET = "a set of keys and values"
_KINDS = {"int": "a whole number", "float": "a number", "finite": "a finite number", "string": "text"}
_KINDS |= {"list": "a list", "dict": _SET, "model": _SET}
_BOUNDS = {
    "greater_than_equal": "too small; write {ge} or more",
    "greater_than": "too small; write a number above {gt:g}",
    "less_than_equal": "too large; write {le} or less",
}


def validated(model: type[_Spec], data: Mapping[str, Any], file: str, context: Any = None) -> _Spec:
    """The model of this data; context: for its validators. Raises ConfigError, one line for each mistake."""
    try:
        return model.model_validate(data, context=context)
    except ValidationError as error:
        lines = [f"{file}: {key}: {text}" for detail in error.errors() for key, text in _explained(model, detail)]
        more = [f"{file}: and {len(lines) - _MOST_LINES} more mistakes"] * (len(lines) > _MOST_LINES)
        raise ConfigError("\n".join(lines[:_MOST_LINES] + more)) from None


def _explained(model: type[BaseModel], detail: ErrorDetails) -> Iterable[tuple[str, str]]:
    location = [part for part in detail["loc"] if part != "[key]"]
    key = ".".join(str(part) for part in location)
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "value_error":
        cause = context["error"]
        if isinstance(cause, MistakesError):
            return [(f"{key}.{inner}" if key else inner, text) for inner, text in cause.found]
        return [(key, str(cause))]
    if kind == "missing":
        return [(key, "is missing; write it")]
    if kind == "extra_forbidden":
        return [(key, f"unknown key{did_you_mean(str(location[-1]), _known_keys(model, location[:-1]))}")]
    if value is None:
        return [(key, "is empty; write a value, or leave the key out")]
    if kind in ("enum", "literal_error"):
        choices = [choice.strip("' ") for choice in str(context["expected"]).replace(" or ", ",").split(",")]
        return [(key, f"{shown(value)} is unknown{did_you_mean(str(value), choices)}")]
    if kind in _BOUNDS:
        return [(key, f"{shown(value)} is {_BOUNDS[kind].format(**context)}")]
    for prefix, words in _KINDS.items():
        if kind.startswith(prefix):
            return [(key, f"{shown(value)} is not {words}; write one")]
    return [(key, f"{shown(value)} does not fit: {detail['msg'].lower()}")]


def _known_keys(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """The keys that the model at this place of the file knows."""
    place: Any = model
    for part in location:
        if isinstance(place, type) and issubclass(place, BaseModel):
            place = place.model_fields[str(part)].annotation
        else:
            place = typing.get_args(place)[-1]
        while typing.get_origin(place) in (Annotated, typing.Union, types.UnionType):
            place = typing.get_args(place)[0]
    return list(place.model_fields) if isinstance(place, type) and issubclass(place, BaseModel) else []


def shown(value: object) -> str:
    """A value as a message quotes it: short, and as YAML writes it."""
    text = repr(value) if not isinstance(value, bool) else str(value).lower()
    return text if len(text) <= 60 else text[:57] + "..."
