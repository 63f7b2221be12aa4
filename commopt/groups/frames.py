"""Frames over one TCP connection between two members, and every check of what comes in.

Frame: "!4sIQ" (magic, bytes of the head, bytes of the body), head, body, and in a job with a secret a tag. The head is JSON, the body a
payload's buffer. Nothing is unpickled.

With a secret, each side first sends 16 random bytes. A tag is the HMAC-SHA256 of the frame and its number on this connection; its key is
made of the secret, both sides' random bytes, and the rank that was dialled. So a frame proves that a member wrote it, for this connection
and this place in it: one that was recorded, changed, left out or sent twice is refused. Frames are not encrypted.
"""

import contextlib
import fcntl
import hmac
import itertools
import json
import os
import socket
import struct
import time
from dataclasses import dataclass
from typing import Any, cast

import torch

from commopt.wire.payload import DTYPES, Layout, Payload, layout_bytes

_FRAME, _MAGIC, _FAMILY = struct.Struct("!4sIQ"), b"cmo2", b"cmo"
_HEAD_LIMIT, _CHANNEL_LIMIT = 1 << 16, 100
_NUMBERS = {
    "hello": ("rank", "incarnation"),
    "members": (),
    "beat": ("step",),
    "letter": ("step", "sequence"),
    "bye": (),
}
_LARGEST = 1 << 62  # of these numbers, and of the lengths in a layout
_SALT, _TAG = 16, 32
_NO, _WHY_BYTES = b"commopt: no: ", 500
_NO_SECRET = "no secret, and this job has one; give every rank the same COMMOPT_SECRET"
_SIOCOUTQ = 0x5411


@dataclass
class Frame:
    head: dict[str, Any]
    body: torch.Tensor | None = None
    expires_s: float = float("inf")


