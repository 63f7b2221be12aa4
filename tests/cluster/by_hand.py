"""Two machines on which a command is run by hand: `by_hand.py CLUSTER MARK JSON`, where JSON lists each node's command.

The network is the emulator's; nothing else is commopt's launcher. Prints what each node printed and its exit code, as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys

from commopt.cluster.emulate import end_with_parent, enter
from commopt.cluster.spec import Emulate, load_cluster

cluster = load_cluster(sys.argv[1])
emulation = enter(cluster, emulate=Emulate.NETNS)
nodes = [
    subprocess.Popen(
        [*emulation.prefix(node.name), *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=end_with_parent(),
    )
    for node, command in zip(cluster.nodes, json.loads(sys.argv[3]), strict=True)
]
outputs = [node.communicate()[0] for node in nodes]  # a pipe holds what the second one prints meanwhile
print(json.dumps([[node.returncode, output.splitlines()] for node, output in zip(nodes, outputs, strict=True)]))
