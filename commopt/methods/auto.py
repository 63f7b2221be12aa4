"""The fastest of a few exchanges, found while training."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor

from commopt.compress import make_compressor
from commopt.compress.base import Compressor
from commopt.compress.feedback import try_out
from commopt.exchange.base import Exchange
from commopt.exchange.compressed import Compressed
from commopt.exchange.mean import Mean
from commopt.exchange.two_way import TwoWayMean
from commopt.exchange.watch import Watch
from commopt.groups.base import Group
from commopt.groups.echo import Echo
from commopt.method import GradientMethod, NoOptions, options
from commopt.options import Count, Wanted, Whole
from commopt.plan.expected import Measured, Work, next_choice, predicted
from commopt.plan.profile import Operation, Phase, Profile
from commopt.wire.bucket import Bucket
from commopt.wire.state import Saved, State, check_tensor

Name = Literal["fp16", "two_way(int8)", "two_way(4bit)"]
WEIGHTS = {"dense": 1.0, "fp16": 1.05, "two_way(int8)": 1.06, "two_way(4bit)": 1.07}  # how much faster each has to be
NAMES = tuple(WEIGHTS)
SAMPLE = 1 << 20  # elements, to time a codec by


@options
class AutoOptions(NoOptions):
    candidates: Annotated[
        tuple[Name, ...], Field(min_length=1), Wanted("a list of 'fp16', 'two_way(int8)' and 'two_way(4bit)'")
    ] = ("fp16", "two_way(int8)", "two_way(4bit)")
    measure: Count = 10
    reconsider: Annotated[Whole, Field(ge=0)] = 500


class Auto(GradientMethod, Exchange):
    """Start as `dense`, time some steps, and go on with the fastest of `dense`, `fp16`, `two_way(int8)` and `two_way(4bit)`.

    commopt's own. The candidates are PyTorch's all-reduce, its fp16_compress_hook, and DoubleSqueeze, Tang et al. 2019,
    arXiv:1905.05957. After 3 steps that do not count, `measure` steps are timed. Their medians are T, a step, W, what
    it waits for exchanges, and X, what these take, beside backward or not. All ranks use the largest T and the least W
    and X of all. The planner's model of a step, fitted to them, and the time that each codec takes here say what to
    expect of each candidate c:
        take the c with the least T(c) w(c), with w = 1, 1.05, 1.06, 1.07 in the order above
        T(c) as it was timed, or else as it is expected; in the latter case time c for `measure` steps, and choose again
    So a candidate is kept only if steps took at least 5 % longer under `dense`. One that was slower than expected is
    expected to be as much slower the next time. All buckets of a step are exchanged by the same candidate,
    bit for bit as by the method of that name, and replicas stay equal. Times vary: two runs may choose differently.
    Each choice is an event of the run, with its reason (`run.events`). A resumed run goes on with its choice. With
    another number of ranks it keeps the choice, and measures again.
    Sends 2(N-1)/N x 4 bytes per parameter and step at first; then 2 (fp16), 1.02 (int8) or 0.52 (4 bits) in place of 4.
    For a decision each rank sends a few numbers to all others.
    State: none under `dense` and `fp16`; 4 + 4/N bytes per parameter while `two_way` is used or tried.
    Use it if you do not know the network, or have no time to compare methods. It keeps your optimizer.
    Not for runs of fewer than a hundred steps, nor for links on which four bits are too many: signs and rarer exchanges
    need options that fit the training. With FSDP2 on a mesh of one dimension candidates take the place of its
    reduce-scatter. `two_way` may cost about 1 % of the loss; `candidates: [fp16]` costs nothing that can be measured.
    With a GradScaler, exchanges do not overlap with backward. On the way from `two_way` to another candidate its
    residuals are forgotten, once: what rounding left out of about one gradient.

    candidates: what to choose from beside `dense`.
    measure: the steps that are timed before each decision.
    reconsider: the steps after which the current method is timed again, and others may be tried; 0 for never.
    """

    name = "auto"
    Options = AutoOptions
    options: AutoOptions
    warmup_option = "measure"
    warmup_steps = 0
    settle = 3  # steps of a new exchange that are not timed
    is_linear = False  # at attach: it may become two_way
    is_repeatable = False  # then neither
    states: ClassVar[tuple[State, ...]] = (
        State("choice", of="run", dtype=torch.int64),  # its place in NAMES
        State("steps_since", of="run", dtype=torch.int64),  # the last decision
        State("measuring", of="run", dtype=torch.int64, initial=1),
        State("decisions", of="run", dtype=torch.int64),
        State("step_s", of="run", numel=len(NAMES), dtype=torch.float64),  # as timed by this decision; 0: not
        State("expected_s", of="run", numel=len(NAMES), dtype=torch.float64),
        State("slower", of="run", numel=len(NAMES), dtype=torch.float64, initial=1.0),  # than expected, when last tried
    )

    def set_up(self) -> None:
        self.allowed = ("dense", *(name for name in NAMES if name in self.options.candidates))
        self.warmup_steps = self.settle + self.options.measure
        self.choose_among(_made)

    def choose_among(self, make: Callable[[str, int], Exchange]) -> None:
        """Make candidates by this: of a name, and of the elements of one bucket to try it on, or 0 for the model's own."""
        self._make = make
        self.parts = (make("dense", 0),)

    @property
    def current(self) -> Exchange:
        """What exchanges now."""
        (current,) = self.parts
        assert isinstance(current, Exchange)
        return current

    @property
    def choice(self) -> str:
        return NAMES[int(self.state["choice"])]

    @property
    def is_steady(self) -> bool:
        return self.ranks == 1 or bool(self.state["decisions"])

    @property
    def is_exact(self) -> bool:
        return self.choice in ("dense", "fp16")

    @property
    def state_form(self) -> str:
        return f"one of {', '.join(self.allowed)}"

    def bytes_per_parameter(self, ranks: int) -> float:
        return self.current.bytes_per_parameter(ranks)

    def pieces(self, numel: int, ranks: int) -> Sequence[int]:
        return make_compressor("int8").block_lengths(numel, ranks)  # whose blocks are those of 4 bits, too

    def lay_out(self, named_parameters: Sequence[tuple[str, Tensor]], group: Group) -> None:
        super().lay_out(named_parameters, group)
        self._named, self._group = list(named_parameters), group

    def bound(self) -> None:
        super().bound()
        self.watch, self._buckets = Watch(self.device), list[int]()
        self._codec_s: dict[str, float] = {}
        self._take_on()
        for name in self.allowed if self.ranks > 1 else ():  # no step will wait for kernels to be compiled
            if isinstance(made := self._make(name, 0), Compressed):
                try_out(made.compressor, made.kept, self.device)

    def exchange(self, bucket: Bucket, group: Group) -> None:
        self._buckets.append(len(bucket.flat))
        with self.watch.exchanging():
            self.current.exchange(bucket, group)

    def stepped(
        self, largest: Callable[[Sequence[float]], list[float]], steps: int, waited_s: float
    ) -> dict[str, Any] | None:
        if self.ranks == 1:
            return None
        self.watch.step(waited_s)
        buckets, self._buckets = self._buckets, []
        if self.state["measuring"]:
            self._timed += 1
            if self._timed == self.settle:
                self.watch.restart(waited_s)
            is_enough = self._timed >= self.settle + self.options.measure
            return self._decide(largest, steps, buckets) if is_enough else None
        self.state["steps_since"] += 1
        if 0 < self.options.reconsider <= int(self.state["steps_since"]):
            self._measure_anew()
        return None

    def _measure_anew(self) -> None:
        self._timed = 0
        self.state["measuring"].fill_(1)
        self.state["steps_since"].zero_()
        for key in ("step_s", "expected_s"):
            self.state[key].zero_()

    def _decide(
        self, largest: Callable[[Sequence[float]], list[float]], steps: int, buckets: Sequence[int]
    ) -> dict[str, Any] | None:
        """Choose, from what all ranks have measured, and go on with that."""
        own, before = self.watch.read(), self.choice
        told = largest([own.step_s, -own.waited_s, -own.exchange_s, sum(buckets), len(buckets)])
        now = Measured(told[0], -told[1], -told[2])
        self._note("step_s", {before: now.step_s})
        expected = self._by_name("expected_s")
        if before not in expected:  # the first one that this decision times
            expected = self._expect(now, largest, int(told[3]), int(told[4]))
            self._note("expected_s", expected)
        else:
            self._note("slower", {before: now.step_s / expected[before] * self._by_name("slower")[before]})
        step_s = self._by_name("step_s")
        after, is_open = next_choice(step_s, expected, WEIGHTS)
        self._use(after)
        self.state["measuring"].fill_(is_open)
        self.state["decisions"] += not is_open
        if after == before and (is_open or int(self.state["decisions"]) > 1):
            return None
        why = [f"{before} takes {_ms(now.step_s)} a step, of which {_ms(now.shown * now.exchange_s)} waiting"]
        if after != before:
            why.append(f"{after} {f'expected {_ms(expected[after])}' if is_open else f'took {_ms(step_s[after])}'}")
        return {"step": steps, "now": after, "because": "; ".join(why)}

    def _expect(
        self, now: Measured, largest: Callable[[Sequence[float]], list[float]], elements: int, buckets: int
    ) -> dict[str, float]:
        """Seconds of a step by each candidate; that of `dense` alone if no exchange, however fast, would be worth leaving it."""
        if (
            self.choice == "dense"
            and now.least_s * min(WEIGHTS[name] for name in self.options.candidates) >= now.step_s
        ):
            return {"dense": now.step_s}
        if not self._codec_s:
            self._codec_s = dict(zip(NAMES, largest([self._cost(name, elements) for name in NAMES]), strict=True))
        parts = tuple(elements * (k + 1) // buckets - elements * k // buckets for k in range(buckets))
        work = Work(self.ranks, parts, 1.0 if self.device.type == "cpu" else None)
        profiles = {name: self._profile(name) for name in self.allowed}
        model, slower = predicted(now, self.choice, profiles, self._codec_s, work), self._by_name("slower")
        return {name: step_s * slower[name] / slower[self.choice] for name, step_s in model.items()}

    def _by_name(self, key: str) -> dict[str, float]:
        """What is known of the candidates."""
        found = zip(NAMES, self.state[key].tolist(), strict=True)
        return {name: x for name, x in found if x > 0 and name in self.allowed}

    def _note(self, key: str, numbers: Mapping[str, float]) -> None:
        for name, x in numbers.items():
            self.state[key][NAMES.index(name)] = x

    def _profile(self, name: str) -> Profile:
        """What a candidate sends."""
        _, calls, n = self._tried(name, 1, times=1)
        return Profile(
            name, "gradient", tuple(Phase(cast(Operation, operation), nbytes / n) for operation, nbytes in calls)
        )

    def _cost(self, name: str, elements: int) -> float:
        """Seconds of a candidate's arithmetic for so many elements, timed on some; 0 if it is none."""
        if name not in self.allowed:
            return 0.0
        seconds, _, n = self._tried(name, elements, times=3)
        return seconds * elements / n

    def _tried(self, name: str, elements: int, times: int) -> tuple[float, list[tuple[str, int]], int]:
        """The least seconds of a candidate's exchange without a network, its calls, and the elements that it was tried on."""
        unit = 8 * 256 * self.ranks  # equal parts of whole blocks for all ranks
        n = unit * max(1, min(elements, SAMPLE) // unit)
        made, seconds = self._make(name, n), list[float]()
        dtype = torch.float32 if made.needs_float32 else self._named[0][1].dtype
        x = torch.linspace(-1, 1, n, dtype=dtype, device=self.device)
        made.bind([("x", x)], group := Echo(self.ranks))
        for _ in range(times):
            group.calls.clear()
            with _timed(self.device) as took:
                made.exchange(Bucket.of([("x", x)]), group)
            seconds += took
        return min(seconds), group.calls, n

    def _use(self, name: str) -> None:
        """Exchange by this candidate from now on."""
        if name != self.choice:
            self.parts = ()  # frees what the last one has kept
            self.parts = (self._bound(name),)
            self.state["choice"].fill_(NAMES.index(name))
        self._take_on()

    def _bound(self, name: str) -> Exchange:
        made = self._make(name, 0)
        made.bind(self._named, self._group, self.exchanges, self.share)
        return made

    def _take_on(self) -> None:
        self.needs_float32, self.is_linear = self.current.needs_float32, self.current.is_linear
        self._timed = 0  # steps; a checkpoint does not have what was timed

    # -- checkpoints, whose state is that of the choice in them

    def load(self, saved: Saved) -> None:
        self._use(self._choice_in(saved))
        super().load(saved)

    def check_saved(self, saved: Saved) -> None:
        current = self.parts
        if (name := self._choice_in(saved)) != self.choice:
            self.parts = (self._bound(name),)
        try:
            super().check_saved(saved)
        finally:
            self.parts = current

    def resize(self, every: Sequence[Saved]) -> None:
        self._use(self._choice_in(every[0]))
        super().resize(every)
        self._measure_anew()

    def reset(self) -> None:
        self._use("dense")
        super().reset()

    def _choice_in(self, saved: Saved) -> str:
        check_tensor(self.state["choice"], saved["shared"], "choice")
        return NAMES[int(saved["shared"]["choice"])]


def _made(name: str, _: int) -> Exchange:
    """A candidate, which fits every bucket; as the method of that name exchanges, with its defaults."""
    if name.startswith("two_way"):
        return TwoWayMean(codec_of(name))
    mean = Mean()
    mean.wire_dtype = torch.float16 if name == "fp16" else None
    return mean


def codec_of(name: str) -> Compressor:
    """The codec of a candidate that compresses: what is in brackets."""
    return make_compressor(name.removeprefix("two_way(").removesuffix(")"))


@contextmanager
def _timed(device: torch.device) -> Iterator[list[float]]:
    """A list that gets the seconds of the block."""
    took: list[float] = []
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    yield took
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    took.append(time.perf_counter() - begun)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.01 else f"{seconds * 1e3:.2g} ms"
