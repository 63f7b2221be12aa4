"""Which method to take on a cluster: predictions for all of them, a verdict, and what to write."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from commopt.plan.links import LinkModel
from commopt.plan.model import Predicted, Setting, predict
from commopt.plan.profile import Profile
from commopt.plan.transport import BEST, LIKELY, WORST, Assumed, same_links, transport_of
from commopt.record.words import seconds_text

WORTH = 0.05  # a gain of less is not worth a change
CLOSE = 0.03  # the mildest method is named whose step is at most this much above the fastest one's
ENOUGH = 0.9  # if computation is a larger share of a dense step than this, the network is not the bottleneck
RATES = (1e6, 1e12)  # bit/s between which links are considered
# from the one that changes training least; one of these is named if it goes with the optimizer
BY_OPTIMIZER: Mapping[str, tuple[str, ...]] = {
    "adam": ("dense", "fp16", "two_way(int8)", "two_way(4bit)", "loco", "onebit_adam"),
    "sgd": ("dense", "fp16", "two_way(int8)", "two_way(4bit)", "loco", "powersgd"),
    "lion": ("dense", "fp16", "two_way(int8)", "distributed_lion"),
    "lamb": ("dense", "fp16", "two_way(int8)", "onebit_lamb"),
}
OUTER = ("local_sgd", "diloco", "noloco")  # named too if no exchange in every step is fast enough
STARVED = 2.0  # times the computation: the step from which on outer methods are named too


@dataclass(frozen=True)
class Cluster:
    """What is known of the machines: of all but the model."""

    name: str
    links: LinkModel
    slots: int
    is_gpu: bool

    @property
    def bytes_per_s(self) -> float:
        """The slowest link's rate, an inter-site pipe's share included."""
        sites = max(1, len(set(self.links.site_of_node)))
        between = min(self.links.between_bytes_per_s) if sites > 1 else math.inf
        return min(*self.links.bytes_per_s, between, math.inf)


@dataclass(frozen=True)
class Row:
    """One method: its step as it is likely, and between what limits it may lie.

    gain: dense's step over its own. state_bytes: what a rank keeps in addition, on its device and in the host's memory.
    needed_bytes_per_s: the link's rate from which on a step computes for the share of its time that was asked for; None if no
    rate is enough.
    """

    profile: Profile
    likely: Predicted
    low_s: float
    high_s: float
    gain: float
    state_bytes: float
    needed_bytes_per_s: float | None = None

    @property
    def name(self) -> str:
        return self.profile.name


@dataclass(frozen=True)
class Advice:
    """What to expect, and what to do.

    setting: the likely one; at_rate: the same with links of so many bytes per second. rows: in the order of the methods asked for.
    named: the methods of which one may be taken, from the mildest.
    """

    cluster: Cluster
    setting: Setting
    rows: Sequence[Row]
    named: Sequence[str]
    at_rate: Callable[[float], Setting]
    assumptions: Sequence[str] = ()
    target: float | None = None

    @cached_property
    def dense(self) -> Row:
        return next(row for row in self.rows if row.name == "dense")

    @cached_property
    def best(self) -> Row:
        """The mildest of the methods named that is close to the fastest of them; dense unless something is gained."""
        known = {row.name: row for row in self.rows}
        candidates = [known[name] for name in self.named if name in known]
        fastest_s = min((row.likely.step_s for row in candidates), default=math.inf)
        if fastest_s > self.dense.likely.step_s * (1 - WORTH):
            return self.dense
        return next(row for row in candidates if row.likely.step_s <= fastest_s * (1 + CLOSE))

    @property
    def helps(self) -> bool:
        return self.best is not self.dense

    @property
    def verdict(self) -> str:
        """What to do, in one sentence."""
        best, dense_s = self.best, self.dense.likely.step_s
        share = self.setting.compute_s / dense_s
        if self.setting.machines == 1:
            return "There is one machine, and nothing to send: change nothing."
        if self.helps:
            return (
                f"Take {best.name}: a step of {seconds_text(best.likely.step_s)} instead of {seconds_text(dense_s)}, {best.gain:.1f} "
                f"times as fast; under dense, {1 - share:.0%} of each step is waiting."
            )
        why = (
            "Your network is not the bottleneck"
            if share > ENOUGH
            else f"No method makes a step more than {WORTH:.0%} faster"
        )
        return f"{why}: change nothing. {share:.0%} of a dense step is computation."

    @property
    def notes(self) -> list[str]:
        """What else to know before following the verdict."""
        notes, best, compute_s = [], self.best, self.setting.compute_s
        if self.helps:
            if best.high_s > self.dense.low_s:
                notes.append(
                    "The ranges overlap: measure with `commopt compare` on an hour's rental before you decide."
                )
            if best.profile.quality:
                worst = max(best.profile.quality, key=lambda one: one.worse_percent)
                notes.append(
                    f"With small models, its final loss differed from dense's by at most {worst.worse_percent:+.1f} % ({worst.task})."
                )
            if best.profile.warmup_steps:
                notes.append(f"Its first {best.profile.warmup_steps:,} steps, the warm-up, take as long as dense ones.")
            elif best.profile.finds_warmup:
                notes.append(
                    "Its first steps, the warm-up, take as long as dense ones: 15 to 25 % of a short training, less of a long one."
                )
        outer = [row for row in self.rows if row.name in OUTER]
        if best.likely.step_s > STARVED * compute_s and outer and self.setting.machines > 1:
            fastest = min(outer, key=lambda row: row.likely.step_s)
            notes.append(
                f"Even so the network takes {1 - compute_s / best.likely.step_s:.0%} of each step. {fastest.name} exchanges every "
                f"{fastest.profile.every} steps, and takes {seconds_text(fastest.likely.step_s)} a step, for a higher loss "
                "(docs/outer-convergence.md)."
            )
        return notes


def assumed_settings(cluster: Cluster, base: Setting) -> dict[str, Setting]:
    """The setting with what is assumed of transports and codecs: at best, likely, and at worst."""
    copies = {"low": 2.0, "likely": 1.0, "high": 0.5}
    kinds: dict[str, Assumed] = {"low": BEST, "likely": LIKELY, "high": WORST}
    return {
        key: replace(
            base,
            transport=transport_of(cluster.links, cluster.slots, kind, has_gpus=cluster.is_gpu),
            copy_bytes_per_s=base.copy_bytes_per_s * copies[key],
        )
        for key, kind in kinds.items()
    }


def advise(
    cluster: Cluster,
    profiles: Sequence[Profile],
    settings: Mapping[str, Setting],
    *,
    optimizer: str = "adam",
    named: Sequence[str] | None = None,
    target: float | None = None,
    at_rate: Callable[[float], Setting] | None = None,
    assumptions: Sequence[str] = (),
) -> Advice:
    """Predict every method and name one.

    profiles: dense among them. settings: low, likely and high. named: the methods of which one may be named, from the mildest; by
    default those that go with the optimizer. target: the share of a step that is to be computation. at_rate: the setting on links of
    another rate; by default with the same assumptions.
    """
    likely = settings["likely"]
    rated = at_rate or (
        lambda rate: replace(
            likely, transport=transport_of(same_links(cluster.links, rate), cluster.slots, has_gpus=cluster.is_gpu)
        )
    )
    predicted = [{key: predict(profile, setting) for key, setting in settings.items()} for profile in profiles]
    dense_s = next(steps for profile, steps in zip(profiles, predicted, strict=True) if profile.name == "dense")[
        "likely"
    ].step_s
    rows = []
    for profile, steps in zip(profiles, predicted, strict=True):
        low_s, *_, high_s = sorted(step.step_s for step in steps.values())
        state = (profile.state_bytes + profile.host_bytes) * likely.parameters / cluster.slots
        needed = None if target is None else needed_rate(profile, rated, target, likely.compute_s)
        rows.append(Row(profile, steps["likely"], low_s, high_s, dense_s / steps["likely"].step_s, state, needed))
    return Advice(
        cluster, likely, rows, BY_OPTIMIZER[optimizer] if named is None else named, rated, assumptions, target
    )


def needed_rate(profile: Profile, at_rate: Callable[[float], Setting], target: float, compute_s: float) -> float | None:
    """The least rate of the links, in bytes per second, at which the computation is the share `target` of a step."""

    def is_enough(bits: float) -> bool:
        return compute_s / predict(profile, at_rate(bits / 8)).step_s >= target

    low, high = map(math.log, RATES)
    if not is_enough(RATES[1]):
        return None
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if is_enough(math.exp(middle)) else (middle, high)
    return math.exp(high) / 8


def to_json(advice: Advice) -> dict[str, Any]:
    """The advice as plain values; times in seconds, rates in bits per second."""
    return {
        "schema": 1,
        "cluster": advice.cluster.name,
        "machines": advice.setting.machines,
        "slots": advice.setting.slots,
        "parameters": advice.setting.parameters,
        "compute_s": advice.setting.compute_s,
        "link_bits_per_s": None if math.isinf(advice.cluster.bytes_per_s) else 8 * advice.cluster.bytes_per_s,
        "verdict": advice.verdict,
        "method": advice.best.name,
        "notes": advice.notes,
        "assumptions": list(advice.assumptions),
        "target": advice.target,
        "methods": [_row_json(row, advice.target is not None) for row in advice.rows],
    }


def _row_json(row: Row, has_target: bool) -> dict[str, Any]:
    needed = row.needed_bytes_per_s
    return {
        "name": row.name,
        "kind": row.profile.kind,
        "step_s": row.likely.step_s,
        "step_low_s": row.low_s,
        "step_high_s": row.high_s,
        "codec_s": row.likely.codec_s,
        "network_s": row.likely.network_s,
        "exposed_s": row.likely.exposed_s,
        "gain": row.gain,
        "bytes_per_machine": row.likely.bytes_per_machine,
        "state_bytes": row.state_bytes,
        "loss": [{"task": one.task, "worse_percent": one.worse_percent} for one in row.profile.quality],
        **({"needed_bits_per_s": None if needed is None else 8 * needed} if has_target else {}),
    }
