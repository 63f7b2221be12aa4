"""The results document that `--json` writes; every field has a description.

Times `at_s` are seconds since the first rank's start, by the clocks of the ranks' machines.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence
from statistics import fmean
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

import commopt
from commopt.cluster.machine import usable_cores
from commopt.cluster.spec import ClusterSpec
from commopt.record.meter import TrafficRow
from commopt.record.words import fault_text


class DocumentPart(BaseModel):
    """A part of the document: no unknown keys, no number that JSON cannot hold."""

    model_config = ConfigDict(
        extra="forbid", allow_inf_nan=False, populate_by_name=True, serialize_by_alias=True, from_attributes=True
    )


class Node(DocumentPart):
    """One node of the cluster."""

    name: str = Field(description="the node's name in the cluster's YAML; never a host name")
    ranks: int = Field(description="how many ranks it holds")
    rate: str | None = Field(None, description="its link's rate each way in tc's units; null if unlimited")
    delay: str | None = Field(None, description="delay its link adds to what it sends; null if none")
    jitter: str | None = Field(None, description="variation of that delay; null if none")
    loss: str | None = Field(None, description="packets lost on its link; null if none")
    site: str | None = Field(None, description="its site; null if there are no sites")


class Cluster(DocumentPart):
    """The cluster that the runs were trained on, and how its links were emulated."""

    name: str = Field(description="the cluster's name in its YAML")
    backend: str = Field("gloo", description="the library that moved tensors: gloo or nccl")
    nodes: list[Node] = Field(description="the nodes, by rank")
    mtu: int = Field(1500, description="largest IP packet in bytes, on every link")
    between_rate: str | None = Field(None, description="rate of the pipe between a site and the others, each way")
    between_delay: str | None = Field(None, description="delay of that pipe")
    emulation: str = Field("none", description="how the links were emulated: netns (by the kernel), paced, or none")
    notices: list[str] = Field([], description="what the YAML asks for and the emulation could not do, in sentences")

    @classmethod
    def from_spec(cls, spec: ClusterSpec, *, emulation: str, notices: Sequence[str] = ()) -> Cluster:
        """Describe a cluster's YAML and how this machine emulated it; host names are left out."""
        sites = {node: site for site, members in spec.sites.items() for node in members}
        nodes = []
        for index, node in enumerate(spec.nodes):
            link = spec.link(index).model_dump(include={"rate", "delay", "jitter", "loss"})
            nodes.append(Node(name=node.name, ranks=spec.slots, site=sites.get(node.name), **link))
        between = spec.links.between
        return cls(
            name=spec.name,
            backend=spec.backend,
            nodes=nodes,
            mtu=spec.links.mtu,
            between_rate=between.rate,
            between_delay=between.delay,
            emulation=emulation,
            notices=list(notices),
        )


class Environment(DocumentPart):
    """The machine and the software that the numbers depend on; no host name, no user, no path."""

    python: str = Field(description="version of Python")
    torch: str = Field(description="version of torch")
    commopt: str = Field(description="version of commopt")
    cpu_count: int = Field(description="processors that this process may use")
    platform: str = Field(description="operating system, its release, and the machine's architecture")

    @classmethod
    def here(cls) -> Environment:
        return cls(
            python=platform.python_version(),
            torch=importlib.metadata.version("torch"),
            commopt=commopt.__version__,
            cpu_count=usable_cores(),
            platform=f"{platform.system()} {platform.release()} {platform.machine()}",
        )


class TrainedModel(DocumentPart):
    """The model that every run trained."""

    parameters: int | None = Field(description="how many parameters; null if no run got far enough to record it")


class Validation(DocumentPart):
    """One validation."""

    after_steps: int = Field(description="steps trained before it")
    seconds: float = Field(description="training seconds before it, on the axis of the run's `seconds`")
    loss: float | None = Field(
        description="mean over the ranks, weighted by their tokens; with outer rounds, over those that trained to the end; "
        "null if not finite"
    )


class Event(DocumentPart):
    """Something else that ranks recorded, such as a voided step; equal events of several ranks are merged."""

    kind: str = Field(description="what happened: voided, or a program's own word")
    ranks: list[int] = Field(description="the ranks that recorded it")
    fields: dict[str, Any] = Field(description="details, such as the step or the parameter's name")


class NodeBytes(DocumentPart):
    """One node's bytes in the measured window, by commopt's count and by its interface's."""

    node: str = Field(description="the node's name")
    payload_bytes: float = Field(description="payload that left the node in the window, by commopt's count")
    modelled_bytes: float = Field(description="the same with segment headers and acknowledgements")
    nic_tx_bytes: float = Field(description="bytes that its interface transmitted in the window, by the kernel's count")
    ratio: float | None = Field(description="nic_tx_bytes over modelled_bytes; null if modelled_bytes is 0")
    ok: bool = Field(description="whether the two agree within 3 %, or within what each message adds")


