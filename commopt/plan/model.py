"""What one training step takes: pure functions of a method's profile and of the machines.

A step on N machines (see docs/planning.md for where each number comes from):

    step      = forward + max(backward, lane) + extra step of an update method + waiting for the slowest machine
    lane      : buckets in turn, each when backward has released it: inside(4 n) + codec(n) + sum over phases of seconds(phase bytes)
    slowest   = compute x spread x sqrt(2 ln N), which is what the largest of N normal draws exceeds their mean by

A codec, and the share of a transfer that keeps a processor busy, take their time from backward if a rank has less than two cores.
An outer method exchanges every H steps; what its delay of D steps hides does not count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from commopt.plan.curve import Curve
from commopt.plan.profile import Phase, Profile

MOST_BUCKETS = 128
FIRST_BUCKET_BYTES, BUCKET_BYTES = 1 << 20, 25 << 20  # of torch's DistributedDataParallel
NOTHING = Curve(((0.0, 0.0),))


@dataclass(frozen=True)
class Codec:
    """Seconds against elements: of an exchange without its network, and of what the optimizer's step takes more than the user's own."""

    exchange: Curve = NOTHING
    step: Curve = NOTHING


@dataclass(frozen=True)
class Transport:
    """Seconds of each operation among machines, all slots at once, against the bytes that one rank contributes.

    busy: the share of that time which keeps a rank's processor busy, 0 to 1. inside: seconds to average a float32 tensor of so many
    bytes within a machine, and to put the result together again.
    """

    seconds: Mapping[str, Curve]
    busy: Mapping[str, Curve] = field(default_factory=dict)
    inside: Curve = NOTHING

    def scaled(self, by: float) -> Transport:
        """The same with every exchange among machines taking `by` times as long."""
        return replace(self, seconds={key: curve.scaled(by) for key, curve in self.seconds.items()})


@dataclass(frozen=True)
class Setting:
    """A model on machines.

    compute_s: a step of one rank without communication, while all compute. buckets: elements in the order in which backward releases
    them. cores_per_rank: of the machine's processor; None if a GPU computes, beside which codecs and transfers run freely.
    spread: the standard deviation of a rank's step times over their mean.
    """

    machines: int
    slots: int
    compute_s: float
    buckets: tuple[int, ...]
    transport: Transport = Transport({})
    codecs: Mapping[str, Codec] = field(default_factory=dict)
    copy_bytes_per_s: float = 5e9
    cores_per_rank: float | None = None
    spread: float = 0.0
    forward_share: float = 1 / 3
    overlap: bool = True

    @property
    def parameters(self) -> int:
        return sum(self.buckets)

    def codec(self, profile: Profile) -> Codec:
        """The measured cost of a method's codec, or that of its profile at this device's speed of copying."""
        if profile.name in self.codecs:
            return self.codecs[profile.name]
        copy_s = 4 / self.copy_bytes_per_s  # per element
        return Codec(Curve.line(0.0, (profile.exchange_copies or 0.0) * copy_s))


@dataclass(frozen=True)
class Predicted:
    """One method's step, in seconds; bytes_per_machine: what a machine's network card sends per step, on average."""

    step_s: float
    compute_s: float
    codec_s: float
    network_s: float
    bytes_per_machine: float

    @property
    def exposed_s(self) -> float:
        """What communication and its codecs add to the step."""
        return max(0.0, self.step_s - self.compute_s)


def ddp_buckets(parameters: int, bucket_bytes: float = BUCKET_BYTES) -> tuple[int, ...]:
    """Elements of the buckets that DDP would make of float32 parameters, at most 128 of them, in the order of release."""
    first = min(parameters, FIRST_BUCKET_BYTES // 4, int(bucket_bytes / 4))
    rest = parameters - first
    count = min(MOST_BUCKETS, math.ceil(rest * 4 / bucket_bytes))
    return (first, *(rest * (k + 1) // count - rest * k // count for k in range(count)))


def predict(profile: Profile, setting: Setting) -> Predicted:
    """A step of this method, on average once its warm-up is over."""
    sent = profile.bytes_per_parameter(setting.machines) * setting.parameters
    predicted = _outer_step if profile.kind == "outer" else _step
    return predicted(profile, setting, sent if setting.machines > 1 else 0.0)


def slowest_s(setting: Setting, among: int, steps: int = 1) -> float:
    """How much longer than the mean the slowest of `among` machines takes for a step, if it is waited for after every `steps`."""
    if among < 2 or setting.spread == 0:
        return 0.0
    return setting.compute_s * setting.spread * math.sqrt(2 * math.log(among)) / math.sqrt(steps)


def network_s(phases: Sequence[Phase], elements: float, setting: Setting) -> float:
    """Seconds of the phases of one exchange of so many elements, shared out among a machine's slots."""
    return sum(job.seconds for job in _transfers(phases, elements, setting))


@dataclass(frozen=True)
class _Job:
    """Something that the lane does; busy: the share of its time in which it wants a processor."""

    seconds: float
    busy: float


