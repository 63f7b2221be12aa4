"""What the YAML says: the nodes and links of a cluster, and the program, optimizer and methods of a run."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator

from commopt.choice import read_choice
from commopt.cluster.faults import Fault, mistakes
from commopt.cluster.machine import Emulate
from commopt.errors import ConfigError, did_you_mean
from commopt.plan.links import LinkModel, parse_delay, parse_loss, parse_rate
from commopt.reading import MistakesError, read_yaml, shown, validated

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")


def _checked_name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise ValueError(f"{text!r} is not a name; write up to 63 letters, digits, '-', '_' or '.', as in 'node0'")
    return text


def _checked_by(parse: Callable[[str], float]) -> BeforeValidator:
    """A text that its parser takes; `rate: 100` reaches it too, since its message says what is missing."""

    def checked(value: object) -> object:
        text = str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
        if isinstance(text, str):
            parse(text)
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
        raise ValueError(f"{value} is not a number of nodes; write 1 to 1000")
    return [{"name": f"node{index}"} for index in range(value)]


Name = Annotated[str, AfterValidator(_checked_name)]
Rate = Annotated[str, _checked_by(parse_rate)]
Delay = Annotated[str, _checked_by(parse_delay)]
Loss = Annotated[str, _checked_by(parse_loss)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Node(_Model):
    """One machine, or one emulated machine where `host` is None."""

    name: Name
    host: str | None = None


class Rendezvous(_Model):
    """Where the agents of a job meet: on node 0, at `port`."""

    backend: Literal["static", "c10d"] = "static"
    port: int = Field(29500, ge=1, le=65535, strict=True)


class Link(_Model):
    """One link, in tc's units. What is None is not limited, or left to the setting that this one overrides."""

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

    def over(self, base: Link) -> Link:
        """This link, with what it leaves open taken from `base`."""
        fields = set(Link.model_fields)
        return Link(**{**base.model_dump(include=fields), **self.model_dump(include=fields, exclude_none=True)})


class Links(Link):
    """Each node's own link, overrides of it, and the pipe of each site to the others."""

    mtu: int = Field(1500, ge=576, le=65535, strict=True)
    between: Link = Link()
    nodes: dict[str, Link] = {}
    sites: dict[str, Link] = {}


class ClusterSpec(_Model):
    """The nodes of a cluster, how many ranks each holds, and the links between them."""

    name: Name = "cluster"
    nodes: Annotated[list[Node], BeforeValidator(_as_nodes)]
    slots: int = Field(1, ge=1, le=1024, strict=True)
    backend: Literal["gloo", "nccl"] = "gloo"
    rendezvous: Rendezvous = Rendezvous()
    sites: dict[Name, list[str]] = {}
    links: Links = Links()
    emulate: Emulate | None = None

    @model_validator(mode="after")
    def _names_belong_together(self) -> ClusterSpec:
        found = list(_mistakes(self))
        if found:
            raise MistakesError(found)
        return self

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
        """The `emulate` of the file; by default real machines stay as they are, and others get the best that works."""
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
        """Every pair of nodes that a cut separates."""
        one, other = map(self.side, cut.names)
        return {frozenset((a, b)) for a in one for b in other}

    def link(self, node: int) -> Link:
        """The link of one node: its own override, then its site's, then everybody's."""
        name, sites = self.nodes[node].name, list(self.sites)
        link: Link = self.links
        if sites and (override := self.links.sites.get(sites[self.site_of_node[node]])):
            link = override.over(link)
        if own := self.links.nodes.get(name):
            link = own.over(link)
        return link

    def link_model(self) -> LinkModel:
        """The same links as arithmetic: what pacing imposes and the planner computes with."""
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


def _mistakes(spec: ClusterSpec) -> Iterator[tuple[str, str]]:
    names = spec.names
    for index, node in enumerate(spec.nodes):
        if node.name in names[:index]:
            yield f"nodes.{index}.name", f"{node.name!r} names two nodes; give each its own name"
        if (node.host is None) != (spec.nodes[0].host is None):
            yield f"nodes.{index}.host", "is given for some nodes only; write it for all of them, or for none"
    hosts = [node.host for node in spec.nodes if node.host is not None]
    for index, host in enumerate(hosts):
        if host in hosts[:index]:
            yield (
                f"nodes.{index}.host",
                f"{host!r} is the host of two nodes; use 'slots' for several ranks on one machine",
            )
    place: dict[str, str] = {}
    for site, members in spec.sites.items():
        if not members:
            yield f"sites.{site}", "[] has no node; write at least one, or leave the site out"
        for member in members:
            if member not in names:
                yield f"sites.{site}", f"there is no node {member!r}{did_you_mean(member, names)}"
            elif member in place:
                yield f"sites.{site}", f"{member!r} is in site {place[member]!r} too; a node belongs to one site"
            place[member] = site
    if spec.sites and (homeless := [name for name in names if name not in place]):
        yield "sites", f"{homeless[0]!r} is in no site; put every node in one"
    for node_name in spec.links.nodes:
        if node_name not in names:
            yield f"links.nodes.{node_name}", f"there is no such node{did_you_mean(node_name, names)}"
    for site in spec.links.sites:
        if site not in spec.sites:
            hint = did_you_mean(site, spec.sites) if spec.sites else "; name the sites under 'sites' first"
            yield f"links.sites.{site}", f"there is no such site{hint}"
    if spec.links.between != Link() and len(spec.sites) < 2:
        yield "links.between", "has no effect without two sites; name them under 'sites'"


