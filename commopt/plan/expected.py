"""Which exchange is fastest, from steps that were timed under one of them; torch-free, as the model of a step."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from commopt.plan.curve import Curve
from commopt.plan.model import Codec, Setting, Transport, predict
from commopt.plan.profile import Profile, sent_bytes


@dataclass(frozen=True)
class Measured:
    """A step, in seconds: all of it, what it waited for exchanges, and how long these took, beside backward or not."""

    step_s: float
    waited_s: float
    exchange_s: float

    @property
    def shown(self) -> float:
        """The share of the exchanges that was waited for, 0 to 1."""
        return min(1.0, self.waited_s / self.exchange_s) if self.exchange_s > 0 else 0.0

    @property
    def least_s(self) -> float:
        """The step if exchanges took no time."""
        return self.step_s - self.shown * self.exchange_s


@dataclass(frozen=True)
class Work:
    """What a rank exchanges in a step. buckets: elements, in the order of release. cores: for a rank's backward and its codec; None
    if they do not share any.
    """

    machines: int
    buckets: tuple[int, ...]
    cores: float | None = 1.0


def predicted(
    measured: Measured, current: str, profiles: Mapping[str, Profile], codec_s: Mapping[str, float], work: Work
) -> dict[str, float]:
    """Seconds of a step under each profile, from a measured one under `current`.

    codec_s: what the exchange of all buckets takes without a network. The model of a step is fitted to what was measured.
    """
    elements, transfer_s = sum(work.buckets), max(0.0, measured.exchange_s - codec_s[current])
    sent = profiles[current].bytes_per_parameter(work.machines) * elements
    hidden = codec_s[current] * (1 - measured.shown) if work.cores is not None else 0.0  # took backward's processor
    seconds: dict[str, Curve] = {
        phase.operation: Curve.line(0.0, transfer_s / sent * sent_bytes(phase.operation, 1.0, work.machines))
        for profile in profiles.values()
        for phase in profile.phases
    }
    setting = Setting(
        machines=work.machines,
        slots=1,
        compute_s=max(1e-9, measured.least_s - hidden),
        buckets=work.buckets,
        transport=Transport(seconds),
        codecs={name: Codec(Curve.line(0.0, codec_s[name] / elements)) for name in profiles},
        cores_per_rank=work.cores,
        overlap=measured.shown < 0.95,
    )
    setting = _fitted(profiles[current], setting, measured.step_s)
    model = {name: predict(profile, setting).step_s for name, profile in profiles.items()}
    return {name: measured.step_s * step_s / model[current] for name, step_s in model.items()}


def _fitted(profile: Profile, setting: Setting, step_s: float) -> Setting:
    """The setting with transfers so much shorter that the model's step is no longer than the measured one: some of what an exchange
    took beside backward was waiting for it, or for others.
    """

    def scaled(by: float) -> Setting:
        return replace(setting, transport=setting.transport.scaled(by))

    low, high = 0.0, 1.0
    for _ in range(20 if predict(profile, setting).step_s > step_s else 0):
        middle = (low + high) / 2
        fits = predict(profile, scaled(middle)).step_s <= step_s
        low, high = (middle, high) if fits else (low, middle)
    return scaled(high)


def next_choice(
    measured: Mapping[str, float], expected: Mapping[str, float], weights: Mapping[str, float]
) -> tuple[str, bool]:
    """(what to exchange by from now on, whether that is still to be timed): the least of seconds x weight, the first of equals.

    measured: seconds of a step under the candidates that were timed. expected: those of others, for which the model stands.
    """
    seconds = {name: measured.get(name, expected.get(name, math.inf)) * weight for name, weight in weights.items()}
    choice = min(seconds, key=lambda name: (seconds[name], name not in measured))
    return choice, choice not in measured
