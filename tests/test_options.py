"""The message about a wrong option: its name, its value, and what to write instead."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_type_hints

import numpy as np
import pytest
from pydantic import Field

from commopt import build
from commopt.errors import ConfigError
from commopt.methods import METHODS
from commopt.options import (
    Count,
    Flag,
    Fraction,
    NoOptions,
    Number,
    Positive,
    Share,
    Wanted,
    Whole,
    make_options,
    option_names,
    options,
    wanted,
)


@options
class Options(NoOptions):
    rank: Count
    share: Share = 0.5
    decay: Fraction = 0.9
    rate: Positive = 1.0
    offset: Number = 0.0
    seed: Whole = 0
    is_fast: Flag = False
    kind: Literal["ring", "complete"] = "ring"
    bits: Literal[8, 16] = 8
    every: Count | Literal["auto"] | None = None
    level: Annotated[Whole, Field(ge=1, le=9)] = 1
    names: Annotated[tuple[str, ...], Wanted("a list of names, as in [a, b]")] = ()

    def __post_init__(self) -> None:
        if self.seed > 100 and self.is_fast:
            raise ConfigError(f"seed: {self.seed} has no effect with is_fast: true; leave one out")


def made(**given: Any) -> Options:
    return make_options(Options, {"rank": 1, **given})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rank": 0}, "rank: 0 is out of range; write a whole number from 1"),
        ({"rank": 2.0}, "rank: 2.0 is out of range; write a whole number from 1"),
        ({"rank": True}, "rank: True is out of range; write a whole number from 1"),
        ({"rank": None}, "rank: None is out of range; write a whole number from 1"),
        ({"rank": "2"}, "rank: '2' is out of range; write a whole number from 1"),
        ({"share": 0}, "share: 0 is out of range; write a number above 0, at most 1"),
        ({"share": 1.01}, "share: 1.01 is out of range; write a number above 0, at most 1"),
        ({"share": False}, "share: False is out of range; write a number above 0, at most 1"),
        ({"share": float("nan")}, "share: nan is out of range; write a number above 0, at most 1"),
        ({"decay": 1.0}, "decay: 1.0 is out of range; write a number from 0, below 1"),
        ({"rate": float("inf")}, "rate: inf is out of range; write a number above 0"),
        ({"offset": float("-inf")}, "offset: -inf is out of range; write a number"),
        ({"offset": [1.0]}, "offset: [1.0] is out of range; write a number"),
        ({"seed": 0.5}, "seed: 0.5 is out of range; write a whole number"),
        ({"is_fast": 1}, "is_fast: 1 is out of range; write true or false"),
        ({"is_fast": "yes"}, "is_fast: 'yes' is out of range; write true or false"),
        ({"kind": "rng"}, "kind: 'rng' is out of range; did you mean 'ring'? Write 'ring' or 'complete'"),
        ({"kind": 3}, "kind: 3 is out of range; write 'ring' or 'complete'"),
        ({"bits": 4}, "bits: 4 is out of range; write 8 or 16"),
        ({"every": 0}, "every: 0 is out of range; write a whole number from 1, or 'auto', or leave it out"),
        (
            {"every": "aut"},
            "every: 'aut' is out of range; did you mean 'auto'? Write a whole number from 1, or 'auto', or leave it out",
        ),
        ({"level": 10}, "level: 10 is out of range; write a whole number from 1 to 9"),
        ({"names": "ab"}, "names: 'ab' is out of range; write a list of names, as in [a, b]"),
        ({"names": ["a", 3]}, "names: ['a', 3] is out of range; write a list of names, as in [a, b]"),
        ({"shar": 0.1}, "unknown option 'shar'; did you mean 'share'?"),
        ({"xyz": 1}, f"unknown option 'xyz'; known: {', '.join(sorted(option_names(Options)))}"),
        ({"seed": 101, "is_fast": True}, "seed: 101 has no effect with is_fast: true; leave one out"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_wrong_option_is_named_with_its_value_and_its_range(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        made(**given)
    assert str(caught.value) == message


def test_an_option_without_a_default_has_to_be_given() -> None:
    with pytest.raises(ConfigError, match=r"^rank: is missing, and has no default; write \{rank: \.\.\.\}$"):
        make_options(Options, {})


def test_the_first_wrong_option_is_told_and_long_values_are_cut() -> None:
    with pytest.raises(ConfigError, match=r"^share: 'xxx"):
        made(share="x" * 500, seed="y")
    with pytest.raises(ConfigError) as caught:
        made(share="x" * 500)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("value", [np.float32(0.25), np.float64(0.25)])
def test_numbers_of_numpy_are_numbers(value: Any) -> None:
    found = made(share=value, rank=np.int64(3), is_fast=np.bool_(True))
    assert (found.share, found.rank, found.is_fast) == (0.25, 3, True)
    assert [type(x) for x in (found.share, found.rank, found.is_fast)] == [float, int, bool]


def test_a_whole_number_is_a_number_and_lists_become_tuples() -> None:
    found = made(share=1, names=["a", "b"], every="auto")
    assert (found.share, found.names, found.every) == (1.0, ("a", "b"), "auto")


def test_options_do_not_change() -> None:
    with pytest.raises(AttributeError):
        made().rank = 2  # type: ignore[misc]


@pytest.mark.parametrize("name", METHODS)
def test_every_methods_options_are_described_and_refuse_what_they_do_not_know(name: str) -> None:
    kind = METHODS[name].Options
    annotations = get_type_hints(kind, include_extras=True)
    for option in option_names(kind):
        text = wanted(annotations[option])
        assert not text.startswith("a Any | "), option
        assert "typing." not in text, option
    with pytest.raises(ConfigError, match=f"^method {name}: unknown option 'no such option'; (known: |it takes none)"):
        build(name, **{"no such option": 1})


@pytest.mark.parametrize("option", ["lr", "betas", "eps", "weight_decay", "max_norm", "grad_scaler"])
def test_what_belongs_to_the_optimizer_or_the_run_is_no_option_of_a_method(option: str) -> None:
    fix = "set it on the optimizer that you pass to attach"
    if option in ("max_norm", "grad_scaler"):
        fix = f"write commopt.attach(..., {option}=...)"
    with pytest.raises(ConfigError) as caught:
        build("onebit_adam", **{option: 0.1})
    assert str(caught.value) == f"method onebit_adam: {option}: is not an option of this method; {fix}"
