"""Tiny programs for nodes: `member.py MARK WHAT ...`. Those with a COUNT record so many steps of 50 ms.

steps COUNT           from where an earlier start of the same node ended
listen COUNT          also, answer every byte that a connection brings
ask COUNT ADDRESS...  also, exchange a byte with each of these every 20 ms; print when answers came, as JSON
dial COUNT ADDRESS    then, when a node has come back, connect to this one
spin COUNT SECONDS    then, when a node is slow, let a new process count for so long
receive SENDERS       no steps: take what so many senders send, one after another
send ADDRESS BYTES... no steps: send so many bytes each time; print bytes, seconds, start
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

PORT = 5001
RECORD = Path(os.environ["COMMOPT_RECORD"])
COUNTER = """
import sys, time
count, end = 0, time.monotonic() + float(sys.argv[1])
while time.monotonic() < end:
    count += 1
print(count, flush=True)
"""


def train(count: int) -> None:
    path = RECORD / f"rank{os.environ['COMMOPT_NODE_RANK']}.jsonl"
    done = len(path.read_text().splitlines()) if path.exists() else 0
    print(f"from step {done}", flush=True)
    for step in range(done, count):
        line = {"kind": "step", "at_s": time.time(), "step": step, "loss": 1.0, "seconds": 0.05, "wait_s": 0.0}
        with path.open("a") as file:
            file.write(json.dumps({**line, "tokens": 1, "steady": True}) + "\n")
        time.sleep(0.05)


def wait_for(kind: str) -> None:
    path = RECORD / "faults.jsonl"
    while not path.exists() or f'"kind": "{kind}"' not in path.read_text():
        time.sleep(0.05)


def serve() -> None:
    server = socket.create_server(("", PORT))
    while True:
        threading.Thread(target=echo, args=(server.accept()[0],), daemon=True).start()


def echo(connection: socket.socket) -> None:
    while data := connection.recv(100):
        connection.sendall(data)


def connected(address: str, for_s: float) -> socket.socket | None:
    deadline = time.monotonic() + for_s
    while time.monotonic() < deadline:
        try:
            connection = socket.create_connection((address, PORT), timeout=0.5)
        except OSError:
            time.sleep(0.05)
        else:
            connection.settimeout(None)
            return connection
    return None


def ask(address: str, answers: list[float]) -> None:
    connection = connected(address, 20)
    assert connection is not None
    with contextlib.suppress(ConnectionError):  # where a machine has come back, or its process was quicker
        while True:
            connection.sendall(b"?")
            if not connection.recv(1):
                print(f"{address} has hung up", flush=True)
                return
            answers.append(time.time())
            time.sleep(0.02)


def receive(senders: int) -> None:
    with socket.create_server(("", PORT)) as server:
        for _ in range(senders):
            connection, _ = server.accept()
            while header := connection.recv(8, socket.MSG_WAITALL):
                left = int.from_bytes(header, "big")
                while left:
                    left -= len(connection.recv(min(left, 1 << 16)))
                connection.sendall(b"!")


def send(address: str, sizes: list[int]) -> None:
    connection = connected(address, 20)
    assert connection is not None
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for nbytes in sizes:
        time.sleep(0.1)
        payload = nbytes.to_bytes(8, "big") + bytes(nbytes)
        started = time.monotonic()
        connection.sendall(payload)
        connection.recv(1)
        print(nbytes, time.monotonic() - started, started, flush=True)


what, first, words = sys.argv[2], sys.argv[3], sys.argv[4:]
if what == "receive":
    receive(int(first))
if what == "send":
    send(first, [int(word) for word in words])
if what == "listen":
    threading.Thread(target=serve, daemon=True).start()
if what == "ask":
    times: dict[str, list[float]] = {address: [] for address in words}
    for one in words:
        threading.Thread(target=ask, args=(one, times[one]), daemon=True).start()
if what not in ("receive", "send"):
    train(int(first))
if what == "ask":
    print(json.dumps(times), flush=True)
if what == "dial":
    wait_for("restart")
    print("answered" if connected(words[0], 4) else "no answer", flush=True)
if what == "spin":
    wait_for("slow")
    subprocess.run([sys.executable, "-c", COUNTER, words[0]], check=True)
