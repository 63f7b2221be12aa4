from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launchers import commopt_here
from networks import needs_ipv6

from commopt.cluster.commands import agent_environment, agent_words, peers_json, secret_of
from commopt.cluster.emulate import on_hosts, preview, this_node
from commopt.cluster.machine import Emulate, interface_of, loopback_interface
from commopt.cluster.spec import ClusterSpec, Rendezvous
from commopt.errors import LaunchError
from commopt.plan.links import LinkModel

TWO = {"nodes": [{"name": "a0", "host": "10.1.0.5"}, {"name": "a1", "host": "10.1.0.6"}], "slots": 2}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def cluster_of(**keys: object) -> ClusterSpec:
    return ClusterSpec.model_validate({**TWO, **keys})


def test_a_static_rendezvous_names_the_rank_of_each_node() -> None:
    words = agent_words(preview(cluster_of()), 1, ["train.py", "--steps", "5"])
    expected = ["--nnodes=2", "--nproc-per-node=2", "--node-rank=1", "--master-addr=10.1.0.5", "--master-port=29500"]
    assert words == [*TORCHRUN, *expected, "--log-dir=/dev/null", "train.py", "--steps", "5"]
    words = agent_words(preview(cluster_of()), 0, ["hostname", "-f"])
    assert words[-3:] == ["--no-python", "hostname", "-f"]  # only Python files are run by Python


@pytest.mark.parametrize(("node", "is_host"), [(0, "true"), (1, "false")])
def test_only_node_0_hosts_the_store_of_c10d(node: int, is_host: str) -> None:
    emulation = preview(cluster_of(name="lab", rendezvous={"backend": "c10d", "port": 1234}))
    expected = ["--rdzv-backend=c10d", "--rdzv-id=lab", "--rdzv-endpoint=10.1.0.5:1234"]
    expected += [f"--rdzv-conf=is_host={is_host}", f"--local-addr=10.1.0.{5 + node}"]
    assert agent_words(emulation, node, ["train.py"])[5:-2] == expected


@needs_ipv6
def test_hosts_may_be_ipv6_addresses() -> None:
    cluster = cluster_of(nodes=[{"name": "a0", "host": "[::1]"}, {"name": "a1", "host": "2001:DB8::2"}])
    assert this_node(cluster, None) == 0
    assert interface_of("::1") == loopback_interface()
    emulation = preview(cluster)
    assert [host for host, _ in emulation.members()[::2]] == ["::1", "2001:db8::2"]
    assert "--master-addr=::1" in agent_words(emulation, 0, ["train.py"])
    words = agent_words(preview(cluster.model_copy(update={"rendezvous": Rendezvous(backend="c10d")})), 1, ["train.py"])
    assert {"--rdzv-endpoint=[::1]:29500", "--local-addr=2001:db8::2"} < {*words}


