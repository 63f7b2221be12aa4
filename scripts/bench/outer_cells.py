"""What outer.py compares: outer methods and dense Adam, their settings, cells, and which of them are needed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import building
from losses import best_rate, loss_of, tried_rates
from store import Store

SCHEMA = 1
SEEDS = {4: (1, 2, 3), 8: (1,), 16: (1,)}  # by ranks; the first one chooses the rates
RATES = (1.5e-3, 3e-3, 6e-3)
EXTENSIONS = 1  # if the best rate lies at an edge, so many more beyond it
TARGET = 1.0  # percent that NoLoCo may be worse than DiLoCo


@dataclass(frozen=True)
class Task:
    """What all cells train: the model, and for how long. Shares are of the steps; every: inner steps of a round."""

    sizes: Mapping[str, int] = field(
        default_factory=lambda: {"layers": 2, "heads": 4, "width": 64, "context": 64, "batch": 4}
    )
    steps: int = 800
    every: int = 20
    warmup: float = 0.1  # share of the steps in which the rate rises to its peak
    decay_to: float = 0.1  # share of the peak that the cosine falls to
    clip: float = 1.0  # norm that a gradient is clipped to: each rank's own, or with dense their mean
    held_out: int = 32  # batches of 32 windows

    @property
    def tokens(self) -> int:
        """Tokens that one rank sees in the whole training."""
        return self.steps * self.sizes["batch"] * self.sizes["context"]


ADAMW: Mapping[str, Any] = {"name": "adamw", "betas": (0.9, 0.95), "weight_decay": 0.1, "fused": True}


@dataclass(frozen=True)
class Entry:
    """A method with its options. period: its `every` in units of the task's, or the method's own; overlap: `delay` as a share of it.

    ranks: numbers of replicas that it is trained with. family: what its rate is chosen with. words: for the tables.
    seeds: with how many of those of its number of replicas it is trained, where it is beside the comparison.
    """

    label: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    words: str = ""
    ranks: tuple[int, ...] = (4,)
    period: float | None = 1.0
    overlap: float = 0.0
    family: str = "outer"
    seeds: int = 1

    @property
    def is_extra(self) -> bool:
        """Whether it is a look beside the comparison."""
        return self.ranks != ALL

    def options_of(self, task: Task) -> dict[str, Any]:
        made = dict(self.options)
        if self.period is not None:
            made["every"] = max(1, round(self.period * task.every))
        if self.overlap:
            made["delay"] = max(1, round(self.overlap * made["every"]))
        return made


ALL = tuple(SEEDS)
HEAVY = {"outer": {"name": "sgd", "lr": 0.7, "momentum": 0.3}}
ENTRIES = (
    Entry("dense", "dense", words="mean of the gradients in every step", ranks=ALL, period=None, family="dense"),
    Entry("local_sgd", "local_sgd", words="mean of the parameters (local Adam)", ranks=ALL),
    Entry("diloco", "diloco", words="Nesterov, lr 0.7, momentum 0.9 (its paper's)", ranks=ALL),
    Entry("diloco_heavy", "diloco", HEAVY, "heavy ball, lr 0.7, momentum 0.3 (NoLoCo's paper's)", ALL),
    Entry("noloco", "noloco", words="pairs, lr 0.7, momentum 0.5 (its paper's)", ranks=ALL),
    Entry("alone", "local_sgd", words="each replica by itself, no averaging", period=1000.0),
    Entry("noloco_m0.3", "noloco", {"momentum": 0.3}, "momentum 0.3, as diloco_heavy", ranks=(4, 16), seeds=3),
    Entry("noloco_m0", "noloco", {"momentum": 0.0}, "no momentum", seeds=3),
    Entry("noloco_lr1", "noloco", {"lr": 1.0}, "lr 1"),
    Entry("noloco_int8", "noloco", {"message": "int8"}, "messages of 8 bits", seeds=3),
    Entry("noloco_4bit", "noloco", {"message": "4bit"}, "messages of 4 bits", seeds=3),
    Entry(
        "noloco_int8_slow",
        "noloco",
        {"message": "int8", "slow_share": 0.5},
        "messages of 8 bits, and half of the slow weights",
        seeds=3,
    ),
    Entry("noloco_delay", "noloco", words="results come half a round late", overlap=0.5, seeds=3),
    Entry("diloco_rare", "diloco", HEAVY, "diloco_heavy with half as many rounds (as in NoLoCo's paper)", period=2.0),
    Entry("decentralized_adam", "decentralized_adam", words="with one peer in every step, one step late", period=None),
    Entry("choco", "choco", words="in a ring in every step, messages of 4 bits", period=None),
    Entry("push_sum", "push_sum", words="to one peer in every step", period=None),
    Entry("noloco_n4", "noloco", {"group_size": 4}, "groups of 4 instead of pairs", (8,)),
)
BY_LABEL = {entry.label: entry for entry in ENTRIES}
JUDGES = {"dense": ("dense",), "outer": ("diloco", "diloco_heavy", "noloco")}  # whose mean loss chooses a family's rate
COMPARED = ("noloco", "noloco_m0.3")  # what is held against DiLoCo; the first one has the target
REFERENCES = ("diloco", "diloco_heavy")


def why_not(entry: Entry) -> str | None:
    """Why an entry cannot be trained: there is no such method, or it refuses its options. None if it can."""
    return building.why_not(settings_of(Cell(entry, entry.ranks[0], 1e-3, 1), Task()))


# ---- a cell: one entry on so many ranks, at one rate, with one seed --------------------------------------------------


@dataclass(frozen=True)
class Cell:
    entry: Entry
    ranks: int
    rate: float
    seed: int

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def name(self) -> str:
        return f"{self.ranks}-{self.entry.label}-{self.rate:g}-{self.seed}"


def settings_of(cell: Cell, task: Task) -> dict[str, Any]:
    """All that the result of a cell depends on, as JSON."""
    optimizer = {**ADAMW, "betas": list(ADAMW["betas"]), "lr": cell.rate}
    return {
        "schema": SCHEMA,
        "task": asdict(task),
        "method": cell.entry.method,
        "options": cell.entry.options_of(task),
        "optimizer": optimizer,
        "ranks": cell.ranks,
        "seed": cell.seed,
    }


Find = Callable[[Cell], Mapping[str, Any] | None]


def found_in(store: Store, task: Task) -> Find:
    return lambda cell: store.get(cell.name, settings_of(cell, task))


@dataclass(frozen=True)
class Protocol:
    """Which cells are needed, given those that are there: rates first, then seeds, then more ranks, then what is beside it."""

    grid: tuple[float, ...] = RATES
    extensions: int = EXTENSIONS
    seeds: Mapping[int, tuple[int, ...]] = field(default_factory=lambda: SEEDS)

    @property
    def first(self) -> tuple[int, int]:
        """The ranks and the seed that choose the rates."""
        ranks = min(self.seeds)
        return ranks, self.seeds[ranks][0]

    def judged(self, family: str, rate: float) -> list[Cell]:
        return [Cell(BY_LABEL[label], self.first[0], rate, self.first[1]) for label in JUDGES[family]]

    def score(self, family: str, rate: float, find: Find) -> float | None:
        """The mean loss of a family's judges; None as long as one is missing."""
        found = [find(cell) for cell in self.judged(family, rate)]
        losses = [loss_of(result) for result in found if result is not None]
        return statistics.fmean(losses) if len(losses) == len(found) else None

    def tried(self, family: str, find: Find) -> list[float]:
        """The rates of the grid, and those beyond its edges as far as they are needed."""
        return tried_rates(self.grid, self.extensions, lambda rate: self.score(family, rate, find))

    def best_rate(self, family: str, find: Find) -> float | None:
        """None as long as it is not known, and if nothing converges."""
        return best_rate({rate: self.score(family, rate, find) for rate in self.tried(family, find)})

    def is_at_edge(self, family: str, find: Find) -> bool:
        rates = self.tried(family, find)
        return len(rates) > 1 and self.best_rate(family, find) in (rates[0], rates[-1])

    def seeds_of(self, entry: Entry, ranks: int) -> tuple[int, ...]:
        return self.seeds[ranks][: entry.seeds if entry.is_extra else None]

    def wanted(self, entries: Collection[Entry], find: Find) -> Iterator[Cell]:
        """The cells to train, in order; more may follow from their results."""
        families = dict.fromkeys(entry.family for entry in entries)
        cells: list[Cell] = []
        for family in families:
            cells += [cell for rate in self.tried(family, find) for cell in self.judged(family, rate)]
        own = [(entry, ranks) for entry in entries for ranks in entry.ranks if ranks in self.seeds]
        for entry, ranks in sorted(own, key=lambda pair: (pair[0].is_extra, pair[1])):
            rate = self.best_rate(entry.family, find)
            if rate is not None:
                cells += [Cell(entry, ranks, rate, seed) for seed in self.seeds_of(entry, ranks)]
        return (cell for cell in dict.fromkeys(cells) if find(cell) is None)