def _placed(path: Path, info: ValidationInfo) -> Path:
    """A file that the run's file names, relative to its own folder."""
    folder = Path(info.context or "").parent
    if not (folder / path).is_file():
        raise ValueError(f"{str(path)!r} does not exist; paths are relative to the file's folder, {folder}")
    return Path(folder / path).resolve()


def _loaded(path: object, info: ValidationInfo) -> ClusterSpec:
    if not isinstance(path, str):
        raise ValueError(f"{shown(path)} is not text; write one")
    place, here = _placed(Path(path), info), Path.cwd()
    return load_cluster(place.relative_to(here) if place.is_relative_to(here) else place)  # as a user would type it


class RunSpec(_Model):
    """A program, its arguments, and the methods to run it with; paths are absolute, whatever the file says.

    `optimizer` and each value of `methods` are passed on as they are: the method checks its own options.
    """

    name: Name = "run"
    cluster: Annotated[ClusterSpec, BeforeValidator(_loaded)]
    program: Annotated[Path, AfterValidator(_placed)]
    arguments: dict[str, Any] = {}
    optimizer: dict[str, Any] = {}
    methods: dict[str, Annotated[dict[str, Any], BeforeValidator(lambda value: {} if value is None else value)]]
    faults: list[Fault] = []
    _path: Path

    @property
    def path(self) -> Path:
        """The file that it was read from."""
        return self._path

    def model_post_init(self, context: Any) -> None:
        self._path = context

    def argument_words(self) -> list[str]:
        """`arguments` as command-line words: {layers: 4, no_bias: true} -> --layers 4 --no-bias."""
        words: list[str] = []
        for key, value in self.arguments.items():
            if value is None or value is False:
                continue
            words.append("--" + key.replace("_", "-"))
            if value is not True:
                words += [str(word) for word in (value if isinstance(value, list) else [value])]
        return words

    @model_validator(mode="after")
    def _is_complete(self) -> RunSpec:
        steps = self.arguments.get("steps")
        found = list(mistakes(self.faults, self.cluster, steps))
        if not self.methods:
            found.append(("methods", "{} names no method; write at least one, as in 'dense: {}'"))
        if self.optimizer and not isinstance(self.optimizer.get("name"), str):
            found.append(("optimizer.name", "is missing; write the optimizer's name, as in 'name: adam'"))
        if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
            found.append(("arguments.steps", f"{shown(steps)} is out of range; write a whole number from 1"))
        for key, value in self.arguments.items():
            items = value if isinstance(value, list) else [value]
            if any(isinstance(item, dict | list) for item in items):
                found.append(
                    (f"arguments.{key}", f"{shown(value)} is not a word; write a text, a number or a flat list")
                )
        if found:
            raise MistakesError(found)
        return self


def _with_methods(data: dict[str, Any], folder: Path, file: str) -> dict[str, Any]:
    """The keys of a run whose `method:` block, as every integration takes it, stands among `methods`."""
    if "method" not in data:
        return data
    if "methods" in data:
        raise ConfigError(f"{file}: method: stands beside methods; write one of the two")
    choice = data["method"]
    if isinstance(choice, str) and choice.endswith((".yaml", ".yml", ".json")):
        choice = folder / choice
    try:
        name, options = read_choice(choice)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    return {**{key: value for key, value in data.items() if key != "method"}, "methods": {name: options}}


def load_cluster(path: str | Path) -> ClusterSpec:
    """Read a cluster's YAML. Raises ConfigError, one line a mistake: `FILE: key: what is wrong; what to write`."""
    return validated(ClusterSpec, read_yaml(Path(path)), str(path))


def load_run(path: str | Path) -> RunSpec:
    """Read a run's YAML and the cluster it names. Raises ConfigError as `load_cluster` does."""
    given = Path(path).resolve()
    data = _with_methods(read_yaml(Path(path)), given.parent, str(path))
    return validated(RunSpec, data, str(path), context=given)
