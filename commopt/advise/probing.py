"""What each rank of `commopt probe` runs: it measures with the others, and rank 0 writes down what all have found.

python -m commopt.advise.probing '{"out": "found.json", "methods": ["dense"], "cores_per_rank": 1, "until_s": 1.8e9, "record": null}'

out: rank 0's file. record: the folder with what this machine's ranks have recorded of the user's script, if there is one. until_s: when
the ranks are to be done, by the machine's clock. Each part gets a share of the time that is left when they have started; what does not
fit is measured less often, or left out with a line that says so.
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
from commopt.advise.sizes import calls_of, curve, were_less
from commopt.exchange.two_level import machine_mean, put_together
from commopt.groups import Group, World, connect
from commopt.method import EveryStep
from commopt.methods import build
from commopt.plan.links import LinkModel
from commopt.plan.profile import sent_bytes
from commopt.record.lines import RankRecord
from commopt.run import checks
from commopt.wire.bucket import Bucket, ParameterIndex, Share
from commopt.wire.payload import Payload

_LEAST_S = 20.0  # however late the ranks have started
_LINKS, _EXCHANGE, _INSIDE, _PROFILES = 0.18, 0.09, 0.06, 0.1  # shares of the time; methods get what is left of it
_MOST_ELEMENTS = 8_000_000  # of a script's parameters, more than a bucket has
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

    def calls(self, call: Callable[[], object], count: int, budget_s: float) -> tuple[float, float, float]:
        """Seconds of a call that all ranks make, the median of the slowest rank's; share of the processor that it needs; all seconds.

        count: how often; 0 if the first call is to tell how often fits. If there are three or more, the first does not count.
        """
        began_s, clock = time.monotonic(), clock_of(self.device)
        used_s, seconds = -time.process_time(), [seconds_of(call, clock)]
        count = count or calls_of(self.slowest(seconds)[0], budget_s)
        if count > 2:
            used_s = -time.process_time()
            seconds.clear()
        seconds += [seconds_of(call, clock) for _ in range(count - 1)]
        used_s += time.process_time()
        rows = self.tell([*seconds, used_s / (sum(seconds) * self.cores), time.monotonic() - began_s])
        *times, _, spent_s = [max(column) for column in zip(*rows, strict=True)]
        return statistics.median(times), min(1.0, statistics.fmean(row[-2] for row in rows)), spent_s

    def curve(
        self, name: str, make: Callable[[int], tuple[int, Callable[[], object]]], byte_s: float, budget_s: float
    ) -> Points:
        """(bytes, seconds, share of the processor) from small calls to large ones.

        make: the bytes, rounded, and a call that exchanges them. byte_s: what a byte takes at least.
        """

        def measure(wanted: int, count: int) -> tuple[int, float, float, float]:
            nbytes, call = make(wanted)
            return (nbytes, *self.calls(call, count, budget_s / 4))

        self.say(name)
        points = curve(measure, byte_s, budget_s)
        if less := were_less(points):
            self.say(f"{name}: they take long; {less}")
        return [(nbytes, seconds, busy) for nbytes, seconds, busy, _ in points]


# ---- what is measured ------------------------------------------------------------------------------------------------


def links_of(ranks: Ranks, budget_s: float) -> dict[str, Any]:
    """The machines' names, and what the links between them give."""
    group, between = ranks.group, ranks.between
    told = group.tell(os.environ.get("COMMOPT_NODE", ""))
    slots = len(told) // between.size
    names, text = told[::slots], os.environ.get("COMMOPT_LINKS")
    number, slot = divmod(group.rank, slots)
    machines = Machines(names, number, slot == 0, group.tell, LinkModel.from_json(text) if text else None)
    found = machines.pairs(budget_s, ranks.say)
    ranks.say("rates while all machines send")
    together = machines.together(found)
    machines.close()
    pairs = [
        {"from": names[a], "to": names[b], "latency_s": latency_s, "bytes_per_s": rate}
        for (a, b), (latency_s, rate) in sorted(found.items())
    ]
    return {"nodes": names, "slots": slots, "pairs": pairs, "together": dict(zip(names, together, strict=True))}


def exchanges_of(ranks: Ranks, bytes_per_s: float, budget_s: float) -> dict[str, Points]:
    """What the exchanges among machines cost, by operation. bytes_per_s: of a machine while all send. budget_s: for each."""
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
        byte_s = sent_bytes(make.__name__, 1.0, between.size) * ranks.group.per_machine / bytes_per_s
        found[make.__name__] = ranks.curve(f"exchanges: {make.__name__}", make, byte_s, budget_s)
    return found


