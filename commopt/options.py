"""Options as frozen dataclasses, validated by pydantic; every message names the option, its value and what to write instead."""

import dataclasses
import types
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
from pydantic import AfterValidator, ConfigDict, Field, Strict, ValidationError, ValidationInfo
from pydantic.dataclasses import dataclass as _pydantic_dataclass
from typing_extensions import dataclass_transform

from commopt.errors import ConfigError, did_you_mean

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What an option takes, in words, if its type does not say it."""

    text: str


def _of_use(value: float, info: ValidationInfo) -> float:
    """Raise ConfigError for a number that would become 0 or inf in float32, or does not fit into 64 bits."""
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ConfigError(f"{info.field_name}: {value:.3g} is out of range; write a number below 2^63")
    if isinstance(value, float) and not 1.2e-38 <= value <= 3.4e38:
        raise ConfigError(f"{info.field_name}: {value!r} is out of range; write a number from 1.2e-38 to 3.4e38")
    return value


Flag = Annotated[bool, Strict()]
Whole = Annotated[int, Strict(), AfterValidator(_of_use)]
Count = Annotated[int, Strict(), Field(ge=1), AfterValidator(_of_use)]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Positive = Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False), AfterValidator(_of_use)]
Share = Annotated[float, Strict(), Field(gt=0, le=1), AfterValidator(_of_use)]
Fraction = Annotated[float, Strict(), Field(ge=0, lt=1)]  # from 0 to below 1, such as a momentum
Names = tuple[Annotated[str, Field(min_length=1)], ...]
BlockSize = Annotated[Count, Field(multiple_of=8), Wanted("a positive multiple of 8, so that bits fill bytes")]

_CONFIG = ConfigDict(extra="forbid", arbitrary_types_allowed=True, validate_default=True)


@dataclass_transform(kw_only_default=True, frozen_default=True)
def options(cls: type[T]) -> type[T]:
    """Make a class a frozen dataclass of keyword-only fields that pydantic checks; a wrong field raises ConfigError."""
    return _checked(_pydantic_dataclass(frozen=True, kw_only=True, config=_CONFIG)(cls))  # type: ignore[no-any-return]


@dataclass_transform(frozen_default=True)
def checked_dataclass(cls: type[T]) -> type[T]:
    """Make a class a frozen dataclass that pydantic checks when it is made; a wrong field raises ConfigError."""
    return _checked(_pydantic_dataclass(frozen=True, config=_CONFIG)(cls))  # type: ignore[no-any-return]


def _checked(made: Any) -> Any:
    """Make a pydantic dataclass raise ConfigError for its first mistake."""
    check = made.__init__

    def checked(self: Any, *args: Any, **named: Any) -> None:
        given = {**dict(zip(option_names(made), args, strict=False)), **named}
        try:
            check(self, **given)
        except ValidationError as error:
            raise ConfigError(_first_mistake(made, given, error)) from None

    made.__init__ = checked
    return made


@options
class NoOptions:
    """Base of every `Options` class."""


def make_options(kind: type[T], given: Mapping[str, Any]) -> T:
    """The options, checked. Raises ConfigError for the first that is unknown, missing or out of range."""
    known = option_names(kind)
    for key in given:
        if key not in known:
            takes = did_you_mean(str(key), known) if known else "; it takes none"
            raise ConfigError(f"unknown option {key!r}{takes}")
    return kind(**{key: x.item() if isinstance(x, np.generic) else x for key, x in given.items()})


def option_names(kind: type) -> list[str]:
    """The names of all options, in the order they are declared."""
    return [field.name for field in dataclasses.fields(kind)]


def _first_mistake(kind: type, given: Mapping[str, Any], error: ValidationError) -> str:
    mistake = error.errors()[0]
    if not mistake["loc"]:  # a check of several options together
        return str(mistake["ctx"]["error"])
    option = str(mistake["loc"][0])
    if mistake["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{option}: is missing, and has no default; write {{{option}: ...}}"
    if mistake["type"] == "value_error" and isinstance(mistake["ctx"]["error"], ConfigError):
        return str(mistake["ctx"]["error"])
    value = given.get(option, mistake["input"])  # the whole value, not the item of a list or the branch of a union
    annotation = get_type_hints(kind, include_extras=True)[option]
    close = get_close_matches(value, _words(annotation), n=1) if isinstance(value, str) else []
    hint = f"did you mean {close[0]!r}? Write" if close else "write"
    return f"{option}: {value!r:.80} is out of range; {hint} {wanted(annotation)}"


def _words(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [value for value in get_args(annotation) if isinstance(value, str)]
    return [word for one in get_args(annotation) for word in _words(one)]


def wanted(annotation: Any) -> str:
    """What an option of this type takes, in words: "a number above 0, at most 1"."""
    metadata: list[Any] = []
    while get_origin(annotation) is Annotated:
        annotation, *more = get_args(annotation)
        metadata += more
    for one in metadata:
        if isinstance(one, Wanted):
            return one.text
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [one for one in get_args(annotation) if one is not type(None)]
        text = ", or ".join(map(wanted, kinds))
        return f"{text}, or leave it out" if len(kinds) < len(get_args(annotation)) else text
    if get_origin(annotation) is Literal:
        *others, last = (repr(value) for value in get_args(annotation))
        return f"{', '.join(others)} or {last}" if others else last
    if annotation is bool:
        return "true or false"
    if annotation in (int, float):
        return f"{'a whole number' if annotation is int else 'a number'}{_range(metadata)}"
    return f"a {getattr(annotation, '__name__', str(annotation))}"


def _range(metadata: list[Any]) -> str:
    parts = [part for one in metadata for part in getattr(one, "metadata", [one])]  # pydantic's Field holds several
    bounds = {key: getattr(part, key) for part in parts for key in ("ge", "gt", "le", "lt") if hasattr(part, key)}
    low = f" from {bounds['ge']}" if "ge" in bounds else f" above {bounds['gt']}" if "gt" in bounds else ""
    if "le" in bounds:
        return f"{low} to {bounds['le']}" if "ge" in bounds else f"{low}, at most {bounds['le']}"
    return f"{low}, below {bounds['lt']}" if "lt" in bounds else low
