"""What every method costs on one core of a CPU beside its network: one rank's exchange and step, as multiples of a copy.

python scripts/bench/codec_costs.py                     all that is not stored yet: minutes
python scripts/bench/codec_costs.py --only 'loco,codec-*' --redo
python scripts/bench/codec_costs.py --quick             a look in seconds: few elements and turns, and nothing is stored
python scripts/bench/codec_costs.py --table | --page    show what is stored, or write it into docs/steps.md

A case is the exchange of one bucket of 8.0 M float32, eight matrices, among four ranks, of which three are pretended: a group returns
what it is given at once. For update methods it is also the optimizer's step. A `codec-*` is one compressor with its residual: encoding
and decoding the same bucket. Every run is timed in turn with a copy of the same elements, in the processor time of the one thread;
the least of each counts, so that a busy neighbour matters little. A ratio is of one process: never compare seconds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from command import DOCS, Report, base_name, main, matching, new_parser, only_shows, present
from rich.text import Text
from sheets import Sheet, judged
from store import RESULTS, Store
from torch import Tensor, nn

from commopt.errors import ConfigError
from commopt.groups.echo import Echo
from commopt.wire.bucket import Blocks, Bucket, ParameterIndex
from commopt.wire.payload import Payload

STORED, PAGE = RESULTS / "codec_costs.jsonl", DOCS / "steps.md"
RANKS, ROWS, COLUMNS, MATRICES, TURNS = 4, 976, 1024, 8, 9  # every owner has as many blocks
QUICK = {"rows": 16, "turns": 2}
CODECS = {"threshold": {"threshold": 2.5}}  # what has no default; the one of a normal draw in a hundred


@dataclass(frozen=True)
class Case:
    """A method, or a codec, and the most that it is to cost: an exchange and a step, as multiples of a copy."""

    name: str
    exchange: float | None = None
    step: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Any] = field(default_factory=lambda: {"name": "sgd", "lr": 1e-3})

    @property
    def is_codec(self) -> bool:
        return self.name.startswith("codec-")

    def settings(self, rows: int, turns: int) -> dict[str, Any]:
        sizes = {"elements": MATRICES * rows * COLUMNS, "ranks": RANKS}
        return sizes | {"options": dict(self.options)} | ({} if self.is_codec else {"optimizer": dict(self.optimizer)})


ADAM, LAMB, LION = ({"name": name, "lr": 1e-4} for name in ("adam", "lamb", "lion"))
METHODS = [
    Case("dense", 3),
    Case("fp16", 4),
    Case("ef_sign", 4.5),
    Case("signum", 6),
    *(
        Case(f"two_way({codec})", most, options={"worker": codec})
        for codec, most in (("int8", 8), ("4bit", 8), ("fp8", 10))
    ),
    Case("loco", 12),
    Case("natural", 8),
    Case("qsgd", 6),
    Case("terngrad", 12),
    Case("top_k", 8),
    Case("ef21", 10),
    Case("dgc", 14),
    Case("random_k", 8),
    Case("powersgd", 14),
    Case("demo", 60, 4),
    Case("onebit_adam", 6, 4, {"freeze_step": 1}, ADAM),
    Case("zero_one_adam", 7, 4, {"var_freeze_step": 1, "local_step_scaler": 1, "local_step_clipper": 1}, ADAM),
    Case("onebit_lamb", 8, 8, {"freeze_step": 1}, LAMB),
    Case("distributed_lion", 7, 1.7, optimizer=LION),
    Case("ef"),
    Case("threshold", options=CODECS["threshold"]),
    Case("auto"),  # which begins as dense
    Case("dice_sgd", options={"noise_multiplier": 1e-3, "noise_seed": 1}),
]


def all_cases() -> list[Case]:
    """The methods with a target and without, and every codec."""
    from commopt.compress import COMPRESSORS

    return [*METHODS, *(Case(f"codec-{name}", options=CODECS.get(name, {})) for name in COMPRESSORS)]


# ---- measuring -------------------------------------------------------------------------------------------------------


Call = tuple[str, Callable[[], object]]


def measure(case: Case, rows: int, turns: int) -> dict[str, float]:
    """Multiples of a copy, by what was timed."""
    torch.manual_seed(1)
    x = torch.randn(MATRICES * rows * COLUMNS)
    copy: Call = ("copy", partial(torch.empty_like(x).copy_, x))
    seconds: dict[str, list[float]] = {}
    with torch.no_grad():
        turn = (codec_calls if case.is_codec else method_calls)(case, x, rows)
        for k in range(turns + 2):  # in the first ones warm-ups end, tables are made and kernels compiled
            for name, call in [copy, *next(turn), copy]:
                before = time.thread_time()
                call()
                if k > 1:
                    seconds.setdefault(name, []).append(time.thread_time() - before)
    least = {name: min(own) for name, own in seconds.items()}
    return {name: round(least[name] / least["copy"], 2) for name in least if name != "copy"}


def method_calls(case: Case, x: Tensor, rows: int) -> Iterator[list[Call]]:
    """By turn: the exchange of a bucket of gradients, and the step of an update method."""
    from building import attach

    from commopt.method import GradientMethod

    model = nn.Sequential(*(nn.Linear(COLUMNS, rows, bias=False) for _ in range(MATRICES)))
    method = base_name(case.name)
    run: Any = attach({"method": method, "options": case.options, "optimizer": case.optimizer}, model, Echo(RANKS))
    bucket = Bucket.of([(name, torch.zeros(rows * COLUMNS)) for name, _ in model.named_parameters()])
    for (_, view), p in zip(bucket.views(), model.parameters(), strict=True):
        p.grad = view.view_as(p)

    calls: list[Call] = [("exchange", lambda: run.exchange([bucket]))]
    is_update = not isinstance(run.method, GradientMethod)
    while True:
        bucket.flat.copy_(x)
        yield [*calls, ("step", run.optimizer.step)] if is_update else calls
        if not is_update:
            run.optimizer.step()
        assert not run.voided


def codec_calls(case: Case, x: Tensor, rows: int) -> Iterator[list[Call]]:
    """By turn: encoding the bucket for four owners with error feedback, and decoding it."""
    from commopt.compress import make_compressor
    from commopt.compress.feedback import ErrorFeedback, Kept

    names = tuple(map(str, range(MATRICES)))
    index, bucket = (
        ParameterIndex(names, (rows * COLUMNS,) * MATRICES),
        Bucket(x, names, tuple(range(0, len(x), rows * COLUMNS))),
    )
    codec = make_compressor({"compressor": case.name.removeprefix("codec-"), **case.options})
    table, out, sent = codec.table(index, RANKS), torch.empty_like(x), list[Payload]()
    feedback, counts = ErrorFeedback(codec, Kept(), table.everything), np.zeros(MATRICES, np.int64)

    def encode(parts: Sequence[Blocks]) -> None:
        sent[:] = feedback.compress(x, parts)

    while True:
        counts += 1
        parts = [blocks.having(keys=blocks.drawn(0, "", 0, counts)) for blocks in table.parts(bucket).by_owner]
        yield [("encode", partial(encode, parts)), ("decode", partial(codec.decompress_payloads_, sent, parts, out))]


# ---- showing ---------------------------------------------------------------------------------------------------------


def report(cases: Sequence[Case], found: Mapping[str, Mapping[str, Any]]) -> Report:
    """A table of methods, and one of codecs."""
    own = [case for case in cases if case.name in found]
    methods, codecs = ([case for case in own if case.is_codec == is_codec] for is_codec in (False, True))
    elements = {found[case.name]["settings"]["elements"] for case in own}
    size = f"{max(elements, default=0) / 1e6:.1f} M float32 on one core, as multiples of a copy"
    sheets = []
    if methods:
        headings = ("method", "exchange", "target", "step", "step's target")
        rows = [row_of(case, found[case.name]) for case in methods]
        sheets.append(Sheet(f"One rank's exchange among {RANKS}, {size}", headings, rows, left=("method",)))
    if codecs:
        rows = [
            [f"`{case.name[6:]}`", *(f"{found[case.name][key]:.1f}" for key in ("encode", "decode"))] for case in codecs
        ]
        sheets.append(Sheet(f"Codecs: {size}", ("codec", "encode", "decode"), rows, left=("codec",)))
    late = [case.name for case in methods if not all(verdicts(case, found[case.name]).values())]
    return Report(sheets, [f"Targets missed: {', '.join(late)}"] if late else [])


def row_of(case: Case, found: Mapping[str, Any]) -> list[str | Text]:
    cells: list[str | Text] = [f"`{case.name}`"]
    for key, target in (("exchange", case.exchange), ("step", case.step)):
        has_number, is_met = key in found, verdicts(case, found).get(key)
        cells += [f"{found[key]:.1f}" if has_number else "", judged("" if target is None else f"{target:g}", is_met)]
    return cells


def verdicts(case: Case, found: Mapping[str, Any]) -> dict[str, bool]:
    """Whether each target is met."""
    return {
        key: found[key] <= most for key, most in (("exchange", case.exchange), ("step", case.step)) if most is not None
    }


# ---- the command line ------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    made, what = new_parser(__doc__, STORED, "only cases whose names match a pattern, such as 'codec-*'")
    what.add_argument("--page", action="store_true", help="only write the tables into docs/")
    what.add_argument("--quick", action="store_true", help="few elements and turns; store nothing")
    made.set_defaults(figure=False)  # the page has none
    return made


def run(args: argparse.Namespace) -> None:
    """Do what the command line says. Raises ConfigError for a mistake in it, before anything is measured."""
    shows, cases = only_shows(args), matching(args.only, all_cases())
    if args.quick and args.redo:
        raise ConfigError("--redo: has no effect with --quick; leave one of them out")
    torch.set_num_threads(1)
    sizes = QUICK if args.quick else {"rows": ROWS, "turns": TURNS}
    store, found = Store(args.results or STORED, ["*"] if args.redo else ()), dict[str, Any]()
    for case in cases:
        settings = case.settings(**sizes)
        known = None if args.quick else store.get(case.name, None if shows else settings)
        if known is None and not shows:
            ratios = measure(case, **sizes)
            print(f"{case.name}: {', '.join(f'{key} {ratio:.1f} x copy' for key, ratio in ratios.items())}", flush=True)
            if not args.quick:
                store.put(case.name, settings, ratios)
            known = {"settings": settings, **ratios}
        if known is not None:
            found[case.name] = known
    present(report(cases, found), args, PAGE)


if __name__ == "__main__":
    main(parser(), run)
