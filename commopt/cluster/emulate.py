"""Where a job's nodes run: in network namespaces with shaped links, on loopback with paced exchanges, or on real machines.

Namespaces are made inside a re-executed launcher, so that nothing can be left behind:

launcher            waits, and passes signals on through a pipe, because unshare ignores SIGINT and SIGTERM
└── unshare -Urnm --pid --fork --kill-child --mount-proc        ended by the kernel when the launcher ends
    └── the same command again, process 1 of its namespace      when it ends, the kernel ends what it started
        └── ip netns exec node0 python -m torch.distributed.run ...
"""

import contextlib
import ctypes
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NoReturn

from commopt.cluster import machine
from commopt.cluster.machine import Emulate, free_ports, interface_of, tool_path, tried
from commopt.cluster.network import INTERFACE, Network, address, checked_run
from commopt.cluster.spec import ClusterSpec
from commopt.errors import EmulationError, LaunchError, did_you_mean
from commopt.plan.links import LinkModel

TOOLS = {"unshare": "util-linux", "ip": "iproute2", "tc": "iproute2"}  # with the packages they are in
_INSIDE = "_COMMOPT_INSIDE"  # "lifeline,report": the file descriptors that the outer launcher opened
_DEPTH = "_COMMOPT_DEPTH"
_PACED = "pacing slows the exchanges of commopt's methods, dense too; what a program sends without them, as plain DDP does, is not delayed"
_PR_SET_PDEATHSIG = 1
_RESTRICTIONS = (  # setting, the value that forbids namespaces, one that allows them, the reason, whether root is concerned
    ("kernel/apparmor_restrict_unprivileged_userns", "1", "0", "AppArmor restricts user namespaces", False),
    ("kernel/unprivileged_userns_clone", "0", "1", "user namespaces are off", False),
    ("user/max_user_namespaces", "0", "10000", "user namespaces are off", True),
)


@dataclass(frozen=True)
class Emulation:
    """How the nodes of one cluster are run on this machine."""

    cluster: ClusterSpec
    mode: Emulate  # never auto
    nodes: tuple[int, ...]  # indices of those that run here: all of them, except on real machines
    addresses: tuple[str, ...]  # of each node
    port: int  # where the agents meet on node 0
    interfaces: tuple[str | None, ...]  # of each node, the one that its peers reach
    notices: tuple[str, ...] = ()  # what a user should know, one line each
    links: str | None = None  # `COMMOPT_LINKS` for the ranks
    network: Network | None = None
    shares_loopback: bool = False  # of this machine, whose counters cannot tell the nodes apart

    def prefix(self, name: str) -> list[str]:
        """The words to put before a command to run it on a node."""
        return ["ip", "netns", "exec", name] if self.mode is Emulate.NETNS else []

    @property
    def is_elsewhere(self) -> bool:
        """Whether the nodes are real machines."""
        return self.mode is Emulate.NONE and self.cluster.has_hosts

    def tx_bytes(self) -> dict[str, int]:
        """Bytes each node has sent, by the kernel's counters; none of a node on loopback, where others send too."""
        if self.network is not None:
            return self.network.tx_bytes()
        counters = {self.cluster.names[node]: machine.nic_tx_bytes(self.interfaces[node]) for node in self.nodes}
        return {name: count for name, count in counters.items() if count is not None}

    def members(self) -> tuple[tuple[str, int], ...]:
        """(ranks,) address and port of each rank, for independent nodes."""
        slots, addresses = self.cluster.slots, self.addresses
        if self.shares_loopback:
            return tuple(zip((addresses[0],) * self.cluster.ranks, free_ports(self.cluster.ranks), strict=True))
        first = self.cluster.rendezvous.port + 1
        return tuple((address, first + slot) for address in addresses for slot in range(slots))


def links_json(links: LinkModel) -> str:
    """The model as the JSON that `LinkModel.from_json` reads; an unlimited rate is null."""
    fields = asdict(links).items()
    return json.dumps({key: [None if math.isinf(value) else value for value in values] for key, values in fields})


def is_inside() -> bool:
    """Whether this command is the one that was run again, in new namespaces."""
    return _INSIDE in os.environ


