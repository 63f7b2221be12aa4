"""The YAML files: the nodes and links of a cluster, and the program, optimizer and methods of a run."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from ipaddress import IPv6Address
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo

from commopt.choice import is_file, read_choice
from commopt.cluster.faults import Fault, mistakes_among
from commopt.cluster.machine import Emulate
from commopt.errors import ConfigError, did_you_mean
from commopt.plan.links import LinkModel, parse_delay, parse_loss, parse_rate
from commopt.reading import SpecModel, read_yaml, shown, validated

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")


def _checked_name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise ValueError(f"{shown(text)} is not a name; write up to 63 letters, digits, '-', '_' or '.', as in 'node0'")
    return text


def _checked_host(text: str) -> str:
    try:
        if ":" in text:
            return str(IPv6Address(text.removeprefix("[").removesuffix("]")))
        is_host = bool(text.encode("idna")) and text.isprintable() and " " not in text
    except ValueError:
        is_host = False
    if not is_host:
        raise ValueError(f"{shown(text)} is not a host; write its address or name, as in '10.1.0.5'")
    return text


def _checked_by(parse: Callable[[str], float], wanted: str, least: float, most: float) -> BeforeValidator:
    """A text that `parse` accepts, within bounds; `rate: 100` reaches it too, since its message says what is missing."""

    def checked(value: object) -> object:
        text = str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
        if isinstance(text, str) and not least <= parse(text) <= most:
            raise ValueError(f"{shown(text)} is out of range; write {wanted}")
        return text

    return BeforeValidator(checked)


def _as_nodes(value: object) -> object:
    """Turn `4` into four names, and a list of names into a list of nodes."""
    if isinstance(value, bool) or not isinstance(value, int | list):
        raise ValueError(f"{shown(value)} is not a set of nodes; write how many (nodes: 4) or a list of {{name, host}}")
    if isinstance(value, list):
        if not value:
            raise ValueError("[] has no node; write at least one")
        return [{"name": node} if isinstance(node, str) else node for node in value]
    if not 1 <= value <= 1000:
        raise ValueError(f"{shown(value)} is not a number of nodes; write 1 to 1000")
    return [{"name": f"node{index}"} for index in range(value)]


Name = Annotated[str, AfterValidator(_checked_name)]
# the kernel's tbf and netem count a burst's time and a delay in 32 bits
Rate = Annotated[str, _checked_by(parse_rate, "10kbit to 8tbit", 1250, 1e12)]
Delay = Annotated[str, _checked_by(parse_delay, "100s or less", 0, 100)]
Loss = Annotated[str, _checked_by(parse_loss, "100% or less", 0, 1)]


class Node(SpecModel):
    """One machine; an emulated one if `host` is None."""

    name: Name
    host: Annotated[str, AfterValidator(_checked_host)] | None = None


class Rendezvous(SpecModel):
    """Where the agents of a job meet: on node 0, at `port`."""

    backend: Literal["static", "c10d"] = "static"
    port: int = Field(29500, ge=1, le=65535, strict=True)


class Link(SpecModel):
    """One link, in tc's units. None means no limit, or the value of the link that this one overrides."""

    rate: Rate | None = None
    delay: Delay | None = None
    jitter: Delay | None = None
    loss: Loss | None = None

    @property
    def bytes_per_s(self) -> float:
        return math.inf if self.rate is None else parse_rate(self.rate)

    @property
    def delay_s(self) -> float:
        return 0.0 if self.delay is None else parse_delay(self.delay)

    @property
    def jitter_s(self) -> float:
        return 0.0 if self.jitter is None else parse_delay(self.jitter)

    @property
    def loss_probability(self) -> float:
        return 0.0 if self.loss is None else parse_loss(self.loss)


class Links(Link):
    """Every node's link, overrides of it by node and by site, and the link of each site to the others."""

    mtu: int = Field(1500, ge=576, le=65535, strict=True)
    between: Link = Link()
    nodes: dict[str, Link] = Field({})
    sites: dict[str, Link] = Field({})


