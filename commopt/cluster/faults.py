"""A run's `faults`: nodes that are killed, restarted, cut off, slowed down or stopped at given steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field

from commopt.errors import did_you_mean
from commopt.reading import SpecModel, shown
from commopt.record.words import fault_text

if TYPE_CHECKING:
    from commopt.cluster.spec import ClusterSpec

_LEFT_OUT: Any = None  # default of a key that is left out; a key without a value is a mistake
_EXAMPLE = "{at_step: 120, kill: node2}"


def _checked_sides(value: object) -> object:
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(side, str) for side in value):
        raise ValueError(f"{shown(value)} is not a cut; write two names of nodes or sites, as in [node0, node1]")
    return value


class Fault(SpecModel):
    """One fault: exactly one of `kill`, `restart`, `cut`, `slow` and `hang`, when the furthest rank has done `at_step` steps.

    kill: a node disappears, silently if the kernel emulates its link. restart: a killed node is started again.
    cut: two nodes, or two sites, or a node and a site, cannot reach each other for `for_s` seconds, or until the end.
    slow: a node's processes run 1/`factor` of the time. hang: a node's processes stop for `for_s` seconds.
    """

    at_step: int = Field(ge=1, strict=True)
    kill: str = _LEFT_OUT
    restart: str = _LEFT_OUT
    cut: Annotated[list[str], BeforeValidator(_checked_sides)] = _LEFT_OUT
    slow: str = _LEFT_OUT
    hang: str = _LEFT_OUT
    for_s: float = Field(_LEFT_OUT, gt=0, strict=True, allow_inf_nan=False)
    factor: float = Field(_LEFT_OUT, gt=1, strict=True, allow_inf_nan=False)

    def mistakes(self) -> Iterator[tuple[str, str]]:
        kinds = [kind for kind in KINDS if getattr(self, kind) is not None]
        if not kinds:
            raise ValueError(f"says nothing to do; write one of {', '.join(KINDS)}, as in {_EXAMPLE}")
        if len(kinds) > 1:
            raise ValueError(f"{' and '.join(kinds)} are {len(kinds)} faults; write an entry for each")
        kind = kinds[0]
        if self.for_s is not None and kind in ("kill", "restart"):
            instead = "; write a restart at a later step" if kind == "kill" else ""
            yield "for_s", f"has no effect on a {kind}; leave it out{instead}"
        if self.for_s is None and kind == "hang":
            yield "for_s", "is missing; write for how many seconds the node hangs, as in 'for_s: 10'"
        if self.factor is not None and kind != "slow":
            yield "factor", f"has no effect on a {kind}; leave it out"
        if self.factor is None and kind == "slow":
            yield "factor", "is missing; write how many times slower the node gets, as in 'factor: 5'"

    @property
    def kind(self) -> str:
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def names(self) -> list[str]:
        """The nodes (or sites, of a cut) as the file names them."""
        named = getattr(self, self.kind)
        return list(named) if isinstance(named, list) else [named]

    def __str__(self) -> str:
        """What happens: `node2 killed`."""
        return fault_text(self.kind, self.names, self.for_s, self.factor)

    @property
    def recovery(self) -> str:
        """What happens when its time is over: `node1 goes on`."""
        if self.kind == "cut":
            return f"{' and '.join(self.names)} reach each other again"
        return f"{self.names[0]} goes on{' at full speed' if self.kind == 'slow' else ''}"


KINDS = ("kill", "restart", "cut", "slow", "hang")


def mistakes_among(faults: Sequence[Fault], cluster: ClusterSpec, steps: object) -> Iterator[tuple[str, str]]:
    """(key, text) pairs: faults that contradict the cluster, the number of steps (if it is one) or earlier faults."""
    for index, fault in enumerate(faults):
        known = [*cluster.names, *(cluster.sites if fault.kind == "cut" else [])]
        what = "node or site" if fault.kind == "cut" and cluster.sites else "node"
        key = f"faults.{index}.{fault.kind}"
        unknown = [name for name in fault.names if name not in known]
        for name in unknown:
            yield key, f"no {what} {name!r}{did_you_mean(name, known)}"
        if fault.kind == "cut" and not unknown:
            one, other = map(cluster.side, fault.names)
            if both := [name for name in one if name in other]:
                yield key, f"{both[0]!r} is on both sides; write two nodes or sites that have none in common"
        if isinstance(steps, int) and not isinstance(steps, bool) and fault.at_step >= steps >= 1:
            late = f"{fault.at_step} is not reached in {steps} steps; write less than arguments.steps"
            yield f"faults.{index}.at_step", late
    yield from _mistakes_of_life(faults, cluster)


def _mistakes_of_life(faults: Sequence[Fault], cluster: ClusterSpec) -> Iterator[tuple[str, str]]:
    """Faults of dead nodes, and restarts of nodes that are up."""
    killed: dict[str, int] = {}  # name -> step
    for index, fault in sorted(enumerate(faults), key=lambda numbered: numbered[1].at_step):
        key, name = f"faults.{index}.{fault.kind}", fault.names[0]
        if fault.kind == "cut" or name not in cluster.names:
            continue
        if fault.kind == "restart":
            if name not in killed:
                yield key, f"{name} is up at step {fault.at_step}; kill it at an earlier step, or leave this out"
            elif killed.pop(name) == fault.at_step:
                yield key, f"{name} is killed at step {fault.at_step} too; restart it at a later one"
        elif name in killed:
            yield key, f"{name} is dead since step {killed[name]}; restart it before, or leave this out"
        elif fault.kind == "kill":
            killed[name] = fault.at_step
            if len(killed) == len(cluster.names):
                yield key, f"{name} is the last node that is up at step {fault.at_step}, and nobody could go on"
