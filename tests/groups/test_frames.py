"""Frames between members: what no member writes is refused, and with a secret everything that one of them did not just write."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from members import frame

from commopt.groups.frames import Connection, Frame

SECRET = b"a secret of 16 bytes, or longer"
LETTER = {
    "kind": "letter",
    "channel": "c",
    "sequence": 3,
    "step": 2,
    "is_training": True,
    "sizes": [],
    "layout": [["uint8", 5]],
}
FRAMES = [Frame({"kind": "beat", "step": k, "is_training": True, "sizes": [[0, 2], [k, 3]]}) for k in range(2)]
FRAMES += [Frame(LETTER, torch.arange(5, dtype=torch.uint8)), Frame({"kind": "bye"})]
REFUSED = (ValueError, KeyError, TypeError, OSError, RuntimeError)


@pytest.fixture
def connect() -> Iterator[Callable[[], tuple[Connection, Connection]]]:
    with contextlib.ExitStack() as open_sockets:

        def pair() -> tuple[Connection, Connection]:
            dialler, accepter = map(open_sockets.enter_context, socket.socketpair())
            dialler.settimeout(5.0)
            accepter.settimeout(5.0)
            return Connection(dialler), Connection(accepter)

        yield pair


Connect = Callable[[], tuple[Connection, Connection]]


def agreed(connect: Connect, *secrets: bytes, dialled: int = 0) -> tuple[Connection, Connection]:
    """The side that dialled and the one that accepted, after they have made a key."""
    dialler, accepter = connect()
    end_s = time.monotonic() + 5
    with ThreadPoolExecutor(1) as lane:
        accepting = lane.submit(accepter.agree, secrets[-1], 0, has_dialled=False, deadline_s=end_s)
        dialler.agree(secrets[0], dialled, has_dialled=True, deadline_s=end_s)
        accepting.result()
    return dialler, accepter


def written(dialler: Connection, accepter: Connection) -> list[bytes]:
    return [accepter.socket.recv(dialler.write(one), socket.MSG_WAITALL) for one in FRAMES]


def heard(accepter: Connection, dialler: Connection, frames: Sequence[bytes]) -> list[Any]:
    """What is read of these bytes and no more, up to the first refusal."""
    dialler.socket.sendall(b"".join(frames))
    dialler.socket.shutdown(socket.SHUT_WR)
    found: list[Any] = []
    try:
        while True:
            head, payload = accepter.read(100)
            found.append((head, None if payload is None else payload.tensors[0].tolist()))
    except REFUSED:
        return found


SAID = [(one.head, None if one.body is None else one.body.tolist()) for one in FRAMES]


def test_frames_are_read_as_they_were_written(connect: Connect) -> None:
    for dialler, accepter in (connect(), agreed(connect, SECRET)):
        assert heard(accepter, dialler, written(dialler, accepter)) == SAID


@pytest.mark.parametrize(
    ("order", "good"), [([0, 0], 1), ([1], 0), ([0, 2], 1), ([0, 1, 3], 2), ([0, 1, 2, 2], 3), ([0, 1, 2, 0], 3)]
)
def test_a_frame_that_is_repeated_left_out_or_out_of_order_is_refused(
    connect: Connect, order: list[int], good: int
) -> None:
    dialler, accepter = agreed(connect, SECRET)
    frames = written(dialler, accepter)
    assert heard(accepter, dialler, [frames[k] for k in order]) == SAID[:good]


def test_a_frame_that_was_changed_is_refused(connect: Connect) -> None:
    how = random.Random(1)
    for _ in range(60):
        dialler, accepter = agreed(connect, SECRET)
        frames = bytearray(b"".join(written(dialler, accepter)))
        frames[how.randrange(len(frames))] ^= 1 << how.randrange(8)
        found = heard(accepter, dialler, [bytes(frames)])
        assert found == SAID[: len(found)] != SAID


def test_what_was_recorded_proves_nothing_on_another_connection(connect: Connect) -> None:
    recorded = written(*agreed(connect, SECRET))
    dialler, accepter = agreed(connect, SECRET)
    assert heard(accepter, dialler, recorded) == []
    for secrets, dialled in (([SECRET, SECRET[::-1]], 0), ([SECRET], 1)):  # a key for rank 1 does not open rank 0
        dialler, accepter = agreed(connect, *secrets, dialled=dialled)
        assert heard(accepter, dialler, written(dialler, accepter)) == []


BEAT = {"kind": "beat", "step": 1, "is_training": True, "sizes": [[0, 2]]}
BIG, BOMB = 10**30, b"[" * 60000
HEADS: list[Any] = [
    *([], None, "hello", {}, {"kind": []}, {"kind": "other"}, BOMB, b"{" * 50, b"\xff\xfe"),
    *({"kind": "hello", "job": "j", "rank": rank, "incarnation": 1} for rank in (-1, True, 1.0, "1", [1], None, BIG)),
    *({"kind": "hello", "job": "j", "rank": 1, "incarnation": n} for n in (-1, BIG, 1e300, float("nan"), "new")),
    *({**BEAT, "step": step} for step in (-1, BIG, 0.5, "3", None)),
    *(b'{"kind": "beat", "step": 1e999, "is_training": true, "sizes": []}', {**BEAT, "is_training": 1}),
    *(
        {**BEAT, "sizes": sizes}
        for sizes in (None, [3], [[0]], [[0, 2, 3]], [[0, -2]], [[0, 2.5]], [["0", 2]], [[BIG, 2]])
    ),
    *({**LETTER, "sequence": n} for n in (-1, BIG, 2**63, 1e300, "1", None)),
    *({**LETTER, "channel": channel} for channel in (1, None, ["c"], "c" * 101)),
    *({**LETTER, "layout": layout} for layout in ([], None, "u8", {"uint8": 5}, [["uint8"]], [["uint8", 5.0]])),
    *({**LETTER, "layout": [["uint8", 9], ["uint8", n]]} for n in (-4, BIG, True, 1)),
    *({**LETTER, "layout": [[dtype, 5]]} for dtype in ("quint8", "bool", "nn", "load", "__name__", None)),
    {**LETTER, "layout": [[[], 5]]},
    {**LETTER, "layout": [["uint8", 1], ["float32", 1]]},
    {**BEAT, "layout": [["uint8", 5]]},  # no beat has a body
]


@pytest.mark.parametrize("k", range(len(HEADS)))
def test_what_no_member_writes_is_refused(connect: Connect, k: int) -> None:
    head, (dialler, accepter) = HEADS[k], connect()
    body = bytes(5 if b"layout" in frame(head) else 0)
    assert heard(accepter, dialler, [frame(head, len(body)), body]) == []


NOISE = [b"GET / HTTP/1.1\r\nHost: here\r\n", bytes(range(256)), struct.pack("!4sIQ", b"cmo2", 2**31, 0)]


@pytest.mark.parametrize("noise", [*NOISE, frame(b"null", 2**63), frame(LETTER, 101)], ids=range(5))
def test_noise_and_what_would_be_too_long_is_refused_as_it_begins(connect: Connect, noise: bytes) -> None:
    dialler, accepter = connect()
    dialler.socket.sendall(noise)
    with pytest.raises(ValueError, match="this is not a frame, or a larger one than a member of this job sends"):
        accepter.read(100)
