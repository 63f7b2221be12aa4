"""`auto` with a watch that is told what it measures, so that choices are known."""

from __future__ import annotations

from typing import Any

from commopt.exchange.watch import Watch
from commopt.methods.auto import NAMES, Auto
from commopt.plan.expected import Measured

SLOW = {  # a link that a step waits for
    "dense": Measured(0.5, 0.4, 0.4),
    "fp16": Measured(0.3, 0.2, 0.2),
    "two_way(int8)": Measured(0.2, 0.1, 0.1),
    "two_way(4bit)": Measured(0.25, 0.15, 0.15),
}
FAST = dict.fromkeys(NAMES, Measured(0.1, 0.001, 0.01))
TRIED = 2  # steps of each candidate: one that is not timed, and one that is


class Told(Auto):
    """Knows what it will have measured, and decides after every second step."""

    settle = 1
    times: Any = SLOW

    def __init__(self, **given: Any) -> None:
        super().__init__(**{"measure": 1, "reconsider": 0, **given})

    def bound(self) -> None:
        super().bound()
        self.watch = ToldWatch(self)

    def _cost(self, name: str, elements: int) -> float:
        return 0.0


class ToldWatch(Watch):
    def __init__(self, method: Told) -> None:
        super().__init__(method.device)
        self.method = method

    def read(self) -> Measured:
        return self.method.times[self.method.choice]  # type: ignore[no-any-return]


class Quick(Told):
    """Tries one candidate after two steps, and keeps it after four."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**{"candidates": ["two_way(int8)"], **given})


def assert_chosen(run: Any) -> None:
    """A run under `Quick` has made its choice, says so, and replicas are equal."""
    assert [(kind, told["step"], told["now"]) for kind, told in run.events] == [
        ("choice", step, "two_way(int8)") for step in (2, 4)
    ]
    assert run.method.is_steady
    assert run.replicas_are_equal()
