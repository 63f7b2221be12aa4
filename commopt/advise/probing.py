"""What each rank of `commopt probe` runs: it measures with the others, and rank 0 writes down what all have found.

python -m commopt.advise.probing '{"out": "found.json", "methods": ["dense"], "cores_per_rank": 1, "until_s": 1.8e9, "record": null}'

out: rank 0's file. record: the folder with what this machine's ranks have recorded of the user's script, if there is one. until_s: the
time after which no further method is timed.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from commopt.advise.codecs import (
    NEEDED,
    Shapes,
    adamw_costs,
    clock_of,
    copied_bytes_per_s,
    costs_of,
    models_of,
    seconds_of,
)
from commopt.advise.pairs import Machines
from commopt.advise.profiling import profile_of
from commopt.exchange.two_level import machine_mean, put_together
from commopt.groups import Group, World, connect
from commopt.method import EveryStep
from commopt.methods import build
from commopt.plan.links import LinkModel
from commopt.record.lines import RankRecord
from commopt.run import checks
from commopt.wire.bucket import Bucket, ParameterIndex, Share
from commopt.wire.payload import Payload

_LEAST_BYTES, _MOST_BYTES, _MOST_S, _LONG_S = 1 << 10, 1 << 22, 0.4, 0.1  # of one exchange
_CALLS, _LONG_CALLS = 5, 3
_CALLS_S = 4.0  # after which no larger exchange of an operation is tried
_PAIRS_S, _LEAST_S = 8.0, 12.0
_MOST_ELEMENTS = 30_000_000  # of a script's parameters
Points = list[tuple[int, float, float]]  # bytes, seconds, share of the processor


class Ranks:
    """All ranks while they measure; what is decided here, all decide alike.

    cores: of the machine, for each of its ranks.
    """

    def __init__(self, group: Group, device: torch.device, cores: float) -> None:
        self.group, self.device, self.cores = group, device, cores
        self.between = group.between if isinstance(group, World) else group

    def say(self, text: str) -> None:
        if self.group.rank == 0:
            print(text, flush=True)

    def tell(self, own: object) -> list[Any]:
        return [json.loads(text) for text in self.group.tell(json.dumps(own))]

    def slowest(self, own: Sequence[float]) -> list[float]:
        """The largest of each number over the ranks."""
        return [max(column) for column in zip(*self.tell(list(own)), strict=True)]

    def calls(self, call: Callable[[], object], expected_s: float) -> tuple[float, float, float]:
        """Seconds of a call that all ranks make, the median of the slowest rank's; share of the processor that it needs; all seconds."""
        count = _CALLS if expected_s < _LONG_S else _LONG_CALLS
        began_s, clock = time.monotonic(), clock_of(self.device)
        call()
        used_s = -time.process_time()
        seconds = [seconds_of(call, clock) for _ in range(count)]
        used_s += time.process_time()
        rows = self.tell([*seconds, used_s / (sum(seconds) * self.cores), time.monotonic() - began_s])
        *times, _, spent_s = [max(column) for column in zip(*rows, strict=True)]
        return statistics.median(times), min(1.0, statistics.fmean(row[-2] for row in rows)), spent_s

    def curve(self, make: Callable[[int], tuple[int, Callable[[], object]]]) -> Points:
        """(bytes, seconds, share of the processor) from small calls to large ones, as long as they do not take long.

        make: the bytes, rounded, and a call that exchanges them.
        """
        points: Points = []
        wanted, expected_s, left_s = _LEAST_BYTES, 0.0, _CALLS_S
        while True:
            nbytes, call = make(wanted)
            seconds, busy, spent_s = self.calls(call, expected_s)
            points.append((nbytes, seconds, busy))
            left_s -= spent_s
            if nbytes >= _MOST_BYTES or left_s < 0:
                return points
            growth = 4 if seconds < _LONG_S / 4 or len(points) == 1 else min(4.0, _MOST_S / seconds)
            if growth < 1.4:
                return points
            wanted, expected_s = min(_MOST_BYTES, int(nbytes * growth)), seconds * growth