@pytest.mark.parametrize(
    ("interface", "variables"),
    [
        ("eth7", {"GLOO_SOCKET_IFNAME": "eth7", "NCCL_SOCKET_IFNAME": "eth7", "COMMOPT_NIC": "eth7"}),
        ("lo", {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}),  # which counts the bytes of all nodes
        (None, {}),  # it is left to the library
    ],
)
def test_ranks_learn_their_node_and_interface_and_share_the_cores_unless_the_user_says_otherwise(
    interface: str | None, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    emulation = on_hosts(cluster_of(backend="nccl", links={"mtu": 9000}), (1,), interface)
    environment = agent_environment(emulation, 1, ranks_here=4)
    assert environment.pop("OMP_NUM_THREADS") == "7"
    assert environment == {"COMMOPT_NODE": "a1", "COMMOPT_NODE_RANK": "1", "COMMOPT_MTU": "9000", **variables}
    monkeypatch.delenv("OMP_NUM_THREADS")
    shared = agent_environment(emulation, 1, ranks_here=4)
    assert shared["OMP_NUM_THREADS"] == str(max(1, (os.cpu_count() or 1) // 4))


@pytest.mark.parametrize(
    "links", [{}, {"rate": "50mbit", "delay": "3ms", "between": {"rate": "10mbit", "jitter": "1ms"}}]
)
def test_paced_ranks_are_told_their_links(links: dict[str, Any]) -> None:
    cluster = cluster_of(nodes=3, sites={"a": ["node0"], "b": ["node1", "node2"]}, links=links)
    paced, plain = preview(cluster, Emulate.PACED), preview(cluster, Emulate.NONE)
    assert LinkModel.from_json(str(paced.links)) == cluster.link_model()
    assert plain.links is None
    assert ("pacing imposes rates and delays; jitter and loss are left out" in paced.notices) == bool(links)


def test_this_machine_is_found_by_address_or_by_name() -> None:
    nodes = [{"name": "far", "host": "192.0.2.7"}, {"name": "here", "host": "127.0.0.1"}]
    cluster = ClusterSpec.model_validate({"nodes": nodes})
    assert this_node(cluster, None) == 1
    assert this_node(cluster, "far") == 0
    with pytest.raises(LaunchError, match="--node fat: no such node; did you mean 'far'"):
        this_node(cluster, "fat")
    with pytest.raises(LaunchError, match="none of the nodes is this machine"):
        this_node(ClusterSpec.model_validate({"nodes": nodes[:1]}), None)


@pytest.mark.parametrize("independent", [False, True])
def test_print_starts_nothing_and_shows_every_node(independent: bool, write: Callable[[str], Path]) -> None:
    path = write("nodes: 2\nlinks: {rate: 50mbit}")
    program = path.with_name("my train.py")
    program.touch()
    options = ["--emulate", "netns", "--print", *(["--independent"] if independent else [])]
    code, output, _ = commopt_here("launch", path, *options, "--", program, "--steps", "5")
    assert code == 0
    lines = output.splitlines()
    assert [lines[0], lines[2]] == ["# node0", "# node1"]
    assert "ip netns exec node1" in lines[3]
    if independent:
        assert '"members": [["10.77.0.1", 29501], ["10.77.0.2", 29501]]' in lines[3]
        assert "--node-rank=0 --master-addr=127.0.0.1 --master-port=29500 --max-restarts=0" in lines[3]
    else:
        assert "--node-rank=1 --master-addr=10.77.0.1 --master-port=29500" in lines[3]
    assert f"--nnodes={1 if independent else 2} " in lines[3]
    assert lines[3].endswith(f"'{program}' --steps 5")


def test_ranks_of_independent_nodes_are_told_where_each_rank_listens() -> None:
    emulation = preview(cluster_of())
    members = emulation.members()
    assert members == (("10.1.0.5", 29501), ("10.1.0.5", 29502), ("10.1.0.6", 29501), ("10.1.0.6", 29502))
    environment = agent_environment(emulation, 0, ranks_here=2, peers=peers_json(emulation, mark="ab12"))
    assert json.loads(environment["COMMOPT_PEERS"]) == {"job": "ab12", "members": [list(one) for one in members]}


def test_a_job_on_this_machine_gets_a_secret_of_its_own_and_keeps_one_that_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("COMMOPT_SECRET", raising=False)
    here = preview(cluster_of(), Emulate.NETNS)
    made = [secret_of(here)["COMMOPT_SECRET"] for _ in range(2)]
    assert made[0] != made[1]
    assert len(made[0]) == 64
    assert secret_of(on_hosts(cluster_of(), (1,), None)) == {}
    monkeypatch.setenv("COMMOPT_SECRET", "of 16 bytes or more")
    assert secret_of(here) == {}


def test_ranks_that_share_a_loopback_interface_listen_on_ports_of_their_own() -> None:
    emulation = preview(cluster_of(nodes=3), Emulate.NONE)
    addresses, ports = zip(*emulation.members(), strict=True)
    assert set(addresses) == {"127.0.0.1"}
    assert len(set(ports)) == 6
    emulated = preview(cluster_of(nodes=3, slots=1), Emulate.NETNS)
    assert emulated.members() == tuple((f"10.77.0.{node}", 29501) for node in (1, 2, 3))


def test_every_machine_finds_the_same_mark_for_a_job() -> None:
    jobs = [
        json.loads(peers_json(preview(cluster_of()), f"small {name}"))["job"] for name in ("noloco",) * 2 + ("diloco",)
    ]
    longer = json.loads(peers_json(preview(cluster_of(nodes=3)), "small noloco"))
    jobs.append(longer["job"])
    assert len(longer["members"]) > 2
    assert jobs[0] == jobs[1] == jobs[3]  # a machine that was added finds the job, too
    assert len(set(jobs)) == 2
    assert len(bytes.fromhex(jobs[0])) == 16