def inside_of(ranks: Ranks, budget_s: float) -> Points:
    """What it costs a machine's ranks to share out a bucket and to put it together again."""
    inside, machines = ranks.group.inside, ranks.between.size
    if inside is None or inside.size == 1:
        return []
    method: Any = build("dense")

    def make(nbytes: int) -> tuple[int, Callable[[], object]]:
        x = torch.zeros(nbytes // 4, dtype=torch.float32, device=ranks.device)
        bucket = Bucket.of([("x", x)])
        index = ParameterIndex(("x",), (x.numel(),))
        share = Share.cut(index, inside.size, inside.rank, lambda numel: method.pieces(numel, machines))
        return x.nbytes, lambda: put_together(machine_mean(bucket, share, inside), bucket, share, inside)

    return ranks.curve(f"exchanges among the {inside.size} ranks of each machine", make, 0.0, budget_s)


def codecs_of(ranks: Ranks, methods: Sequence[str], budget_s: float, shapes: Shapes) -> dict[str, Any]:
    """What each method computes, on the slowest rank; without those for which the time does not suffice. shapes: of the script."""
    machines, models, found = ranks.between.size, models_of(shapes), dict[str, Any]()
    clock = clock_of(ranks.device, ranks.cores)
    ranks.say("the optimizer's step")
    began_s = time.monotonic()
    adamw, told_s = _slowest(ranks, {"step": adamw_costs(ranks.device, clock, models)}), -math.inf
    elapsed_s = longest_s = 0.0
    for k, name in enumerate(methods):
        before_s, (elapsed_s,) = elapsed_s, ranks.slowest([time.monotonic() - began_s])
        longest_s = max(longest_s, elapsed_s - before_s)
        if k and elapsed_s + longest_s > budget_s:
            ranks.say(f"the time is over: {_were(methods[k:])} left out")
            break
        if elapsed_s - told_s > 1.5:
            ranks.say(f"methods without a network: {name}, {k + 1} of {len(methods)}")
            told_s = elapsed_s
        found[name] = adamw | _slowest(ranks, costs_of(name, machines, ranks.device, clock, models))
    return found


def shapes_of(record: str | None) -> Shapes:
    """The shapes of the script's parameters, of a large model only some of them; none without a script."""
    files = [] if record is None else sorted(Path(record).glob("rank*.jsonl"))
    shapes: Shapes = RankRecord.read(files[0]).shapes if files else ()
    every = math.ceil(sum(map(math.prod, shapes)) / _MOST_ELEMENTS)
    found = [shape for shape in shapes if math.prod(shape) <= _MOST_ELEMENTS][:: max(1, every)]
    while sum(map(math.prod, found)) > _MOST_ELEMENTS:
        found.pop()
    return found


def profiles_of(ranks: Ranks, methods: Sequence[str], shapes: Shapes, budget_s: float) -> dict[str, Any]:
    """What the methods send of the script's own parameters, worked out by the ranks in turn; without those that take too long."""
    if not shapes:
        return {}
    ranks.say("what methods send of the script's parameters")
    own, longest_s, began_s = dict[str, Any](), 0.0, time.monotonic()
    for name in methods[ranks.group.rank :: ranks.group.size]:
        now_s = time.monotonic()
        if now_s + longest_s - began_s > budget_s:
            break
        method = build(name, **NEEDED.get(name, {}))
        own[name] = profile_of(method, name, shapes, (ranks.between.size,)).to_json()
        longest_s = max(longest_s, time.monotonic() - now_s)
    found = {name: profile for one in ranks.tell(own) for name, profile in one.items()}
    if left_out := [name for name in methods if name not in found]:
        ranks.say(f"the time is over: what {_were(left_out)} known to send of other parameters counts")
    return {name: found[name] for name in methods if name in found}


def _were(names: Sequence[str]) -> str:
    return f"{', '.join(names)} {'was' if len(names) == 1 else 'were'}"


def _slowest(ranks: Ranks, costs: Mapping[str, Sequence[tuple[int, float]]]) -> dict[str, Any]:
    seconds = iter(ranks.slowest([s for points in costs.values() for _, s in points]))
    return {key: [(elements, next(seconds)) for elements, _ in points] for key, points in costs.items()}


def script_of(ranks: Ranks, record: str | None) -> dict[str, Any] | None:
    """A script's own times, from what every rank has recorded."""
    if record is None:
        return None
    one = RankRecord.read(Path(record) / f"rank{ranks.group.rank}.jsonl")
    told = ranks.tell([one.compute_s, one.buckets, one.overlap])
    if not all(compute for compute, *_ in told):
        return None
    everything = [seconds for compute, *_ in told for seconds in compute]
    buckets, overlap = told[0][1:]
    # the scheduler makes ranks that share cores differ, each time in another way
    medians = [statistics.median(compute) for compute, *_ in told]
    compute_s = statistics.median(everything) if ranks.cores < 1 else max(medians)
    parameters = int(one.start["parameters"])
    shards = max(1, round(parameters / max(1, sum(buckets))))  # under FSDP a rank exchanges its shard only
    return {
        "parameters": parameters,
        "compute_s": compute_s,
        "spread": statistics.pstdev(everything) / statistics.fmean(everything),
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
    left_s = max(_LEAST_S, ranks.tell(settings["until_s"] - time.time())[0])
    ends_s = time.monotonic() + left_s
    found |= links_of(ranks, _LINKS * left_s)
    slowest = min(found["together"].values())
    found |= {
        "exchanges": exchanges_of(ranks, slowest, _EXCHANGE * left_s),
        "inside": inside_of(ranks, _INSIDE * left_s),
    }
    (copy_s,) = ranks.slowest([1 / copied_bytes_per_s(device, clock_of(device, ranks.cores))])
    found |= {"copy_bytes_per_s": 1 / copy_s}
    shapes = shapes_of(settings["record"])
    reserve_s = _PROFILES * left_s if shapes else 0.0
    budget_s = ranks.tell(ends_s - time.monotonic() - reserve_s)[0]
    found |= {"codecs": codecs_of(ranks, settings["methods"], budget_s, shapes)}
    found |= {"profiles": profiles_of(ranks, list(found["codecs"]), shapes, ends_s - time.monotonic())}
    if group.rank == 0:
        Path(settings["out"]).write_text(json.dumps(found), encoding="utf-8")
    ranks.say("everything is measured; the ranks end")
    ranks.tell("done")  # before the store of rank 0 ends
    sys.stdout.flush()
    os._exit(0)  # nothing is left to do, and torch takes seconds to end


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
