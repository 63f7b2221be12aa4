"""A launcher without torchrun: `drive.py CLUSTER MODE MARK JSON`.

JSON: {"commands": [of each node], "record": FOLDER, "log_dir": FOLDER, "faults": [...], "independent": true, "then": [the commands
of a second job in the same network]}. Prints one JSON object: the nodes' lines, the result of the (last) job.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from commopt.cluster.emulate import enter
from commopt.cluster.faults import Fault
from commopt.cluster.injection import Injection
from commopt.cluster.machine import Emulate
from commopt.cluster.run import Job
from commopt.cluster.spec import load_cluster
from commopt.errors import CommoptError


def main() -> None:
    path, mode, mark, text = sys.argv[1:]
    cluster = load_cluster(path)
    options: dict[str, Any] = json.loads(text)
    record, log_dir = Path(options["record"]), options.get("log_dir")
    faults = [Fault.model_validate(fault) for fault in options.get("faults", [])]
    lines: list[tuple[str, str]] = []
    told: list[str] = []
    try:
        emulation = enter(cluster, emulate=Emulate(mode))
        injection = Injection(faults, emulation=emulation, record_dir=record, tell=told.append) if faults else None
        for words, now in ((options["commands"], injection), (options.get("then"), None)):
            if words is None:
                continue
            result = Job(
                [],
                emulation=emulation,
                env={"TEST_MARK": mark, "COMMOPT_RECORD": str(record)},
                log_dir=Path(log_dir) if log_dir else None,
                agent=lambda node, words=words: words[node % len(words)],  # type: ignore[misc]
                on_line=lambda label, line: lines.append((label, line)),
                on_note=told.append,
                independent=options.get("independent", False),
                faults=now,
            ).run()
    except CommoptError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    found = {
        "lines": lines,
        "told": told,
        "ok": result.failure is None,
        "tx_bytes": dict(result.tx_bytes),
        "mode": emulation.mode.value,
        "failure": str(result.failure) if result.failure else None,
        "notices": [*emulation.notices, *result.notices],
        "links": emulation.links,
    }
    print(json.dumps(found))


main()