class Connection:
    """A connection of which this side either dialled and writes, or accepted and reads; not thread-safe."""

    def __init__(self, connected: socket.socket) -> None:
        self.socket, self.heard_s = connected, time.monotonic()  # when the last bytes came
        self._key, self._frames = b"", 0

    def agree(self, secret: bytes, dialled: int, *, has_dialled: bool, deadline_s: float) -> None:
        """Make the key of this connection. Raises PermissionError if the other side does not take part, and OSError if it is gone."""
        own = os.urandom(_SALT)
        if not has_dialled:
            self.socket.sendall(own)
        try:
            theirs = bytes(self._filled(bytearray(_SALT), deadline_s))
        except TimeoutError:
            raise PermissionError("no answer that shows a secret; give every rank the same COMMOPT_SECRET") from None
        if theirs.startswith(_FAMILY):
            raise PermissionError(_NO_SECRET)
        if has_dialled:
            self.socket.sendall(own)
        salt = theirs + own if has_dialled else own + theirs
        self._key = hmac.digest(secret, b"commopt" + salt + struct.pack("!Q", dialled), "sha256")

    def refuse(self, why: str) -> None:
        """Tell the side that dialled why it is not let in. This is not signed, as it may not have the secret."""
        end_s = time.monotonic() + 1.0
        with contextlib.suppress(OSError):
            self.socket.settimeout(1.0)
            self.socket.sendall(_NO + why.encode()[:_WHY_BYTES])
            self.socket.shutdown(socket.SHUT_WR)
            while self.socket.recv(1 << 16) and time.monotonic() < end_s:
                pass  # what is left unread would reset the connection, and the answer with it

    def check_open(self) -> None:
        """Raise PermissionError with the reason if the side that accepted refuses this one, and OSError if it has hung up."""
        try:
            said = self.socket.recv(1 << 10, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        if not said:
            raise OSError("closed by the peer")
        # what comes before it is random bytes, for a secret that this side does not have
        _, no, why = said.partition(_NO)
        if no:
            raise PermissionError("".join(c if c.isprintable() else "?" for c in why.decode(errors="replace")))

    def write(self, frame: Frame) -> int:
        """Send one frame; returns its bytes."""
        head = json.dumps(frame.head).encode()
        body = memoryview(b"") if frame.body is None else memoryview(cast(Any, frame.body.numpy()))
        begin = _FRAME.pack(_MAGIC, len(head), len(body)) + head
        parts = [part for part in (begin, body, self._tag(begin, body)) if len(part)]
        for part in parts:
            self.socket.sendall(part)
        return sum(map(len, parts))

    def read(self, room_bytes: float = 0, *, deadline_s: float | None = None) -> tuple[dict[str, Any], Payload | None]:
        """Read one frame, with a body of at most `room_bytes`.

        Raises ValueError, KeyError, TypeError or RuntimeError for what no member writes, PermissionError for a wrong tag.
        """
        begin = self._filled(bytearray(_FRAME.size), deadline_s)
        magic, head_bytes, body_bytes = _FRAME.unpack(begin)
        if magic != _MAGIC and magic.startswith(_FAMILY):
            raise PermissionError("another version of commopt; install the same on every machine")
        if magic != _MAGIC or head_bytes > _HEAD_LIMIT or body_bytes > room_bytes:
            raise ValueError("this is not a frame, or a larger one than a member of this job sends")
        text = self._filled(bytearray(head_bytes), deadline_s)
        head = json.loads(text)
        layout = _layout_of(head, body_bytes)
        body = torch.empty(body_bytes, dtype=torch.uint8)
        self._filled(body.numpy(), deadline_s)
        tag = self._tag(begin + text, memoryview(cast(Any, body.numpy())))
        if tag and not hmac.compare_digest(tag, self._filled(bytearray(_TAG), deadline_s)):
            raise PermissionError("another secret; give every rank the same COMMOPT_SECRET")
        return head, None if layout is None else Payload(body, layout)

    def unacknowledged(self) -> int:
        """Bytes that the other end has not acknowledged yet."""
        try:
            return int(struct.unpack("i", fcntl.ioctl(self.socket.fileno(), _SIOCOUTQ, b"\0" * 4))[0])
        except (OSError, ValueError):
            return 0

    def _tag(self, begin: bytes | bytearray, body: memoryview) -> bytes:
        """The tag of the next frame; empty in a job without a secret."""
        if not self._key:
            return b""
        tag = hmac.new(self._key, struct.pack("!Q", self._frames) + begin, "sha256")
        tag.update(body)
        self._frames += 1
        return tag.digest()

    def _filled(self, buffer: Any, deadline_s: float | None) -> Any:
        view = memoryview(buffer)
        while len(view):
            if deadline_s is not None:  # for all of it, so that a slow trickle does not keep the connection
                self.socket.settimeout(max(0.01, deadline_s - time.monotonic()))
            n = self.socket.recv_into(view)
            if n == 0:
                raise OSError("closed by the peer")
            self.heard_s = time.monotonic()
            view = view[n:]
        return buffer


def _layout_of(head: Any, body_bytes: int) -> Layout | None:
    """The layout of a letter's body, None for another frame; checks every field. Raises ValueError, KeyError or TypeError."""
    kind, is_beat = head["kind"], "step" in _NUMBERS[head["kind"]]
    numbers, flags = [head[key] for key in _NUMBERS[kind]], [head["is_training"]] if is_beat else []
    sizes = [(first, members) for first, members in head["sizes"]] if is_beat else []
    layout = tuple((DTYPES[name], n) for name, n in head["layout"]) if kind == "letter" else ()
    for n in (*numbers, *(n for _, n in layout), *itertools.chain(*sizes)):
        if type(n) is not int or not 0 <= n < _LARGEST:
            raise ValueError(f"{n!r:.40} is not a number that a member writes")
    if layout_bytes(layout) != body_bytes or any(type(flag) is not bool for flag in flags):
        raise ValueError("the head does not fit the message")
    if kind == "letter" and not (isinstance(head["channel"], str) and len(head["channel"]) <= _CHANNEL_LIMIT):
        raise ValueError("no member writes to this channel")
    return layout if kind == "letter" else None
