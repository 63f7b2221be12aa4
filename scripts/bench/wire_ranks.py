"""What each rank of wire.py runs: the exchanges of a TorchGroup and Gloo's own collectives in turn, timed on the slowest rank."""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from commopt.groups import TorchGroup
from commopt.wire.payload import Payload


class Spread(TorchGroup):
    """Each rank is on a machine of its own here, so payloads of different lengths go directly to every rank."""

    is_spread = True


def operations(group: TorchGroup, nbytes: int) -> dict[str, dict[str, Callable[[], object]]]:
    """By operation: commopt's, and Gloo's own; each rank sends so many bytes in all of them."""
    n, part = group.size, nbytes // (group.size - 1)
    lengths = [part + 8 * (rank % 2) for rank in range(n)]  # uneven ones; what that adds does not count
    own, uneven = (torch.zeros(k, dtype=torch.uint8) for k in (part, lengths[group.rank]))
    every, total = own.new_empty(n * part), torch.zeros(nbytes * n // (8 * (n - 1)))
    payload, ragged, layouts = Payload.of(own), Payload.of(uneven), [((torch.uint8, length),) for length in lengths]
    sent, received = uneven.repeat(n), uneven.new_empty(sum(lengths))
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
    return {
        "all_reduce": {"commopt": lambda: group.all_reduce(total), "gloo": lambda: dist.all_reduce(total)},
        "all_gather": {"commopt": lambda: group.all_gather(payload), "gloo": lambda: gather(every, own)},
        "all_gather, uneven": {
            "commopt": lambda: group.all_gather(ragged, layouts),
            "gloo": lambda: dist.all_to_all_single(received, sent, lengths, [len(uneven)] * n),
        },
        "all_to_all": {
            "commopt": lambda: group.all_to_all([payload] * n),
            "gloo": lambda: dist.all_to_all_single(every, own.repeat(n)),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=json.loads, required=True)
    parser.add_argument("--repeats", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    dist.init_process_group("gloo")
    group, seconds = Spread(), defaultdict[str, list[float]](list)
    for nbytes in args.sizes:
        calls = {
            f"{name}|{nbytes}|{whose}": call
            for name, both in operations(group, nbytes).items()
            for whose, call in both.items()
        }
        for repeat in range(args.repeats + 1):  # the first warms up
            for key, call in calls.items():
                group.barrier()
                start = time.perf_counter()
                call()
                taken = torch.tensor(time.perf_counter() - start)
                dist.all_reduce(taken, op=dist.ReduceOp.MAX)
                if repeat:
                    seconds[key].append(round(taken.item(), 6))
    if group.rank == 0:
        args.out.write_text(json.dumps(seconds))
    group.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
