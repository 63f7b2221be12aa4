"""Other simulators' assumptions, to check ours against what they have published."""

import math
from dataclasses import dataclass, replace

from commopt.errors import ConfigError


@dataclass(frozen=True)
class StreamingDiLoCo:
    """One replica layer by layer, as Douillard et al. 2025, arXiv:2501.18512, simulate theirs: no latency, links filled wholly.

    A layer's part of an exchange is ready when backward has passed it. All parts go through one queue in that order, and take
    2 (1 - 1/replicas) x bits / rate. The forward pass waits for a layer's part if it is due: in the next step, or overlap_steps later.

    bits: of a parameter in an exchange. every: steps between exchanges of a parameter. fragments: of every fragments-th layer each,
    sent at equal distances. The defaults are what reproduces the paper's Table 4: two replicas, bf16, and twice as long a backward
    as a forward pass; the paper does not say all of it, and its text and its web page differ (128 buckets for any model there).
    """

    parameters: float
    layers: int
    step_s: float
    every: int = 1
    fragments: int = 1
    overlap_steps: int = 0
    bits: float = 16.0
    replicas: int = 2
    backward: float = 2 / 3

    def utilisation(self, bits_per_s: float) -> float:
        """Share of the time in which the replica computes, once the queue repeats itself every `every` steps."""
        message_s = 2 * (1 - 1 / self.replicas) * self.bits * self.parameters / self.layers / bits_per_s
        forward_s, backward_s = (1 - self.backward) * self.step_s, self.backward * self.step_s
        sent_at = {index * self.every // self.fragments: index for index in range(self.fragments)}
        due: dict[int, list[tuple[int, float]]] = {}  # step: layers, from the input on, and when their parts have come
        clock_s = free_s = start_s = 0.0
        period = max(self.every, 2 + self.overlap_steps)
        for step in range(2 * period):
            if step == period:
                start_s = clock_s
            late_s = (done_s - layer / self.layers * forward_s - clock_s for layer, done_s in due.pop(step, ()))
            clock_s += max((0.0, *late_s)) + forward_s
            if (fragment := sent_at.get(step % self.every)) is not None:
                parts = due.setdefault(step + 1 + self.overlap_steps, [])
                for layer in reversed(range(fragment, self.layers, self.fragments)):
                    ready_s = clock_s + (1 - layer / self.layers) * backward_s
                    free_s = max(free_s, ready_s) + message_s
                    parts.append((layer, free_s))
            clock_s += backward_s
        return period * self.step_s / (clock_s - start_s)

    def needed_bits_per_s(self, utilisation: float) -> float:
        """The lowest rate, to 1 %, at which the replica computes for this share of the time. Raises ConfigError."""
        if not 0 < utilisation < 1:
            raise ConfigError(f"utilisation: {utilisation} is out of range; write a share between 0 and 1")
        low, high = 1e3, 1e15
        while high / low > 1.01:
            middle = math.sqrt(low * high)
            low, high = (low, middle) if self.utilisation(middle) >= utilisation else (middle, high)
        return high


# Table 4's models, in fragments of three layers where there are any
STREAMING_DILOCO_MODELS = {
    "1B": StreamingDiLoCo(1e9, 24, 0.1),
    "10B": StreamingDiLoCo(1e10, 48, 0.8),
    "100B": StreamingDiLoCo(1e11, 108, 4.9),
}


def streaming_diloco(model: str, method: str) -> StreamingDiLoCo:
    """The settings of a row of Table 4: "data parallel", "diloco", "streaming", "overlap" or "fp4". Raises KeyError."""
    replica = STREAMING_DILOCO_MODELS[model]
    diloco = replace(replica, every=100)
    streaming = replace(diloco, fragments=replica.layers // 3)
    overlap = replace(streaming, overlap_steps=1)
    rows = {"data parallel": replica, "diloco": diloco, "streaming": streaming}
    return {**rows, "overlap": overlap, "fp4": replace(overlap, bits=4.0)}[method]
