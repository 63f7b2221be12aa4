"""Tiny programs for nodes that live through faults: `member.py MARK WHAT COUNT ...` records COUNT steps of 50 ms.

steps COUNT           from where an earlier start of the same node ended
listen COUNT          also, answer every byte that a connection brings
ask COUNT ADDRESS...  also, exchange a byte with each of these every 20 ms; print when answers came, as JSON
dial COUNT ADDRESS    then, when a node has come back, connect to this one
spin COUNT SECONDS    then, when a node is slow, let a new process count for so long
"""

from __future__ import annotations

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


def has_begun(kind: str) -> bool:
    path = RECORD / "faults.jsonl"
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else []
    return any(line["kind"] == kind and line["phase"] == "begin" for line in lines)


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
            return socket.create_connection((address, PORT), timeout=0.5)
        except OSError:
            time.sleep(0.05)
    return None


def ask(address: str, answers: list[float]) -> None:
    connection = connected(address, 20)
    assert connection is not None
    connection.settimeout(None)
    while True:
        connection.sendall(b"?")
        if not connection.recv(1):
            print(f"{address} has hung up", flush=True)
            return
        answers.append(time.time())
        time.sleep(0.02)


what, count, words = sys.argv[2], int(sys.argv[3]), sys.argv[4:]
if what == "listen":
    threading.Thread(target=serve, daemon=True).start()
if what == "ask":
    times: dict[str, list[float]] = {address: [] for address in words}
    for one in words:
        threading.Thread(target=ask, args=(one, times[one]), daemon=True).start()
train(count)
if what == "ask":
    print(json.dumps(times), flush=True)
if what == "dial":
    while not has_begun("restart"):
        time.sleep(0.05)
    print("answered" if connected(words[0], 4) else "no answer", flush=True)
if what == "spin":
    while not has_begun("slow"):
        time.sleep(0.05)
    subprocess.run([sys.executable, "-c", COUNTER, words[0]], check=True)
