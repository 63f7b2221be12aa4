"""A launcher without torchrun: `drive.py CLUSTER MODE MARK JSON`, where JSON lists each node's command.

Prints one JSON object: the nodes' lines, the result of the job, the ticks.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from commopt.cluster.emulate import enter
from commopt.cluster.run import Tick, run_job
from commopt.cluster.spec import Emulate, load_cluster
from commopt.errors import CommoptError


def main() -> None:
    path, mode, mark, commands = sys.argv[1:5]
    log_dir = Path(sys.argv[5]) if len(sys.argv) > 5 else None
    cluster = load_cluster(path)
    words: list[list[str]] = json.loads(commands)
    lines: list[tuple[str, str]] = []
    ticks: list[Tick] = []
    try:
        emulation = enter(cluster, emulate=Emulate(mode))
        result = run_job(
            cluster,
            [],
            emulation=emulation,
            env={"TEST_MARK": mark},
            log_dir=log_dir,
            agent=lambda node: words[node % len(words)],
            on_line=lambda label, line: lines.append((label, line)),
            on_tick=ticks.append,
        )
    except CommoptError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    found = {
        "lines": lines,
        "ticks": [asdict(tick) for tick in ticks],
        "ok": result.ok,
        "tx_bytes": dict(result.tx_bytes),
        "mode": result.mode.value,
        "failure": str(result.failure) if result.failure else None,
        "notices": [*emulation.notices, *result.notices],
        "log_dir": str(result.log_dir) if result.log_dir else None,
        "links": emulation.links,
    }
    print(json.dumps(found))


main()
