"""What convergence.py compares: tasks, methods with their parents and rates, cells, and which of them are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import building
from losses import FACTOR, best_rate, loss_of, tried_rates
from store import Store

from commopt.methods import METHODS

SCHEMA = 1
EXTENSIONS = 2  # how many rates beyond the first three are tried
SEEDS = (1, 2, 3, 4, 5)  # the first one chooses the rate; the first three unless more are asked for


@dataclass(frozen=True)
class Task:
    """A model, its data, and how long how many ranks train it."""

    name: str
    problem: str
    sizes: Mapping[str, Any]
    steps: int
    ranks: int = 4
    seeds: tuple[int, ...] = SEEDS[:3]
    rates_from: str | None = None  # the task whose best rates this one takes
    decay_from: float = 0.5  # from this share of the steps on, the rate falls to zero, as in launch/train.py

    def settings(self) -> dict[str, Any]:
        """All that a result depends on."""
        chosen = ("name", "problem", "sizes", "steps", "ranks", "decay_from")
        return {key: value for key, value in asdict(self).items() if key in chosen}


GPT = {"layers": 3, "heads": 4, "width": 64, "context": 64}
TASKS = {
    task.name: task
    for task in (
        Task("gpt_long", "gpt", {**GPT, "batch": 2}, steps=3000, ranks=8, seeds=SEEDS[:1], rates_from="gpt"),
        Task("gpt", "gpt", {**GPT, "batch": 4}, steps=600),
        Task("digits", "digits", {"width": 128, "batch": 32, "noise": 0.5}, steps=500),
    )
}
SHORT = ("gpt", "digits")


@dataclass(frozen=True)
class Share:
    """An option that is a share of the steps."""

    share: float


@dataclass(frozen=True)
class Entry:
    """A method with its options, and the parent that it is compared with: a label too.

    rates: the middle of the grid in each task, the parent's if left out; a long task named here has a grid of its own.
    optimizer: what the method goes with, the parent's if left out. targets: by how many percent it may be worse than its parent,
    by task.
    """

    label: str
    method: str
    parent: str
    options: Mapping[str, Any] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)
    optimizer: Mapping[str, Any] | None = None
    tasks: tuple[str, ...] = SHORT
    targets: Mapping[str, float] = field(default_factory=dict)


OPTIMIZERS: Mapping[str, Mapping[str, Any]] = {
    "adam": {"name": "adam"},
    "sgd": {"name": "sgd", "momentum": 0.9},
    "lion": {"name": "lion"},
    "lamb": {"name": "lamb"},
}
PARENT_RATES: Mapping[str, Mapping[str, float]] = {
    "adam": {"gpt": 2e-3, "digits": 8e-3},
    "sgd": {"gpt": 0.1, "digits": 0.1},
    "lion": {"gpt": 5e-4, "digits": 2e-3},
    "lamb": {"gpt": 2e-2, "digits": 2e-2},
}
PLAIN_SGD = {"name": "sgd"}  # for methods that bring their own momentum
ALL = (*SHORT, "gpt_long")
LONG_PARENTS = ("adam", "sgd", "lion")


def within(percent: float, *tasks: str) -> dict[str, float]:
    """A target in the short tasks, or in those named."""
    return dict.fromkeys(tasks or SHORT, percent)


WARMUP = Share(0.2)
ENTRIES = (
    *(
        Entry(name, "dense", name, rates=PARENT_RATES[name], tasks=ALL if name in LONG_PARENTS else SHORT)
        for name in OPTIMIZERS
    ),
    # Adam
    Entry("fp16", "fp16", "adam"),
    Entry("int8", "two_way", "adam", {"worker": "int8"}, targets=within(1)),
    Entry("fp8", "two_way", "adam", {"worker": "fp8"}),
    Entry("4bit", "two_way", "adam", {"worker": "4bit"}),
    Entry("loco", "loco", "adam"),
    Entry("natural", "natural", "adam"),
    Entry("qsgd", "qsgd", "adam"),
    Entry("terngrad", "terngrad", "adam"),
    Entry("powersgd_4_adam", "powersgd", "adam", {"rank": 4}),
    Entry("onebit_adam", "onebit_adam", "adam", {"freeze_step": WARMUP}, tasks=ALL, targets=within(1, *ALL)),
    Entry(
        "zero_one_adam",
        "zero_one_adam",
        "adam",
        {"var_freeze_step": WARMUP, "var_update_scaler": WARMUP, "local_step_clipper": 4},
        targets=within(1),
    ),
    # LAMB
    Entry("onebit_lamb", "onebit_lamb", "lamb", {"freeze_step": WARMUP}, targets=within(1)),
    # SGD with momentum
    Entry("powersgd_4", "powersgd", "sgd", {"rank": 4}, targets=within(1)),
    Entry("ef_sign", "ef_sign", "sgd", rates={"gpt": 0.05, "digits": 0.05}),
    Entry("top_k_1pct", "top_k", "sgd", {"density": 0.01}),
    Entry("random_k_1pct", "random_k", "sgd", {"density": 0.01}, rates={"gpt": 0.1, "digits": 0.05}),
    Entry(
        "ef21_top_k_1pct",
        "ef21",
        "sgd",
        {"compressor": {"compressor": "top_k", "density": 0.01}},
        rates={"gpt": 0.5, "digits": 0.5},
        optimizer=PLAIN_SGD,
    ),
    Entry(
        "dgc_1pct",
        "dgc",
        "sgd",
        {"density": 0.01, "momentum": 0.9, "warmup_steps": Share(0.05)},
        optimizer=PLAIN_SGD,
        tasks=ALL,
        targets=within(1, *ALL),
    ),
    Entry(
        "dgc_0.1pct",
        "dgc",
        "sgd",
        {"density": 0.001, "momentum": 0.9, "warmup_steps": Share(0.05), "max_norm": 0.25},
        rates={"gpt": 0.05, "gpt_long": 0.1},  # 600 steps are too few to choose its rate by: an element waits 1,000
        optimizer=PLAIN_SGD,
        tasks=ALL,
        targets=within(2, "gpt_long"),
    ),
    # Lion, and what moves by the sign of a momentum as it does
    Entry("lion_average", "distributed_lion", "lion", {"vote": "average"}, tasks=ALL, targets=within(1, *ALL)),
    Entry("lion_majority", "distributed_lion", "lion", {"vote": "majority"}, tasks=ALL, targets=within(2, *ALL)),
    Entry("signum", "signum", "lion", {"momentum": 0.9}, optimizer=PLAIN_SGD),
    Entry("demo", "demo", "lion"),
)
Pair = tuple[Entry, Task]
BY_LABEL = {entry.label: entry for entry in ENTRIES}
LEFT_OUT = {
    "auto": "it trains as dense, fp16, int8 or 4bit does",
    "dice_sgd": "its noise is for privacy, and no compression",
    "ef": "ef_sign and top_k are of its kind",
    "threshold": "what it sends depends on the threshold, which has to be found for every model",
}


def why_not(entry: Entry) -> str | None:
    """Why an entry cannot be trained: its method is not there, or refuses its options. None if it can."""
    return building.why_not(settings_of(Cell(TASKS[entry.tasks[0]], entry, 1e-3, 1)))


def chosen_pairs(labels: Sequence[str], tasks: Sequence[Task], entries: Sequence[Entry]) -> list[Pair]:
    """What to train for these labels: with their parents, and with what gives the long runs their rates. Long runs first."""
    wanted = {label: None for entry in entries if entry.label in labels for label in (entry.parent, entry.label)}
    own = [entry for entry in entries if entry.label in wanted]
    own.sort(key=lambda entry: -len(entry.tasks))  # the long runs wait for these rates
    by_name = {task.rates_from: TASKS[task.rates_from] for task in tasks if task.rates_from}
    by_name |= {task.name: task for task in tasks}
    every = [by_name[name] for name in TASKS if name in by_name]
    return [(entry, task) for task in every for entry in own if task.name in entry.tasks]


def notices(entries: Sequence[Entry]) -> tuple[list[Entry], list[str]]:
    """The entries that can be trained, and what is said about the others, and about methods without an entry."""
    reasons = {entry.label: why_not(entry) for entry in entries}
    lines = [f"{label} is skipped: {reason}" for label, reason in reasons.items() if reason is not None]
    listed = {entry.method for entry in ENTRIES} | set(LEFT_OUT)
    every_step = [name for name, method in METHODS.items() if method.kind != "outer"]
    lines += [f"{name} has no entry in {Path(__file__).name}" for name in every_step if name not in listed]
    return [entry for entry in entries if reasons[entry.label] is None], lines


# ---- a cell: one method on one task, at one rate, with one seed ------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    task: Task
    entry: Entry
    rate: float
    seed: int

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def name(self) -> str:
        return f"{self.task.name}-{self.entry.label}-{self.rate:g}-{self.seed}"


def settings_of(cell: Cell) -> dict[str, Any]:
    """All that the result of a cell depends on, as JSON."""
    options = {
        key: max(1, round(value.share * cell.task.steps)) if isinstance(value, Share) else value
        for key, value in cell.entry.options.items()
    }
    return {
        "schema": SCHEMA,
        "task": cell.task.settings(),
        "method": cell.entry.method,
        "options": options,
        "optimizer": {**(cell.entry.optimizer or OPTIMIZERS[cell.entry.parent]), "lr": cell.rate},
        "seed": cell.seed,
    }


Find = Callable[[Cell], Mapping[str, Any] | None]


def found_in(store: Store) -> Find:
    return lambda cell: store.get(cell.name, settings_of(cell))


@dataclass(frozen=True)
class Protocol:
    """Which cells an entry needs on a task, given those that are there."""

    grid: tuple[float, ...] = (1 / FACTOR, 1.0, FACTOR)
    extensions: int = EXTENSIONS

    def middle(self, entry: Entry, task: Task) -> float:
        return entry.rates.get(task.name) or PARENT_RATES[entry.parent][task.name]

    def tried(self, entry: Entry, task: Task, find: Find) -> list[Cell]:
        """The cells that choose the rate: those of the grid, and those beyond its edges as far as they are needed."""
        middle, seed = self.middle(entry, task), task.seeds[0]

        def score(rate: float) -> float | None:
            return self.scores([Cell(task, entry, rate, seed)], find)[rate]

        rates = tried_rates([middle * factor for factor in self.grid], self.extensions, score)
        return [Cell(task, entry, rate, seed) for rate in rates]

    @staticmethod
    def scores(cells: Iterable[Cell], find: Find) -> dict[float, float | None]:
        """The loss at the rate of each cell; None if it is not there."""
        found = {cell.rate: find(cell) for cell in cells}
        return {rate: None if result is None else loss_of(result) for rate, result in found.items()}

    def choosing(self, entry: Entry, task: Task, find: Find) -> list[Cell]:
        """`tried` on the task that chooses the rate."""
        return self.tried(entry, task if self.tunes(entry, task) else TASKS[str(task.rates_from)], find)

    def tunes(self, entry: Entry, task: Task) -> bool:
        """Whether the entry's rate is chosen on this task: unless it takes another one's, and the entry does not differ."""
        return task.rates_from is None or task.name in entry.rates

    def best_rate(self, entry: Entry, task: Task, find: Find) -> float | None:
        """None as long as it is not known, and if nothing converges."""
        return best_rate(self.scores(self.choosing(entry, task, find), find))

    def is_at_edge(self, entry: Entry, task: Task, find: Find) -> bool:
        """Whether a rate beyond those tried might have been better still."""
        tried = [cell.rate for cell in self.choosing(entry, task, find)]
        return len(tried) > 1 and self.best_rate(entry, task, find) in (tried[0], tried[-1])

    def wanted(self, entry: Entry, task: Task, find: Find) -> list[Cell]:
        """The cells to train next; more may follow from their results."""
        tried = self.tried(entry, task, find) if self.tunes(entry, task) else []
        missing = [cell for cell in tried if find(cell) is None]
        rate = self.best_rate(entry, task, find)
        if missing or rate is None:
            return missing
        return [cell for seed in task.seeds if find(cell := Cell(task, entry, rate, seed)) is None]
