"""What is refused, with what, why, and what to do instead: one table, from which the errors and a page of the docs come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from commopt.errors import AttachError
from commopt.method import Kind

_EVERY: tuple[Kind, ...] = ("gradient", "update", "outer")


@dataclass(frozen=True)
class Refusal:
    """One combination that cannot work.

    fact: by which a framework reports it. framework: where it is looked for. what, why, instead: the error; {method} is the
        method's name, and {detail} what the framework found. kinds: of methods that it concerns.
    """

    fact: str
    framework: str
    what: str
    why: str
    instead: str
    kinds: tuple[Kind, ...] = _EVERY

    def text(self, method: str, detail: object = "") -> str:
        """The error's text."""
        return f"{self.what}: {self.why}; {self.instead}".format(method=method, detail=detail)


@cache
def table() -> dict[str, Refusal]:
    """Every refusal by its fact, from refusals.yaml."""
    from commopt.reading import read_yaml  # PyYAML and pydantic take their time

    found = {}
    for framework, entries in read_yaml(Path(__file__).with_name("refusals.yaml")).items():
        for fact, entry in entries.items():
            kinds = tuple(entry.get("kinds", _EVERY))
            found[fact] = Refusal(fact, framework, entry["what"], entry["why"], entry["instead"], kinds)
    return found


def refuse(facts: Mapping[str, object], method: str, kind: Kind) -> None:
    """Raise AttachError for the first fact that holds and concerns a method of this kind.

    facts: by the table's names; the value is falsy, or the detail that the error shows.
    """
    for fact, detail in facts.items():
        if detail and kind in table()[fact].kinds:
            raise AttachError(table()[fact].text(method, detail))
