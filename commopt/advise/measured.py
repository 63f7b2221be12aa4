"""Settings for the model from what `commopt probe` has measured."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from commopt.plan.curve import Curve
from commopt.plan.model import NOTHING, Codec, Setting, Transport
from commopt.plan.probe import Probe
from commopt.plan.profile import Profile, sent_bytes

LOW, HIGH = 0.9, 1.2  # what measured times are multiplied by for the limits
FILLED = 0.9  # share of a link that exchanges fill, on one that is not the measured one


def settings_of(
    probe: Probe, compute_s: float, buckets: tuple[int, ...], *, overlap: bool = True
) -> dict[str, Setting]:
    """The low, likely and high setting on the machines that were measured."""
    likely = Setting(
        machines=len(probe.nodes),
        slots=probe.slots,
        compute_s=compute_s,
        buckets=buckets,
        transport=_transport(probe),
        codecs=_codecs(probe),
        copy_bytes_per_s=probe.copy_bytes_per_s,
        cores_per_rank=probe.cores_per_rank if probe.device == "cpu" else None,
        overlap=overlap,
    )
    return {"low": _scaled(likely, LOW), "likely": likely, "high": _scaled(likely, HIGH)}


def profiles_in(probe: Probe, profiles: Sequence[Profile]) -> list[Profile]:
    """The profiles, with what the methods send of the parameters of the script that was probed, if that is known."""
    own = {name: Profile.from_json(given) for name, given in probe.profiles.items()}
    return [replace(one, phases=own[one.name].phases) if one.name in own else one for one in profiles]


def at_rate(probe: Probe, likely: Setting) -> Callable[[float], Setting]:
    """The same machines on links of another rate: what a call needs beside its bytes stays, and so does its processor time."""
    known = [rate for rate in probe.rates.values() if rate is not None]
    measured = min(known, default=math.inf)
    ranks = len(probe.nodes)

    def setting(bytes_per_s: float) -> Setting:
        seconds = dict(likely.transport.seconds)
        for operation, calls in probe.exchanges.items():
            least_s = min(s for _, s, _ in calls)
            points = []
            for nbytes, s, busy in calls:
                if math.isinf(measured):
                    on_wire_s = sent_bytes(operation, nbytes, ranks) * probe.slots / (FILLED * bytes_per_s)
                    taken_s = max(s, least_s + on_wire_s)
                else:
                    taken_s = max(s * busy, least_s + (s - least_s) * measured / bytes_per_s)
                points.append((nbytes, taken_s))
            seconds[operation] = Curve(tuple(points))
        seconds["send"] = Curve.line(_latency_s(probe), probe.slots / (FILLED * bytes_per_s))
        return replace(likely, transport=replace(likely.transport, seconds=seconds))

    return setting


def _latency_s(probe: Probe) -> float:
    return max(pair.latency_s for pair in probe.pairs)


def _transport(probe: Probe) -> Transport:
    seconds: dict[str, Curve] = {key: Curve.of(calls) for key, calls in probe.exchanges.items()}
    busy: dict[str, Curve] = {key: Curve.of(calls, 2) for key, calls in probe.exchanges.items()}
    slowest = min(pair.bytes_per_s for pair in probe.pairs) / probe.slots
    seconds["send"] = Curve.line(_latency_s(probe), 1 / slowest)
    return Transport(seconds, busy, Curve.of(probe.inside) if probe.inside else NOTHING)


def _codecs(probe: Probe) -> Mapping[str, Codec]:
    """Each method's own costs; steps as what they take more than the user's optimizer, as under dense."""
    usual = Curve(tuple(probe.codecs["dense"].step)) if "dense" in probe.codecs else None
    made = {}
    for name, costs in probe.codecs.items():
        more = NOTHING
        if usual is not None and name != "dense":
            more = Curve(tuple((n, s - usual(n)) for n, s in costs.step))
        made[name] = Codec(Curve(tuple(costs.exchange)), more)
    return made


def _scaled(setting: Setting, by: float) -> Setting:
    codecs = {name: Codec(one.exchange.scaled(by), one.step) for name, one in setting.codecs.items()}
    return replace(setting, transport=setting.transport.scaled(by), codecs=codecs)