def enter(
    cluster: ClusterSpec,
    *,
    emulate: Emulate | None = None,
    node: str | None = None,
    on_inside: Callable[[], object] = lambda: None,
) -> Emulation:
    """Choose how to run this cluster here, and build its network.

    For namespaces, this runs the whole command again inside `unshare` and exits with its exit code: call it before
    anything is made, and before anything is printed but what is meant to be printed once: `on_inside` is called when the command
    inside has its network, and goes on. Raises EmulationError if the mode that was asked for does not work on this machine.
    `node` names this machine among real ones; by default it is recognised by its address or host name.
    """
    mode = emulate or cluster.emulation
    end_on_signals()
    if descriptors := os.environ.pop(_INSIDE, None):
        return _inside(cluster, *map(int, descriptors.split(",")))
    why = "as asked"
    if mode in (Emulate.AUTO, Emulate.NETNS):
        why = f"network namespaces do not work here: {_run_inside(on_inside)}"
    if mode is Emulate.NETNS:
        raise EmulationError(f"this machine cannot emulate links, as {why}; try --emulate paced")
    if mode is Emulate.NONE and cluster.has_hosts:
        return on_hosts(cluster, (this_node(cluster, node),), os.environ.get("GLOO_SOCKET_IFNAME"))
    return on_loopback(cluster, paced=mode is not Emulate.NONE, why=why)


def on_loopback(cluster: ClusterSpec, *, paced: bool = False, why: str = "") -> Emulation:
    """All nodes share this machine's loopback interface; if paced, ranks slow down their own exchanges."""
    count, notices = len(cluster.nodes), []
    if paced:
        notices.append(f"links are imposed by pacing, not by the kernel ({why})")
        notices.append(_PACED)
        if cluster.has_jitter_or_loss:
            notices.append("pacing imposes rates and delays; jitter and loss are left out")
    return Emulation(
        cluster=cluster,
        mode=Emulate.PACED if paced else Emulate.NONE,
        nodes=tuple(range(count)),
        addresses=("127.0.0.1",) * count,
        port=free_ports(1)[0],
        interfaces=(machine.loopback_interface(),) * count,
        notices=tuple(notices),
        links=links_json(cluster.link_model()) if paced else None,
        shares_loopback=True,
    )


def on_hosts(cluster: ClusterSpec, nodes: tuple[int, ...], interface: str | None = None) -> Emulation:
    """Some nodes of a cluster of real machines. interface: by default the one that owns each node's address."""
    hosts = tuple(member.host or "" for member in cluster.nodes)
    interfaces = tuple((interface or interface_of(host)) if k in nodes else None for k, host in enumerate(hosts))
    return Emulation(cluster, Emulate.NONE, nodes, hosts, cluster.rendezvous.port, interfaces)


def in_namespaces(cluster: ClusterSpec) -> Emulation:
    """All nodes in namespaces of this machine; the network is not built yet."""
    nodes = tuple(range(len(cluster.nodes)))
    places = tuple(map(address, nodes))
    return Emulation(cluster, Emulate.NETNS, nodes, places, cluster.rendezvous.port, (INTERFACE,) * len(nodes))


def preview(cluster: ClusterSpec, emulate: Emulate | None = None, node: str | None = None) -> Emulation:
    """What `enter` would choose, without trying or building anything; for `--print`."""
    mode = emulate or cluster.emulation
    if mode is Emulate.NONE and cluster.has_hosts:
        return on_hosts(cluster, (this_node(cluster, node),) if node else tuple(range(len(cluster.nodes))))
    if mode in (Emulate.NONE, Emulate.PACED):
        return on_loopback(cluster, paced=mode is Emulate.PACED, why="as asked")
    return in_namespaces(cluster)


def this_node(cluster: ClusterSpec, name: str | None) -> int:
    """The index of this machine's node. Raises LaunchError if it is none of the nodes, or more than one."""
    names = cluster.names
    if name is not None:
        if name not in names:
            raise LaunchError(f"--node {name}: no such node{did_you_mean(name, names)}")
        return names.index(name)
    own = {socket.gethostname(), socket.gethostname().split(".")[0], socket.getfqdn()}
    found = [
        i for i, node in enumerate(cluster.nodes) if {node.name, node.host} & own or machine.own_address(node.host)
    ]
    if len(found) != 1:
        raise LaunchError(
            f"{'more than one' if found else 'none'} of the nodes is this machine, {socket.gethostname()}: {', '.join(names)}; "
            "name it with --node, or try the cluster on this machine with --emulate auto"
        )
    return found[0]


def end_on_signals() -> None:
    """Let SIGTERM and SIGHUP end this process as Ctrl-C does: through its `finally` blocks, with the usual exit code."""

    def end(number: int, _: object) -> NoReturn:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with SIGINT ignored


@contextlib.contextmanager
def signals_wait() -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and SIGHUP end the main thread after the block: while it forks, Python drops what a handler raises."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.signal(number, lambda number, _: came.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if came:
        signal.raise_signal(came[0])