# ---- what is measured ------------------------------------------------------------------------------------------------


def links_of(ranks: Ranks) -> dict[str, Any]:
    """The machines' names, and what the links between them give."""
    group, between = ranks.group, ranks.between
    told = group.tell(os.environ.get("COMMOPT_NODE", ""))
    slots = len(told) // between.size
    names, text = told[::slots], os.environ.get("COMMOPT_LINKS")
    number, slot = divmod(group.rank, slots)
    machines = Machines(names, number, slot == 0, group.tell, LinkModel.from_json(text) if text else None)
    found = machines.pairs(_PAIRS_S, ranks.say)
    ranks.say("rates while all machines send")
    together = machines.together(found)
    machines.close()
    pairs = [
        {"from": names[a], "to": names[b], "latency_s": latency_s, "bytes_per_s": rate}
        for (a, b), (latency_s, rate) in sorted(found.items())
    ]
    return {"nodes": names, "slots": slots, "pairs": pairs, "together": dict(zip(names, together, strict=True))}


def exchanges_of(ranks: Ranks) -> dict[str, Points]:
    """What the exchanges among machines cost, by operation."""
    between, device = ranks.between, ranks.device

    def all_reduce(nbytes: int) -> tuple[int, Callable[[], object]]:
        x = torch.zeros(nbytes // 4, dtype=torch.float32, device=device)
        return x.nbytes, lambda: between.all_reduce(x)

    def all_gather(nbytes: int) -> tuple[int, Callable[[], object]]:
        payload = Payload.of(torch.zeros(nbytes, dtype=torch.uint8, device=device))
        return nbytes, lambda: between.all_gather(payload)

    def all_to_all(nbytes: int) -> tuple[int, Callable[[], object]]:
        parts = [Payload.of(torch.zeros(nbytes // between.size, dtype=torch.uint8, device=device))] * between.size
        return len(parts) * parts[0].nbytes, lambda: between.all_to_all(parts)

    found = {}
    for make in (all_reduce, all_gather, all_to_all):
        ranks.say(f"exchanges: {make.__name__}")
        found[make.__name__] = ranks.curve(make)
    return found


def inside_of(ranks: Ranks) -> Points:
    """What it costs a machine's ranks to share out a bucket and to put it together again."""
    inside, machines = ranks.group.inside, ranks.between.size
    if inside is None or inside.size == 1:
        return []
    ranks.say(f"exchanges among the {inside.size} ranks of each machine")
    method: Any = build("dense")

    def make(nbytes: int) -> tuple[int, Callable[[], object]]:
        x = torch.zeros(nbytes // 4, dtype=torch.float32, device=ranks.device)
        bucket = Bucket.of([("x", x)])
        index = ParameterIndex(("x",), (x.numel(),))
        share = Share.cut(index, inside.size, inside.rank, lambda numel: method.pieces(numel, machines))
        return x.nbytes, lambda: put_together(machine_mean(bucket, share, inside), bucket, share, inside)

    return ranks.curve(make)


def codecs_of(ranks: Ranks, methods: Sequence[str], until_s: float, shapes: Shapes) -> dict[str, Any]:
    """What each method computes, on the slowest rank; without those for which the time does not suffice. shapes: of the script.

    until_s: when no further method is begun, by the machine's clock; there are some seconds, however late it is.
    """
    machines, models, found = ranks.between.size, models_of(shapes), dict[str, Any]()
    clock = clock_of(ranks.device, ranks.cores)
    ranks.say("the optimizer's step")
    adamw, told_s = _slowest(ranks, {"step": adamw_costs(ranks.device, clock, models)}), -math.inf
    left_s, began_s = max(_LEAST_S, *ranks.tell(until_s - time.time())), time.monotonic()
    for k, name in enumerate(methods):
        (elapsed_s,) = ranks.slowest([time.monotonic() - began_s])
        if elapsed_s > left_s:
            ranks.say(
                f"the time is over: {', '.join(methods[k:])} {'was' if k + 1 == len(methods) else 'were'} left out"
            )
            break
        if elapsed_s - told_s > 1.5:
            ranks.say(f"methods without a network: {name}, {k + 1} of {len(methods)}")
            told_s = elapsed_s
        found[name] = adamw | _slowest(ranks, costs_of(name, machines, ranks.device, clock, models))
    return found


def shapes_of(record: str | None) -> Shapes:
    """The shapes of the script's parameters; none without one, nor of a large model, which would take long."""
    files = [] if record is None else sorted(Path(record).glob("rank*.jsonl"))
    shapes: Shapes = RankRecord.read(files[0]).shapes if files else ()
    return shapes if sum(map(math.prod, shapes)) <= _MOST_ELEMENTS else ()


def profiles_of(ranks: Ranks, methods: Sequence[str], shapes: Shapes) -> dict[str, Any]:
    """What the methods send of the script's own parameters, on rank 0."""
    if not shapes or ranks.group.rank:
        return {}
    machines = (ranks.between.size,)
    return {name: profile_of(build(name, **NEEDED.get(name, {})), name, shapes, machines).to_json() for name in methods}


def _slowest(ranks: Ranks, costs: Mapping[str, Sequence[tuple[int, float]]]) -> dict[str, Any]:
    seconds = iter(ranks.slowest([s for points in costs.values() for _, s in points]))
    return {key: [(elements, next(seconds)) for elements, _ in points] for key, points in costs.items()}


def script_of(ranks: Ranks, record: str | None) -> dict[str, Any] | None:
    """A script's own times, from what every rank has recorded."""
    if record is None:
        return None
    one = RankRecord.read(Path(record) / f"rank{ranks.group.rank}.jsonl")
    steady = [line.seconds for line in one.steps if line.steady]
    told = ranks.tell([one.compute_s, steady, one.buckets, one.overlap])
    if any(not compute or not steps for compute, steps, *_ in told):
        return None
    everything = [seconds for compute, *_ in told for seconds in compute]
    buckets, overlap = told[0][2:]
    # the scheduler makes ranks that share cores differ, each time in another way
    medians = [statistics.median(compute) for compute, *_ in told]
    compute_s = statistics.median(everything) if ranks.cores < 1 else max(medians)
    parameters = int(one.start["parameters"])
    shards = max(1, round(parameters / max(1, sum(buckets))))  # under FSDP a rank exchanges its shard only
    return {
        "parameters": parameters,
        "compute_s": compute_s,
        "spread": statistics.pstdev(everything) / statistics.fmean(everything),
        "step_s": max(statistics.median(steps) for _, steps, *_ in told),
        "buckets": [n * shards for n in buckets],
        "overlap": overlap,
    }


def main(settings: Mapping[str, Any]) -> None:
    """Measure with the other ranks; see the top of this file."""
    connect()
    dense = build("dense")
    assert isinstance(dense, EveryStep)
    group = checks.connect(method=dense)
    backend = os.environ.get("COMMOPT_BACKEND", "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if backend == "nccl" else torch.device("cpu")
    ranks = Ranks(group, device, settings["cores_per_rank"])
    name = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)
    found: dict[str, Any] = {"torch": torch.__version__, "device": name, "script": script_of(ranks, settings["record"])}
    found |= links_of(ranks)
    found |= {"exchanges": exchanges_of(ranks), "inside": inside_of(ranks)}
    (copy_s,) = ranks.slowest([1 / copied_bytes_per_s(device, clock_of(device, ranks.cores))])
    found |= {"copy_bytes_per_s": 1 / copy_s}
    shapes = shapes_of(settings["record"])
    found |= {"codecs": codecs_of(ranks, settings["methods"], settings["until_s"], shapes)}
    if shapes:
        ranks.say("what methods send of the script's parameters")
    found |= {"profiles": profiles_of(ranks, list(found["codecs"]), shapes)}
    if group.rank == 0:
        Path(settings["out"]).write_text(json.dumps(found), encoding="utf-8")
    ranks.say("everything is measured; the ranks end")
    ranks.tell("done")  # before the store of rank 0 ends
    sys.stdout.flush()
    os._exit(0)  # nothing is left to do, and torch takes seconds to end


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
