"""Members whose messages arrive damaged: the others go on, and no number of theirs is spoilt."""

from __future__ import annotations

import contextlib
import functools
import random
from typing import Any

import pytest
import torch
from outer_rig import Diary, spoil, train_diary

from commopt.groups import SimGroup, SimWorld
from commopt.wire.payload import Payload

TOP_K = {"compressor": "top_k", "density": 0.2}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("noloco", {"two_tensors": True}),
    ("noloco", {"message": "int8"}),
    ("diloco", {"final_average": True}),
    ("diloco", {"message": TOP_K}),
    ("diloco", {"message": {"compressor": "threshold", "threshold": 0.01}}),
    ("push_sum", {}),
    ("choco", {"message": TOP_K}),
    ("decentralized_adam", {"topology": "ring"}),
]


def damaged(payload: Payload, how: random.Random) -> Payload:
    kind: Any = how.choice(["empty", "short", "noise", "bit", "wide", "nan", 1e30, 3e38, 99, -1, 2**62])
    if kind == "empty":
        return Payload.of()
    if kind == "short":
        return Payload.of(*(x[:-1] for x in payload.tensors))
    if kind == "wide":
        return Payload.of(*(x.double() for x in payload.tensors))
    copy = Payload(payload.buffer.clone(), payload.layout)
    if kind == "noise":
        copy.buffer.copy_(torch.tensor(list(how.randbytes(copy.nbytes)), dtype=torch.uint8))
    elif kind == "bit":
        copy.buffer[how.randrange(copy.nbytes)] ^= 64
    else:
        for x in copy.tensors:
            is_float = x.dtype.is_floating_point
            x.fill_(float(kind) if is_float else 77 if kind == "nan" or kind > torch.iinfo(x.dtype).max else int(kind))
    return copy


@pytest.mark.parametrize("liar", [0, 2])
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_damaged_messages_count_as_missing(name: str, options: dict[str, Any], liar: int) -> None:
    diaries = [Diary() for _ in range(3)]

    def rank_of(group: SimGroup) -> None:
        how, send = random.Random(group.rank), group.peers.send

        def lie(peer: int, channel: str, sequence: int, payload: Payload, **expires: Any) -> None:
            send(peer, channel, sequence, payload if channel.startswith("start") else damaged(payload, how), **expires)

        if group.rank == liar:
            group.peers.send = lie  # type: ignore[method-assign]
        with contextlib.suppress(Exception) if group.rank == liar else contextlib.nullcontext():
            own = functools.partial(spoil(1, 5), group.rank)  # a NaN: it has to take over another rank's state
            given = {"every": 2, "timeout_s": 1.0, **options}
            train_diary(group, diaries[group.rank], name, given, 14, step_s=0.5, poison=own)

    SimWorld[None](3).run(rank_of)
    for rank in {0, 1, 2} - {liar}:
        assert diaries[rank].attached.steps == 14
        assert float(diaries[rank].attached.flat().abs().max()) < 1e6