class RoundCosts(DocumentPart):
    """What outer rounds cost, over some ranks."""

    blocked_s: float = Field(description="seconds that training stopped for a round, mean over rounds and ranks")
    blocked_share: float | None = Field(description="share of the steps' time that training stopped for rounds")
    exchange_s: float = Field(description="seconds from a round's start to its last message, mean of rounds and ranks")
    bytes_per_step: float | None = Field(
        description="bytes sent in rounds, divided by all steps of a rank; mean over the ranks"
    )


class RankRounds(RoundCosts):
    """One rank's outer rounds."""

    rank: int = Field(description="the rank")
    rounds: int = Field(description="outer rounds of this rank")
    missed: int = Field(description="rounds in which a scheduled peer's message did not arrive in time")
    missed_at_s: list[float] = Field([], description="when those rounds ended, in seconds since the first rank's start")
    alone: int = Field(0, description="rounds in which it averaged with no other rank, whether missed or sitting out")


class Spread(DocumentPart):
    """How far apart the replicas were in one round."""

    step: int = Field(description="optimizer steps that the furthest rank had done when the round ended")
    at_s: float = Field(description="seconds since the first rank's start")
    spread: float = Field(description="consensus distance, as in spread_end: the root mean square of the estimates")


class Rounds(RoundCosts):
    """The outer rounds of a run, over all ranks."""

    rounds: int = Field(description="outer rounds of the rank that made the most")
    missed: int = Field(description="rounds in which a scheduled peer's message did not arrive in time, over all ranks")
    blocked_worst_s: float = Field(description="seconds that training stopped for a round, on the worst rank")
    by_rank: list[RankRounds] = Field(description="the same for each rank")
    spread: list[Spread] = Field([], description="the distance in each round; empty if no rank estimated it")
    spread_end: float | None = Field(
        None,
        description="how far apart the replicas were in the last round: root mean square over replicas of "
        "||x_i - mean|| / ||mean||, as the ranks estimate it; null if none did",
    )


class RankValidation(DocumentPart):
    """The last validation of one rank, of its own replica."""

    rank: int = Field(description="the rank")
    after_steps: int = Field(description="steps of training before it")
    loss: float | None = Field(description="its loss; null if not finite")
    tokens: int = Field(description="tokens that it was measured on")


class EndedEarly(DocumentPart):
    """A rank that did not train to the end."""

    rank: int = Field(description="the rank")
    steps: int = Field(description="steps that it had trained; 0 if it wrote no record")


class ProgressPart(DocumentPart):
    """One start of one rank: the steps that it did until it ended or was started again."""

    at_s: list[float] = Field(description="when steps ended; of many, a selection with both ends of the longest pauses")
    steps: list[int] = Field(description="steps that the rank had trained by then")


class Progress(DocumentPart):
    """How many steps one rank had done, over time."""

    rank: int = Field(description="the rank")
    node: str = Field(description="the name of its node")
    parts: list[ProgressPart] = Field(description="one for each of its starts")
    ended: bool = Field(description="whether it trained to the end")


class MissedRounds(DocumentPart):
    """Rounds that a rank made without a scheduled peer."""

    rank: int = Field(description="the rank that waited for the peer")
    rounds: int = Field(description="how many rounds")


class FaultCost(DocumentPart):
    """What a fault cost the ranks until the next fault began or training ended.

    The survivors are the ranks that were alive and, unless it is a cut, not on the fault's nodes.
    """

    longest_stop_s: float | None = Field(
        description="the longest time between two steps of a rank that is alive and not hit, or only cut off, up to the "
        "next fault and without validations; null if there is no such rank"
    )
    stopped_rank: int | None = Field(description="the rank with that stop")
    median_step_s: float | None = Field(description="that rank's median step, of the whole run, to compare it with")
    missed: list[MissedRounds] = Field(description="outer rounds that ranks missed up to the next fault")
    back_after_s: float | None = Field(
        None, description="for a restart: seconds until its last rank had finished a step; null if one never did"
    )
    back_at_step: int | None = Field(None, description="for a restart: the number of that step, as recorded")


class InjectedFault(DocumentPart):
    """A fault as it was planned and done."""

    kind: str = Field(description="kill, restart, cut, slow or hang")
    nodes: list[str] = Field(description="the nodes it hit; for a cut, its two sides")
    at_step: int = Field(description="the step it was planned for: it began when the furthest rank had done this many")
    for_s: float | None = Field(None, description="seconds that it was planned to last; null if to the end")
    factor: float | None = Field(None, description="for slow: the nodes got 1/factor of the processor's time")

    def __str__(self) -> str:
        return fault_text(self.kind, self.nodes, self.for_s, self.factor)


class Fault(InjectedFault):
    """A fault that the launcher injected, and what it cost."""

    ranks: list[int] = Field(description="the ranks on these nodes; empty if they are sites")
    at_s: float = Field(description="when it began, in seconds since the first rank's start")
    end_s: float | None = Field(None, description="when it was undone, by the same clock; null if it never was")
    cost: FaultCost = Field(description="what it cost the ranks")


