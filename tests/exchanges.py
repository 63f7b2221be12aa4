"""Every operation of a group on tensors of one device, and what it should return."""

from __future__ import annotations

import torch
from torch import Tensor

from commopt.groups import Group
from commopt.wire.payload import Payload


def every_operation(group: Group, device: torch.device) -> list[list[float]]:
    """What each exchange returns; everything has to be where it was given."""
    rank, size = group.rank, group.size
    results: list[Tensor] = []
    for dtype in (torch.float32, torch.bfloat16, torch.int32):
        x = torch.arange(5, device=device).to(dtype) + rank
        group.all_reduce(x)
        results.append(x)
    own = Payload.of(
        torch.full((3,), rank + 0.5, device=device), torch.full((2,), rank, dtype=torch.uint8, device=device)
    )
    results += [t for one in group.all_gather(own) for t in one.tensors]
    ragged = group.all_gather_ragged(Payload.of(torch.full((rank,), 1.5, device=device)))
    results += [t for one in ragged for t in one.tensors]
    sent = [Payload.of(torch.full((2 + peer,), 10.0 * rank + peer, device=device)) for peer in range(size)]
    results += [t for one in group.all_to_all(sent) for t in one.tensors]
    spread = torch.full((3,), float(rank), device=device)
    group.broadcast(spread, src=size - 1)
    group.barrier()
    assert {t.device.type for t in [*results, spread]} == {device.type}
    return [t.float().cpu().tolist() for t in [*results, spread]]


def expected(rank: int, size: int) -> list[list[float]]:
    total = float(sum(range(size)))
    results = [[size * k + total for k in range(5)]] * 3
    for other in range(size):
        results += [[other + 0.5] * 3, [float(other)] * 2]
    results += [[1.5] * other for other in range(size)]
    results += [[10.0 * other + rank] * (2 + rank) for other in range(size)]
    return [*results, [size - 1.0] * 3]
