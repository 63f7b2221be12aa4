"""Declared state: allocation, views of each parameter, saving, loading and resizing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from commopt.errors import CheckpointError
from commopt.wire.bucket import ParameterIndex
from commopt.wire.state import Saved, State, Stateful

NAMED = [("a", torch.zeros(2, 3)), ("b", torch.zeros(4))]
FEW = ParameterIndex(("b",), (3,))


class Part(Stateful):
    states = (State("inner", held="rank", on_resize="mean"),)


class Whole(Stateful):
    states = (
        State("momentum"),
        State("own", held="rank", on_resize="mean", initial=1.0),
        State("lost", held="rank", on_resize="reset", dtype=torch.bfloat16, initial=2.0),
        State("mine", held="rank", on_resize="own"),
        State("few", index=FEW),
        State("count", of="parameter", dtype=torch.int64),
        State("norms", of="run", numel=5, dtype=torch.float64, initial=float("nan")),
    )

    def __init__(self) -> None:
        self.parts = (Part(),)
        for one in (self, *self.parts):
            one.index, one.device = ParameterIndex.of(NAMED), torch.device("cpu")
            one.allocate()
        self.restorations = 0

    def restored(self) -> None:
        self.restorations += 1


def numbered(rank: int) -> Whole:
    """Every tensor has values of its own, and a rank's own tensors depend on the rank too."""
    made = Whole()
    for held, tensors in made.saved().items():
        for k, x in enumerate(tensors.values()):
            x.copy_(torch.arange(x.numel()) + 10 * k + (100 * rank if held == "rank" else 0))
    return made


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def _default_dtype(request: Any) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("_default_dtype")
def test_a_declaration_says_how_much_of_which_type_and_with_which_values() -> None:
    state = Whole().state
    assert {key: (x.numel(), x.dtype) for key, x in state.items()} == {
        "momentum": (10, torch.float32),
        "own": (10, torch.float32),
        "lost": (10, torch.bfloat16),
        "mine": (10, torch.float32),
        "few": (3, torch.float32),
        "count": (2, torch.int64),
        "norms": (5, torch.float64),
    }
    assert not state["momentum"].any()
    assert bool((state["own"] == 1).all() and (state["lost"] == 2).all() and state["norms"].isnan().all())
    assert Whole().state_bytes() == 3 * 40 + 20 + 12 + 16 + 40 + 40  # the last is the part's


def test_parameters_see_their_own_elements() -> None:
    made = Whole()
    made.part("momentum", "b").fill_(3.0)
    assert made.state["momentum"].tolist() == [0.0] * 6 + [3.0] * 4
    made.part("few", "b").fill_(5.0)
    assert made.state["few"].tolist() == [5.0] * 3


def test_views_are_of_everything_that_a_parameters_exchange_may_change() -> None:
    made = Whole()
    sizes = {name: [x.numel() for x in made.state_views(name)] for name in ("a", "b")}
    assert sizes == {"a": [6, 6, 6, 6, 1, 6], "b": [4, 4, 4, 4, 3, 1, 4]}  # `few` has none of a; the last is the part's
    for view in made.state_views("a"):
        view.fill_(7)
    assert made.state["count"].tolist() == [7, 0]
    assert made.parts[0].state["inner"].tolist() == [7.0] * 6 + [0.0] * 4


def test_who_holds_what_is_saved_there() -> None:
    saved = Whole().saved()
    assert sorted(saved["shared"]) == ["count", "few", "momentum", "norms"]
    assert sorted(saved["rank"]) == ["inner", "lost", "mine", "own"]


def test_a_load_brings_back_every_bit_and_is_told() -> None:
    old, new = numbered(1), Whole()
    new.check_saved(old.saved())
    new.load(copy.deepcopy(old.saved()))
    assert new.restorations == 1
    pairs = zip(old.saved().values(), new.saved().values(), strict=True)
    assert all(torch.equal(x, other[key]) for tensors, other in pairs for key, x in tensors.items())
    assert new.part("momentum", "b").data_ptr() == new.state["momentum"][6:].data_ptr()  # in place: views stay views


def test_another_number_of_ranks_keeps_means_or_resets_as_declared() -> None:
    old = [numbered(rank) for rank in range(3)]
    new = Whole()
    new.state["lost"].fill_(9)
    new.state["mine"].fill_(9)
    new.resize([one.saved() for one in old])
    assert new.restorations == 1
    for key in ("momentum", "few", "count", "norms"):
        assert torch.equal(new.state[key], old[0].state[key])
    for one in (new, new.parts[0]):
        for key, x in one.state.items():
            if key in ("own", "inner"):
                every: list[Tensor] = [(whole if key == "own" else whole.parts[0]).state[key] for whole in old]
                torch.testing.assert_close(x, torch.stack(every).mean(0))
    assert bool((new.state["lost"] == 2).all())
    assert bool((new.state["mine"] == 9).all())  # left to the class


def broken(held: str, key: str, shape: int | None) -> Saved:
    saved: Any = numbered(0).saved()
    if shape is None:
        del saved[held][key]
    else:
        saved[held][key] = torch.zeros(shape)
    return saved  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("held", "key"), [("shared", "momentum"), ("rank", "own"), ("rank", "inner"), ("shared", "norms")]
)
@pytest.mark.parametrize("shape", [None, 3])
def test_what_is_missing_or_of_another_shape_is_refused(held: str, key: str, shape: int | None) -> None:
    found = "nothing" if shape is None else r"\(3,\)"
    message = rf"{key}: expected a tensor of shape \(\d+,\), found {found}; is it another model or world size\?"
    saved = broken(held, key, shape)
    for call in (Whole().check_saved, Whole().load, lambda one: Whole().resize([one, one])):
        with pytest.raises(CheckpointError, match=message):
            call(saved)
