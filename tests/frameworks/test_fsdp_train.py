"""The FSDP2 example that people copy from."""

from __future__ import annotations

import re
import socket
import subprocess
from pathlib import Path

PROGRAM = Path(__file__).parents[2] / "launch" / "fsdp_train.py"


def test_the_example_trains_two_replicas() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    words = [
        "--nproc-per-node=2",
        f"--master-port={port}",
        str(PROGRAM),
        "--shards",
        "1",
        "--layers",
        "1",
        "--steps",
        "4",
    ]
    done = subprocess.run(
        ["python", "-m", "torch.distributed.run", *words, "--method", '"ef_sign"'],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = re.search(
        r"validation loss (\S+) after 4 steps .*; (\S+) MB sent a step by rank 0, replicas equal", done.stdout
    )
    assert found is not None, done.stdout
    assert 2.0 < float(found[1]) < 6.0
    assert 0.03 < float(found[2]) < 0.05  # an eighth of a byte for each of 272,640 parameters, twice over half of them