def _transfers(phases: Sequence[Phase], elements: float, setting: Setting) -> list[_Job]:
    if setting.machines == 1:
        return []
    jobs = []
    for phase in phases:
        nbytes = phase.nbytes(elements / setting.slots, setting.machines)
        seconds, busy = setting.transport.seconds[phase.operation], setting.transport.busy.get(phase.operation)
        jobs.append(_Job(seconds(nbytes), 0.0 if busy is None else min(1.0, busy(nbytes))))
    return jobs


def _inside(elements: float, setting: Setting) -> _Job:
    return _Job(setting.transport.inside(4 * elements) if setting.slots > 1 else 0.0, 1.0)


def _step(profile: Profile, setting: Setting, sent: float) -> Predicted:
    codec, overlaps = setting.codec(profile), setting.overlap and profile.overlaps
    buckets = setting.buckets if overlaps else (setting.parameters,)
    jobs, codec_s, net_s = [], 0.0, 0.0
    for n in buckets:
        encoding = _Job(codec.exchange(n / setting.slots) if setting.machines > 1 else 0.0, 1.0)
        transfers = _transfers(profile.phases, n, setting)
        jobs.append([_inside(n, setting), encoding, *transfers])
        codec_s += encoding.seconds
        net_s += sum(job.seconds for job in transfers)
    own_step_s = codec.step(setting.parameters)
    local_s = setting.compute_s + own_step_s
    exchange_s = _with_backward(setting, buckets, jobs, overlaps) + own_step_s
    # local steps between exchanges send nothing
    step_s = (exchange_s + (profile.every - 1) * local_s) / profile.every
    step_s += slowest_s(setting, setting.machines * setting.slots, profile.every)
    return Predicted(max(step_s, local_s), local_s, codec_s / profile.every, net_s / profile.every, sent)


def _with_backward(setting: Setting, buckets: Sequence[int], jobs: Sequence[Sequence[_Job]], overlaps: bool) -> float:
    """Seconds of forward, and of backward with the lane's jobs of each bucket beside it."""
    forward_s = setting.compute_s * setting.forward_share
    backward_s = setting.compute_s - forward_s
    return forward_s + lane_s(_released(buckets, backward_s, overlaps), jobs, backward_s, _capacity(setting))


def _capacity(setting: Setting) -> float | None:
    """How many processors a rank has for backward and its lane; what was measured with fewer than one has been measured so."""
    return None if setting.cores_per_rank is None else max(1.0, setting.cores_per_rank)


def _released(buckets: Sequence[int], backward_s: float, overlaps: bool) -> list[float]:
    """How much of backward must be done before each bucket is ready."""
    if not overlaps:
        return [backward_s] * len(buckets)
    total, done, moments = sum(buckets), 0, []
    for n in buckets:
        done += n
        moments.append(backward_s * done / total)
    return moments


def lane_s(
    released: Sequence[float], jobs: Sequence[Sequence[_Job]], backward_s: float, capacity: float | None
) -> float:
    """Seconds from the start of backward until it and all exchanges are done, which run one after the other beside it.

    released[k]: how far backward must be for bucket k. capacity: processors that both share; None if neither slows the other.
    """
    now = done = 0.0
    for moment, own in zip(released, jobs, strict=True):
        if done < moment:
            now, done = now + moment - done, moment
        for job in own:
            left = job.seconds
            while left > 0 and done < backward_s - 1e-12:
                ahead, beside = _rates(job.busy, capacity)
                took = min(left / beside, (backward_s - done) / ahead)
                now, left, done = now + took, left - took * beside, done + took * ahead
                left = 0.0 if left < 1e-12 else left
            now += left
    return now + max(0.0, backward_s - done)


def _rates(busy: float, capacity: float | None) -> tuple[float, float]:
    """How fast backward and a job beside it get on, 1 being as fast as alone; a scheduler gives both the same share."""
    if capacity is None or 1 + busy <= capacity:
        return 1.0, 1.0
    own = min(busy, max(capacity / 2, capacity - 1))
    return min(1.0, capacity - own), own / busy


def _outer_step(profile: Profile, setting: Setting, sent: float) -> Predicted:
    """A round of 1 / fragments of the parameters every H / fragments steps, of which D steps may pass beside it."""
    every, parameters = profile.every / profile.fragments, setting.parameters / profile.fragments
    codec = setting.codec(profile)
    jobs = _transfers(profile.phases, parameters, setting)
    net_s = sum(job.seconds for job in jobs)
    codec_s = codec.exchange(parameters / setting.slots) if setting.machines > 1 else 0.0
    inner_s = _with_backward(
        setting, setting.buckets, [[_inside(n, setting)] for n in setting.buckets], setting.overlap
    )
    waits_s = slowest_s(setting, 2 if jobs and profile.phases[0].operation == "send" else setting.machines, int(every))
    hidden_s = profile.delay * inner_s
    exposed_s = max(0.0, net_s - hidden_s) + codec_s
    return Predicted(inner_s + waits_s + exposed_s / every, inner_s, codec_s / every, net_s / every, sent)
