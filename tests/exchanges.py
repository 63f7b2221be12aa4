"""Every operation of a group on tensors of one device, and what it should return."""

from __future__ import annotations

from typing import Any

import torch

from commopt.groups import Group
from commopt.wire.payload import Layout, Payload

CPU = torch.device("cpu")


def message(rank: int, floats: int, extra: int, device: torch.device = CPU) -> Payload:
    one = torch.full((floats,), rank + 0.5, device=device)
    return Payload.of(one, torch.full((extra,), rank, dtype=torch.uint8, device=device))


def content(payload: Payload) -> list[list[float]]:
    return [x.cpu().tolist() for x in payload.tensors]


def by_layout(n: int) -> dict[str, list[tuple[int, int]]]:
    """Floats and bytes of each rank's payload."""
    return {
        "rank 0 sends nothing": [(rank, 3 * rank) for rank in range(n)],
        "all send": [(rank + 2, 3 * rank) for rank in range(n)],
        "of the same size": [(1 + rank % 2, 4 * (1 - rank % 2)) for rank in range(n)],
    }


def every_operation(group: Group, device: torch.device = CPU) -> dict[str, Any]:
    """What each exchange returns; everything has to be where it was given.

    Sums; payloads of different sizes, of the same size but different layouts, and empty ones; broadcasts from every root; two texts.
    """
    rank, n = group.rank, group.size
    sums = [torch.arange(5, device=device).to(dtype) + rank for dtype in (torch.float32, torch.bfloat16, torch.int32)]
    for x in sums:
        group.all_reduce(x)
    received = {"alike": group.all_gather(message(rank, 3, 5, device))}
    for name, sizes in by_layout(n).items():
        layouts: list[Layout] = [((torch.float32, floats), (torch.uint8, extra)) for floats, extra in sizes]
        received[name] = group.all_gather(message(rank, *sizes[rank], device), layouts)
    received["ragged"] = group.all_gather_ragged(message(rank, 2 * rank, rank, device))
    received["ragged, empty"] = group.all_gather_ragged(message(rank, 0, 0, device))
    received["all to all"] = group.all_to_all([message(10 * rank + peer, peer, 2 * peer, device) for peer in range(n)])
    group.barrier()
    spread = [torch.full((2, 3), float(rank), device=device) for _ in range(n)]
    for root, x in enumerate(spread):
        group.broadcast(x, src=root)
    said = [group.tell(f"räng {rank}" * rank), group.tell("again")]
    payloads = [one for every in received.values() for one in every]
    assert {x.device.type for x in [*sums, *spread, *(one.buffer for one in payloads)]} == {device.type}
    tensors = {"sums": [x.cpu().tolist() for x in sums], "spread": [x.cpu().tolist() for x in spread]}
    return {**{name: [content(one) for one in every] for name, every in received.items()}, **tensors, "said": said}


def expected(rank: int, n: int) -> dict[str, Any]:
    return {
        "alike": [content(message(peer, 3, 5)) for peer in range(n)],
        **{name: [content(message(k, *size)) for k, size in enumerate(sizes)] for name, sizes in by_layout(n).items()},
        "ragged": [content(message(peer, 2 * peer, peer)) for peer in range(n)],
        "ragged, empty": [content(message(peer, 0, 0)) for peer in range(n)],
        "all to all": [content(message(10 * peer + rank, rank, 2 * rank)) for peer in range(n)],
        "sums": [[n * k + sum(range(n)) for k in range(5)]] * 3,
        "spread": [[[float(root)] * 3] * 2 for root in range(n)],
        "said": [[f"räng {peer}" * peer for peer in range(n)], ["again"] * n],
    }
