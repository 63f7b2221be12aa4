"""Tiny programs for nodes: `talk.py receive COUNT` and `talk.py send ADDRESS BYTES...`; a sender prints bytes, seconds, start."""

from __future__ import annotations

import socket
import sys
import time

PORT = 5000


def receive(senders: int) -> None:
    with socket.create_server(("", PORT)) as server:
        for _ in range(senders):
            connection, _ = server.accept()
            with connection:
                while header := connection.recv(8, socket.MSG_WAITALL):
                    left = int.from_bytes(header, "big")
                    while left:
                        left -= len(connection.recv(min(left, 1 << 16)))
                    connection.sendall(b"!")


def send(address: str, sizes: list[int]) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            connection = socket.create_connection((address, PORT), timeout=20)
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for nbytes in sizes:
            time.sleep(0.1)
            payload = nbytes.to_bytes(8, "big") + bytes(nbytes)
            started = time.monotonic()
            connection.sendall(payload)
            connection.recv(1)
            print(nbytes, time.monotonic() - started, started, flush=True)


if sys.argv[1] == "receive":
    receive(int(sys.argv[2]))
elif sys.argv[1] == "send":
    send(sys.argv[2], [int(word) for word in sys.argv[3:]])