def end_with_parent(number: int = signal.SIGKILL) -> Callable[[], None]:
    """For a child's `preexec_fn`: the kernel sends it this signal when the process that started it ends."""
    prctl, parent = ctypes.CDLL(None, use_errno=True).prctl, os.getpid()

    def arrange() -> None:
        prctl(_PR_SET_PDEATHSIG, int(number))
        if os.getppid() != parent:  # it ended before the call
            os._exit(127)

    return arrange


def unshare_words() -> list[str]:
    """The `unshare` command that works here. Raises EmulationError with the reason and, where known, the cure."""
    for tool, package in TOOLS.items():
        if shutil.which(tool, path=tool_path()) is None:
            raise EmulationError(f"no {tool!r} command; install {package}")
    words = ["unshare", "-Urnm", "--pid", "--fork", "--kill-child"]
    for option in (["--mount-proc"], []):  # a container that masks parts of /proc refuses a new one
        done = tried([*words, *option, "true"])
        if done.returncode == 0:
            return [*words, *option]
        reason = done.stderr.strip().removeprefix("unshare: ") or f"exit code {done.returncode}"
    for name, bad, good, why, concerns_root in _RESTRICTIONS:
        with contextlib.suppress(OSError):
            if Path("/proc/sys", name).read_text().strip() == bad and (concerns_root or os.geteuid() != 0):
                raise EmulationError(f"{reason}; {why}: sysctl {name.replace('/', '.')}={good}")
    raise EmulationError(reason)


def _run_inside(on_inside: Callable[[], object]) -> str:
    """Run this command again in new namespaces and exit with its exit code; return only if that fails, with the reason."""
    depth = int(os.environ.get(_DEPTH, "0"))
    if depth >= 2:  # a program that always calls `enter` would start itself forever
        return f"commopt is running inside itself, {depth} levels deep"
    try:
        words = unshare_words()
    except EmulationError as error:
        return str(error)
    lifeline, lifeline_end = os.pipe()
    report, report_end = os.pipe()
    inner = (lifeline, report_end)
    process = subprocess.Popen(
        [*words, sys.executable, *sys.orig_argv[1:]],
        env={**os.environ, _INSIDE: f"{lifeline},{report_end}", _DEPTH: str(depth + 1), "PATH": tool_path()},
        pass_fds=inner,
        start_new_session=True,  # a terminal's Ctrl-C reaches this process, which passes it on once
        preexec_fn=end_with_parent(),
    )
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: os.write(lifeline_end, bytes([number])))
    for descriptor in inner:
        os.close(descriptor)
    reason = ""
    with os.fdopen(report, "rb", buffering=0) as stream:
        # `unshare` holds the other end open as long as it runs
        while reason != "ok" and (read := stream.read(1 << 12)):
            reason += read.decode()
    if reason == "ok":
        on_inside()
        code = process.wait()
        os._exit(128 - code if code < 0 else code)  # the process inside has printed everything
    process.wait()
    end_on_signals()
    os.close(lifeline_end)
    return reason or "the launcher ended early in its namespaces"


def _inside(cluster: ClusterSpec, lifeline: int, report: int) -> Emulation:
    """Build the network in these new namespaces; if that fails, send the reason to the outer launcher, and exit."""
    main = threading.get_ident()
    for descriptor in (lifeline, report):
        os.set_inheritable(descriptor, False)

    def listen() -> None:
        while number := os.read(lifeline, 1):
            signal.pthread_kill(main, number[0])
        os._exit(128 + signal.SIGKILL)

    threading.Thread(target=listen, daemon=True).start()
    try:
        checked_run(["mount", "-t", "tmpfs", "none", os.path.realpath("/var/run")])
        network = Network(cluster)
        checked_run(["ip", "netns", "exec", cluster.nodes[0].name, "true"])  # mounts /sys, which a container may forbid
    except Exception as error:  # whatever it is, the outer launcher can still pace
        os.write(report, f"{type(error).__name__}: {error}".encode())
        os._exit(1)
    os.write(report, b"ok")
    os.close(report)
    of = f" of {cluster.slots} ranks" if cluster.slots > 1 else ""
    notices, links = [f"links are emulated by the kernel, {len(cluster.nodes)} network namespaces{of}"], None
    model = cluster.link_model()
    if not network.has_netem and (any(model.latency_s) or any(model.between_latency_s)):
        own, between = ((math.inf,) * len(rates) for rates in (model.bytes_per_s, model.between_bytes_per_s))
        links = links_json(replace(model, bytes_per_s=own, between_bytes_per_s=between))
        notices += ["this kernel has no netem: rates are the kernel's, delays are imposed by pacing", _PACED]
    if not network.has_netem and cluster.has_jitter_or_loss:
        notices.append("this kernel has no netem: jitter and loss are left out")
    return replace(in_namespaces(cluster), notices=tuple(notices), links=links, network=network)
