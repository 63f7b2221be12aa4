from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from commopt.cluster.machine import Emulate
from commopt.cluster.spec import ClusterSpec, load_cluster, load_run
from commopt.errors import ConfigError
from commopt.plan.links import LinkModel

UNITS = "write a number and one of"

MISTAKES = {
    "": "is empty; write keys and values, as in 'nodes: 4'",
    "- 4": "is not a set of keys and values; write one, as in 'nodes: 4'",
    "slots: 2": "nodes: is missing; write it",
    "nodes: 0": "nodes: 0 is not a number of nodes; write 1 to 1000",
    "nodes: four": "nodes: 'four' is not a set of nodes; write how many (nodes: 4) or a list of {name, host}",
    "nodes: []": "nodes: [] has no node; write at least one",
    "nodes: 4\nnodez: 2": "nodez: unknown key; did you mean 'nodes'?",
    "nodes: 2\nslots: 0": "slots: 0 is too small; write 1 or more",
    "nodes: 2\nslots: two": "slots: 'two' is not a whole number; write one",
    "nodes: 2\nslots:": "slots: is empty; write a value, or leave the key out",
    "nodes: 2\nbackend: mpi": "backend: 'mpi' is unknown; known: gloo, nccl",
    "nodes: 2\nbackend: glo": "backend: 'glo' is unknown; did you mean 'gloo'?",
    "nodes: 2\nemulate: no": "emulate: 'no' is unknown; did you mean 'none'?",
    "nodes: 2\nrendezvous: {port: 99999}": "rendezvous.port: 99999 is too large; write 65535 or less",
    "nodes: 2\nrendezvous: {port: 0}": "rendezvous.port: 0 is too small; write 1 or more",
    "nodes: 2\nlinks: 50mbit": "links: '50mbit' is not a set of keys and values; write one",
    "nodes: 2\nlinks: {rate: 50mb}": f"links.rate: '50mb' is not a rate; {UNITS} bit, kbit, mbit, gbit, tbit, bps, kbps, "
    "mbps, gbps, as in '100mbit'",
    "nodes: 2\nlinks: {rate: 0mbit}": "links.rate: '0mbit' is not a rate: it must be above zero; leave it out for an unlimited link",
    "nodes: 2\nlinks: {delay: 5}": f"links.delay: '5' is not a delay; {UNITS} us, usec, ms, msec, s, sec, as in '20ms'",
    "nodes: 2\nlinks: {loss: 200%}": "links.loss: '200%' is not a loss rate: at most 100%",
    "nodes: 2\nlinks: {mtu: 100}": "links.mtu: 100 is too small; write 576 or more",
    "nodes: 2\nlinks: {nodes: {node2: {rate: 5mbit}}}": "links.nodes.node2: no such node; did you mean 'node1'?",
    "nodes: 2\nlinks: {nodes: {node1: {rat: 5mbit}}}": "links.nodes.node1.rat: unknown key; did you mean 'rate'?",
    "nodes: 2\nlinks: {sites: {west: {rate: 5mbit}}}": "links.sites.west: no such site; name the sites under 'sites' first",
    "nodes: 2\nlinks: {between: {rate: 5mbit}}": "links.between: has no effect without two sites; name them under 'sites'",
    "nodes: [a, a]": "nodes.1.name: 'a' names two nodes; give each its own name",
    "nodes: [a b]": "nodes.0.name: 'a b' is not a name; write up to 63 letters, digits, '-', '_' or '.', as in 'node0'",
    "nodes: [{name: a, hots: b}]": "nodes.0.hots: unknown key; did you mean 'host'?",
    "nodes: [{name: a, host: b}, {name: c}]": "nodes.1.host: is given for some nodes only; write it for all of them, or for none",
    "nodes: [{name: a, host: h}, {name: b, host: h}]": "nodes.1.host: 'h' is the host of two nodes; "
    "use 'slots' for several ranks on one machine",
    "nodes: 2\nsites: {a: [node0], b: [node0, node1]}": "sites.b: 'node0' is in site 'a' too; a node belongs to one site",
    "nodes: 2\nsites: {a: [node0]}": "sites: 'node1' is in no site; put every node in one",
    "nodes: 1\nsites: {a: [nod0]}": "sites.a: no node 'nod0'; did you mean 'node0'?",
    "nodes: 2\nnodes: 3": "line 2: duplicate key 'nodes'",
    "nodes: 2\nlinks: {rate: 1kbit}": "links.rate: '1kbit' is out of range; write 10kbit to 8tbit",
    "nodes: 2\nlinks: {delay: 101s}": "links.delay: '101s' is out of range; write 100s or less",
    "nodes: 1000\nslots: 11": "slots: 11 on each of 1000 nodes are too many; write 10000 ranks at most",
    "nodes: 2\nslots: 8\nrendezvous: {port: 65530}": "rendezvous.port: 65530 leaves no port for 8 ranks after it; write 65527 or less",
    "nodes: [{name: a, host: a b}]": "nodes.0.host: 'a b' is not a host; write its address or name, as in '10.1.0.5'",
    "nodes: [{name: a, host: 'h:29500'}]": "nodes.0.host: 'h:29500' is not a host; write its address or name, as in '10.1.0.5'",
    "nodes: [{name: a, host: '::1'}, {name: b, host: '[0::1]'}]": "nodes.1.host: '::1' is the host of two nodes; "
    "use 'slots' for several ranks on one machine",
    "nodes: 2\nslots: !!bool maybe": "line 2: tag 'tag:yaml.org,2002:bool': write the value without it",
    "nodes: &a [*a]": "line 1: alias '*a': write the value itself",
    f"nodes: {'[' * 3000}": "line 1: is nested more than 20 deep",
    f"nodes: {'9' * 5000}": "line 1: a number has too many digits",
    'nodes: ["a\\0b"]': "line 1: the text holds a NUL or half a character; write it without",
    'nodes: 2\nname: "\\ud800"': "line 2: the text holds a NUL or half a character; write it without",
    'nodes: 2\n"a\\nb": 1': "line 2: a key must be a word",
    "nodes: 2\n\x07": "line 2: '\\x07' is not allowed in YAML",
    f"nodes: 2 #{'é' * 40000}": "is longer than 64 KiB; write a shorter file",
    "nodes: 2\n slots: [": "line 2: mapping values are not allowed here",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_is_named_with_its_key_and_its_fix(text: str, write: Callable[[str], Path]) -> None:
    path = write(text)
    with pytest.raises(ConfigError) as caught:
        load_cluster(path)
    first, *others = str(caught.value).splitlines()
    assert first == f"{path}: {MISTAKES[text]}"
    assert others == [line for line in others if line.startswith(f"{path}: ")]
    assert "pydantic" not in str(caught.value)


def test_all_mistakes_are_listed(write: Callable[[str], Path]) -> None:
    path = write("nodes: 2\nslots: 0\nlinks: {rate: fast, dely: 1ms}")
    with pytest.raises(ConfigError) as caught:
        load_cluster(path)
    keys = [line.split(": ")[1] for line in str(caught.value).splitlines()]
    assert keys == ["slots", "links.rate", "links.dely"]


def test_of_very_many_mistakes_some_are_counted(write: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_cluster(write("nodes: 2\n" + "".join(f"x{k}: 1\n" for k in range(30))))
    lines = str(caught.value).splitlines()
    assert (len(lines), lines[-1].split(": ")[1]) == (21, "and 10 more mistakes")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nope\.yaml: no such file"):
        load_cluster(tmp_path / "nope.yaml")
    with pytest.raises(ConfigError, match="cannot be read: is a directory"):
        load_cluster(tmp_path)
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    with pytest.raises(ConfigError, match="cannot be read: too many levels"):
        load_run(tmp_path / "loop.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not text in UTF-8"):
        load_cluster(tmp_path / "binary.yaml")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_without_permission(write: Callable[[str], Path]) -> None:
    path = write("nodes: 2")
    path.chmod(0)
    with pytest.raises(ConfigError, match="cannot be read: permission denied"):
        load_cluster(path)


def test_the_nearest_override_wins(write: Callable[[str], Path]) -> None:
    text = """
        nodes: 4
        slots: 2
        sites: {east: [node0, node1], west: [node2, node3]}
        links:
          rate: 1gbit
          delay: 1ms
          between: {rate: 50mbit, delay: 10ms}
          nodes: {node3: {rate: 400mbit}}
          sites: {west: {rate: 80mbit, delay: 2ms}}
    """
    assert load_cluster(write(text)).link_model() == LinkModel(
        node_of_rank=(0, 0, 1, 1, 2, 2, 3, 3),
        bytes_per_s=(125e6, 125e6, 10e6, 50e6),
        latency_s=(0.001, 0.001, 0.002, 0.002),
        site_of_node=(0, 0, 1, 1),
        between_bytes_per_s=(6.25e6, 6.25e6),
        between_latency_s=(0.01, 0.01),
    )


def test_without_links_nothing_is_limited() -> None:
    links = ClusterSpec.model_validate({"nodes": 2}).link_model()
    assert links.bytes_per_s == (math.inf, math.inf)
    assert links.seconds([{1: 1e9}, {}]) == 0


def test_real_machines_are_used_as_they_are() -> None:
    assert ClusterSpec.model_validate({"nodes": 2}).emulation is Emulate.AUTO
    hosts = {"nodes": [{"name": "a", "host": "10.1.0.5"}]}
    assert ClusterSpec.model_validate(hosts).emulation is Emulate.NONE
    assert ClusterSpec.model_validate({**hosts, "emulate": "netns"}).emulation is Emulate.NETNS


def test_yaml_words_and_numbers_are_what_they_look_like(tmp_path: Path) -> None:
    run = run_file(
        tmp_path,
        "arguments: {max_steps: 80, lr: 2e-3, betas: [0.9, 0.99], amp: true, bias: false, mode: on, port: 0x10}\n"
        "optimizer: {name: adam, lr: 2e-3}\nmethods: {dense: , onebit_adam: {freeze_step: 24}}\n",
        "nodes: [no, on, y]",
    )
    spec = load_run(run)
    assert [node.name for node in spec.cluster.nodes] == ["no", "on", "y"]
    words = "--max_steps 80 --lr 0.002 --betas 0.9 0.99 --amp --mode on --port 16"
    assert spec.argument_words() == words.split()
    assert spec.optimizer == {"name": "adam", "lr": 0.002}
    assert list(spec.methods.items()) == [("dense", {}), ("onebit_adam", {"freeze_step": 24})]
    assert (spec.path, spec.program) == (run, tmp_path / "p.py")


RUN_MISTAKES = {
    "methods: {}": "methods: {} names no method; write at least one, as in 'dense: {}'",
    "": "methods: is missing; write it",
    "methods: [dense]": "methods: ['dense'] is not a set of keys and values; write one",
    "methods: {dense: 3}": "methods.dense: 3 is not a set of keys and values; write one",
    "methods: {dense: {}}\noptimizer: {lr: 1}": "optimizer.name: is missing; write the optimizer's name, as in 'name: adam'",
    "methods: {dense: {}}\narguments: {a: {b: c}}": "arguments.a: {'b': 'c'} is not a word; write a text, a number or a flat list",
    **{
        f"methods: {{dense: {{}}}}\narguments: {{steps: {steps}}}": f"arguments.steps: {shown} is out of range; write a whole"
        for steps, shown in (("0", "0"), ("true", "true"), ("-3", "-3"), ("many", "'many'"), ("2.5", "2.5"))
    },
    "cluster: nope.yaml\nmethods: {dense: {}}": "cluster: 'nope.yaml' does not exist",
    f"program: {'n' * 300}\nmethods: {{dense: {{}}}}": f"program: '{'n' * 56}... does not exist",
    "program: nope.py\nmethods: {dense: {}}": "program: 'nope.py' does not exist",
    "metods: {dense: {}}": "metods: unknown key; did you mean 'methods'?",
}


def run_file(folder: Path, text: str, cluster: str = "nodes: 3") -> Path:
    """A run of this text, whose cluster and program exist unless the text names others."""
    (folder / "c.yaml").write_text(cluster)
    (folder / "p.py").touch()
    path = folder / "run.yaml"
    usual = {"cluster": "cluster: c.yaml\n", "program": "program: p.py\n"}
    path.write_text("".join(line for key, line in usual.items() if f"{key}: " not in text) + text)
    return path


@pytest.mark.parametrize("text", RUN_MISTAKES)
def test_a_mistake_in_a_run_is_named(text: str, tmp_path: Path) -> None:
    path = run_file(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_run(path)
    lines = str(caught.value).splitlines()
    assert any(line.startswith(f"{path}: {RUN_MISTAKES[text]}") for line in lines), lines


def test_a_mistake_in_the_cluster_of_a_run_names_the_clusters_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"c\.yaml: nodes: 0 is not a number of nodes"):
        load_run(run_file(tmp_path, "methods: {dense: {}}", "nodes: 0"))


def run_with(faults: str, folder: Path, cluster: str = "nodes: 3", arguments: str = "{steps: 80}") -> Path:
    return run_file(folder, f"arguments: {arguments}\nmethods: {{dense: {{}}}}\nfaults: {faults}\n", cluster)


FAULTS = {
    "kill": "kill: 'kill' is not a list; write one",
    "[{at_step: 5}]": "0: says nothing to do; write one of kill, restart, cut, slow, hang, as in {at_step: 120, kill: node2}",
    "[{kill: node1}]": "0.at_step: is missing; write it",
    "[{at_step: 0, kill: node1}]": "0.at_step: 0 is too small; write 1 or more",
    "[{at_step: 5.5, kill: node1}]": "0.at_step: 5.5 is not a whole number; write one",
    "[{at_step: 80, kill: node1}]": "0.at_step: 80 is not reached in 80 steps; write less than arguments.steps",
    "[{at_step: 5, kil: node1}]": "0.kil: unknown key; did you mean 'kill'?",
    "[{at_step: 5, kill: }]": "0.kill: is empty; write a value, or leave the key out",
    "[{at_step: 5, kill: nod1}]": "0.kill: no node 'nod1'; did you mean 'node1'?",
    "[{at_step: 5, kill: node1, slow: node2, factor: 2}]": "0: kill and slow are 2 faults; write an entry for each",
    "[{at_step: 5, kill: node1, for_s: 3}]": "0.for_s: has no effect on a kill; leave it out; write a restart at a later step",
    "[{at_step: 5, kill: node1, factor: 3}]": "0.factor: has no effect on a kill; leave it out",
    "[{at_step: 5, hang: node1}]": "0.for_s: is missing; write for how many seconds the node hangs, as in 'for_s: 10'",
    "[{at_step: 5, hang: node1, for_s: 0}]": "0.for_s: 0 is too small; write a number above 0",
    "[{at_step: 5, hang: node1, for_s: .inf}]": "0.for_s: inf is not a finite number; write one",
    "[{at_step: 5, slow: node1}]": "0.factor: is missing; write how many times slower the node gets, as in 'factor: 5'",
    "[{at_step: 5, slow: node1, factor: 1}]": "0.factor: 1 is too small; write a number above 1",
    "[{at_step: 5, slow: node1, factor: yes}]": "0.factor: 'yes' is not a number; write one",
    "[{at_step: 5, cut: node1}]": "0.cut: 'node1' is not a cut; write two names of nodes or sites, as in [node0, node1]",
    "[{at_step: 5, cut: [node1]}]": "0.cut: ['node1'] is not a cut; write two names of nodes or sites, as in [node0, node1]",
    "[{at_step: 5, cut: [node1, node1]}]": "0.cut: 'node1' is on both sides; write two nodes or sites that have none in common",
    "[{at_step: 5, cut: [node1, node4]}]": "0.cut: no node 'node4'; did you mean 'node2'?",
    "[{at_step: 5, restart: node1}]": "0.restart: node1 is up at step 5; kill it at an earlier step, or leave this out",
    "[{at_step: 5, restart: node1}, {at_step: 6, kill: node1}]": "0.restart: node1 is up at step 5; "
    "kill it at an earlier step, or leave this out",
    "[{at_step: 5, kill: node1}, {at_step: 5, restart: node1}]": "1.restart: node1 is killed at step 5 too; restart it at a later one",
    "[{at_step: 5, kill: node1}, {at_step: 9, kill: node1}]": "1.kill: node1 is dead since step 5; restart it before, or leave this out",
    "[{at_step: 5, kill: node1}, {at_step: 9, hang: node1, for_s: 2}]": "1.hang: node1 is dead since step 5; "
    "restart it before, or leave this out",
    "[{at_step: 5, kill: node1}, {at_step: 6, kill: node2}, {at_step: 7, kill: node0}]": "2.kill: node0 is the last "
    "node that is up at step 7, and nobody could go on",
}


@pytest.mark.parametrize("text", FAULTS)
def test_a_mistake_in_a_fault_is_named(text: str, tmp_path: Path) -> None:
    path = run_with(text, tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_run(path)
    assert str(caught.value) == f"{path}: faults.{FAULTS[text]}".replace("faults.kill: ", "faults: ")


def test_a_site_on_one_side_of_a_cut_holds_no_node_of_the_other(tmp_path: Path) -> None:
    sites = "nodes: 3\nsites: {east: [node0, node1], west: [node2]}"
    with pytest.raises(ConfigError, match="'node1' is on both sides"):
        load_run(run_with("[{at_step: 5, cut: [east, node1]}]", tmp_path, sites))
    with pytest.raises(ConfigError, match="no node or site 'wets'; did you mean 'west'"):
        load_run(run_with("[{at_step: 5, cut: [east, wets]}]", tmp_path, sites))
    run = load_run(run_with("[{at_step: 5, cut: [east, west]}]", tmp_path, sites))
    assert run.cluster.separated(run.faults[0]) == {frozenset(("node0", "node2")), frozenset(("node1", "node2"))}


def test_faults_may_stand_in_any_order(tmp_path: Path) -> None:
    text = "[{at_step: 60, restart: node2}, {at_step: 20, kill: node2}, {at_step: 70, kill: node2}]"
    run = load_run(run_with(text, tmp_path, arguments="{}"))
    assert [(fault.at_step, fault.kind) for fault in run.faults] == [(60, "restart"), (20, "kill"), (70, "kill")]
    assert load_run(run_with("[]", tmp_path)).faults == []