class RunResult(DocumentPart):
    """One method's run."""

    name: str = Field(description="the run's name in tables and plots: the method, with a number if it ran twice")
    method: str = Field(description="the method's name")
    options: dict[str, Any] = Field({}, description="the method's options as given")
    status: Literal["finished", "failed"] = Field(
        description="whether every rank trained to the end; with outer rounds, whether one did and none failed by itself; "
        "nodes that were killed are in the notices"
    )
    failure: str | None = Field(None, description="why the run failed; null if it finished")
    ranks: int = Field(description="ranks in the run")
    parameters: int | None = Field(None, description="parameters of the model it trained")
    steps: int = Field(description="optimizer steps that were done")
    steps_planned: int = Field(description="optimizer steps that were asked for; those done if nobody said")
    warmup_steps: int | None = Field(None, description="steps before the first steady one; null if none was steady")
    tokens: int = Field(description="tokens trained on, over all ranks")
    train_loss: list[float | None] = Field(
        description="per step, mean over the ranks that logged one; null if not finite. A step without one has that of the last step "
        "with one; empty if the program logged none"
    )
    val_loss: float | None = Field(
        None, description="loss of the last validation, on held-out text; null if there is none or it is not finite"
    )
    validations: list[Validation] = Field([], description="every validation, in order")
    validation_by_rank: list[RankValidation] = Field([], description="with outer rounds, each rank's last validation")
    step_seconds: list[float] = Field(description="per step, its seconds, mean over the ranks")
    seconds: list[float] = Field(description="training seconds until each step's end: the running sum of step_seconds")
    step_s: float | None = Field(
        None,
        description="seconds per step in the steady phase: the median of each rank's steady steps, of the slowest rank; "
        "with outer rounds, which fall into few steps, the mean over steps and ranks",
    )
    step_mean_s: float | None = Field(None, description="mean seconds of the steady steps, over steps and ranks")
    compute_s: float | None = Field(
        None,
        description="seconds of the same steps with communication switched off, which no method can beat; of the slowest rank",
    )
    wait_share: float | None = Field(None, description="share of the steady steps' time spent waiting for the network")
    wall_s: float | None = Field(None, description="wall-clock seconds of all steps, warm-up and validations included")
    window_steps: int = Field(0, description="steps of the measured window, which lies in the steady phase")
    payload_bytes_per_step: float | None = Field(
        None,
        description="bytes that a node's ranks send to other nodes per step of the window, without headers, counting a "
        "collective's schedule; mean over the nodes, or over the ranks of the only one; without a window, what the outer "
        "rounds sent, over all steps",
    )
    nic_tx_bytes_per_step: float | None = Field(
        None,
        description="bytes per step that left the interface of the node that sent most, by the kernel's count, with "
        "headers; null if nodes have no interface of their own",
    )
    nic_over_model: float | None = Field(
        None, description="the interface's count over commopt's with headers: 1 when it counts right; of the worst node"
    )
    nodes: list[NodeBytes] = Field([], description="both byte counts of each node; empty if there is only commopt's")
    traffic: list[TrafficRow] = Field([], description="commopt's count of the window in detail, the largest first")
    defects: list[str] = Field([], description="disagreements of the two byte counts, worded for a bug report")
    events: list[Event] = Field([], description="what else the ranks recorded, in order")
    rounds: Rounds | None = Field(None, description="the outer rounds; null if the method has none")
    faults: list[Fault] = Field([], description="the faults that were injected, in order, and what each cost")
    progress: list[Progress] = Field([], description="each rank's steps over time; only with rounds or faults")
    ended_early: list[EndedEarly] = Field([], description="with outer rounds, the ranks that did not train to the end")
    notices: list[str] = Field([], description="what to know about this run and its records, in sentences")
    speedup_vs_dense: float | None = Field(
        None, description="the step time of dense over this run's, both in the steady phase; null without either"
    )

    @property
    def end_loss(self) -> float | None:
        """The loss of the last validation; without any, the mean training loss of the last tenth of the steps."""
        last = self.train_loss[-max(1, len(self.train_loss) // 10) :]
        if self.validations or not last:
            return self.val_loss
        finite = [loss for loss in last if loss is not None]
        return fmean(finite) if len(finite) == len(last) else None

    @property
    def loss_name(self) -> str:
        return "val loss" if self.validations or not self.train_loss else "training loss"


class Results(DocumentPart):
    """What `--json` writes: every run of one comparison, and what they ran on."""

    schema_version: Literal[1] = Field(1, alias="schema", description="version of this format")
    created: str = Field(description="when the document was made, in UTC, ISO 8601")
    cluster: Cluster = Field(description="the cluster, and how its links were emulated")
    environment: Environment = Field(description="software and machine")
    model: TrainedModel = Field(description="the model that was trained")
    runs: list[RunResult] = Field(description="one per method, in the order they ran")

    @property
    def dense(self) -> RunResult | None:
        """The run that the others are compared with: the first of the method dense."""
        return next((run for run in self.runs if run.method == "dense"), None)

    @property
    def has_faults(self) -> bool:
        return any(run.faults for run in self.runs)