class ClusterSpec(SpecModel):
    """The nodes of a cluster, how many ranks each holds, and the links between them."""

    name: Name = "cluster"
    nodes: Annotated[list[Node], BeforeValidator(_as_nodes)]
    slots: int = Field(1, ge=1, le=1024, strict=True)
    backend: Literal["gloo", "nccl"] = "gloo"
    rendezvous: Rendezvous = Rendezvous()
    sites: dict[Name, list[str]] = Field({})
    links: Links = Links()
    emulate: Emulate | None = None

    @property
    def names(self) -> list[str]:
        return [node.name for node in self.nodes]

    @property
    def ranks(self) -> int:
        return len(self.nodes) * self.slots

    @property
    def has_hosts(self) -> bool:
        """Whether the nodes are real machines."""
        return self.nodes[0].host is not None

    @property
    def emulation(self) -> Emulate:
        """The `emulate` of the file; by default none for real machines, and the best that works otherwise."""
        return self.emulate or (Emulate.NONE if self.has_hosts else Emulate.AUTO)

    @property
    def site_of_node(self) -> tuple[int, ...]:
        """(nodes,) index of each node's site, in the order of the file; all 0 without sites."""
        place = {node: index for index, members in enumerate(self.sites.values()) for node in members}
        return tuple(place.get(node.name, 0) for node in self.nodes)

    def side(self, name: str) -> list[str]:
        """The nodes that the name of a node or of a site stands for."""
        return list(self.sites[name]) if name in self.sites and name not in self.names else [name]

    def separated(self, cut: Fault) -> set[frozenset[str]]:
        one, other = map(self.side, cut.names)
        return {frozenset((a, b)) for a in one for b in other}

    def link(self, node: int) -> Link:
        """The link of one node: its own override, then its site's, then the common one."""
        name = self.nodes[node].name
        of_site = next((self.links.sites.get(site) for site, members in self.sites.items() if name in members), None)
        link: Link = self.links
        for override in (of_site, self.links.nodes.get(name)):
            if override is not None:
                link = link.model_copy(update=override.model_dump(exclude_none=True))
        return link

    @property
    def has_jitter_or_loss(self) -> bool:
        links = [self.links.between, *map(self.link, range(len(self.nodes)))]
        return any(link.jitter_s or link.loss_probability for link in links)

    def link_model(self) -> LinkModel:
        """The same links for calculation: pacing imposes this model, and the planner computes with it."""
        links = [self.link(index) for index in range(len(self.nodes))]
        sites, between = max(1, len(self.sites)), self.links.between
        return LinkModel(
            node_of_rank=tuple(rank // self.slots for rank in range(self.ranks)),
            bytes_per_s=tuple(link.bytes_per_s for link in links),
            latency_s=tuple(link.delay_s for link in links),
            site_of_node=self.site_of_node,
            between_bytes_per_s=(between.bytes_per_s,) * sites,
            between_latency_s=(between.delay_s,) * sites,
        )

    def mistakes(self) -> Iterator[tuple[str, str]]:
        names = self.names
        for index, node in enumerate(self.nodes):
            if node.name in names[:index]:
                yield f"nodes.{index}.name", f"{node.name!r} names two nodes; give each its own name"
            if (node.host is None) != (self.nodes[0].host is None):
                yield f"nodes.{index}.host", "is given for some nodes only; write it for all of them, or for none"
        hosts = [node.host for node in self.nodes if node.host is not None]
        for index, host in enumerate(hosts):
            if host in hosts[:index]:
                twice = f"{host!r} is the host of two nodes; use 'slots' for several ranks on one machine"
                yield f"nodes.{index}.host", twice
        if self.ranks > 10_000:
            yield "slots", f"{self.slots} on each of {len(names)} nodes are too many; write 10000 ranks at most"
        if (port := self.rendezvous.port) + self.slots > 65535:
            room = f"{port} leaves no port for {self.slots} ranks after it; write {65535 - self.slots} or less"
            yield "rendezvous.port", room
        place: dict[str, str] = {}
        for site, members in self.sites.items():
            if not members:
                yield f"sites.{site}", "[] has no node; write at least one, or leave the site out"
            for member in members:
                if member not in names:
                    yield f"sites.{site}", f"no node {member!r}{did_you_mean(member, names)}"
                elif member in place:
                    yield f"sites.{site}", f"{member!r} is in site {place[member]!r} too; a node belongs to one site"
                place[member] = site
        if self.sites and (homeless := [name for name in names if name not in place]):
            yield "sites", f"{homeless[0]!r} is in no site; put every node in one"
        for node_name in self.links.nodes:
            if node_name not in names:
                yield f"links.nodes.{node_name}", f"no such node{did_you_mean(node_name, names)}"
        for site in self.links.sites:
            if site not in self.sites:
                hint = did_you_mean(site, self.sites) if self.sites else "; name the sites under 'sites' first"
                yield f"links.sites.{site}", f"no such site{hint}"
        if self.links.between != Link() and len(self.sites) < 2:
            yield "links.between", "has no effect without two sites; name them under 'sites'"


def _placed(path: Path, info: ValidationInfo) -> Path:
    """A file that the run's file names, relative to its own folder."""
    folder = Path(info.context or "").parent
    if not os.path.isfile(folder / path):  # Path.is_file raises if a name is too long
        raise ValueError(f"{shown(str(path))} does not exist; paths are relative to the file's folder, {folder}")
    return (folder / path).resolve()


def _loaded(path: object, info: ValidationInfo) -> ClusterSpec:
    if not isinstance(path, str):
        raise ValueError(f"{shown(path)} is not text; write one")
    place, here = _placed(Path(path), info), Path.cwd()
    return load_cluster(place.relative_to(here) if place.is_relative_to(here) else place)  # as a user would type it


class RunSpec(SpecModel):
    """A program, its arguments, and the methods to run it with; paths are absolute, whatever the file says.

    The program gets its method, and after how many `steps` it is ended, from the environment; an `optimizer` as `--optimizer`, in JSON.
    `optimizer` and each value of `methods` are passed on unchecked: the method checks its own options.
    """

    name: Name = "run"
    cluster: Annotated[ClusterSpec, BeforeValidator(_loaded)]
    program: Annotated[Path, AfterValidator(_placed)]
    arguments: dict[str, Any] | list[str | int | float] = Field({})
    steps: int | None = Field(None, ge=1, strict=True)
    optimizer: dict[str, Any] = Field({})
    methods: dict[str, Annotated[dict[str, Any], BeforeValidator(lambda value: {} if value is None else value)]]
    faults: list[Fault] = Field([])
    _path: Path

    @property
    def path(self) -> Path:
        return self._path

    def model_post_init(self, context: Any) -> None:
        self._path = context

    @property
    def planned_steps(self) -> int | None:
        """The steps that the program will do, if `steps` or an argument `steps` says so."""
        return self.steps or (self.arguments.get("steps") if isinstance(self.arguments, dict) else None)

    def argument_words(self) -> list[str]:
        """`arguments` as command-line words, as written: {n_layer: 4, no-bias: true} -> --n_layer 4 --no-bias; a list as it is."""
        if isinstance(self.arguments, list):
            return [str(word) for word in self.arguments]
        words: list[str] = []
        for key, value in self.arguments.items():
            if value is None or value is False:
                continue
            words.append(f"--{key}")
            if value is not True:
                words += [str(word) for word in (value if isinstance(value, list) else [value])]
        return words

    def mistakes(self) -> Iterator[tuple[str, str]]:
        arguments = self.arguments if isinstance(self.arguments, dict) else {}
        steps = arguments.get("steps")
        yield from mistakes_among(self.faults, self.cluster, self.planned_steps)
        if not self.methods:
            yield "methods", "{} names no method; write at least one, as in 'dense: {}'"
        if self.optimizer and not isinstance(self.optimizer.get("name"), str):
            yield "optimizer.name", "is missing; write the optimizer's name, as in 'name: adam'"
        if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
            yield "arguments.steps", f"{shown(steps)} is out of range; write a whole number from 1"
        for key, value in arguments.items():
            items = value if isinstance(value, list) else [value]
            if any(isinstance(item, dict | list) for item in items):
                yield f"arguments.{key}", f"{shown(value)} is not a word; write a text, a number or a flat list"


def load_cluster(path: str | Path) -> ClusterSpec:
    """Read a cluster's YAML. Raises ConfigError, one line per mistake: `FILE: key: what is wrong; what to write`."""
    return validated(ClusterSpec, read_yaml(Path(path)), str(path))


def run_of_program(
    program: Path, cluster: Path, *, methods: Sequence[str], steps: int | None, arguments: Sequence[str]
) -> RunSpec:
    """The run of a program without a run's file. Raises ConfigError as `load_run`."""
    data: dict[str, Any] = {
        "name": re.sub(r"[^A-Za-z0-9_.-]|^[^A-Za-z0-9]+", "", program.stem)[:63] or "run",
        "cluster": str(cluster),
        "program": str(program),
        "arguments": list(arguments),
        "steps": steps,
        "methods": {name: {} for name in methods},
    }
    return validated(RunSpec, data, str(program), context=Path.cwd() / program.name)


def load_run(path: str | Path) -> RunSpec:
    """Read a run's YAML and the cluster it names; a `method:` block becomes one of `methods`. Raises ConfigError as `load_cluster`."""
    data = read_yaml(Path(path))
    given = Path(path).resolve()
    if "method" in data:
        if "methods" in data:
            raise ConfigError(f"{path}: method: stands beside methods; write one of the two")
        choice = data.pop("method")
        if isinstance(choice, str) and is_file(choice):
            choice = given.parent / choice
        try:
            name, options = read_choice(choice)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        data["methods"] = {name: options}
    return validated(RunSpec, data, str(path), context=given)
