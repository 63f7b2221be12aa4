"""What a probe has found, in a few tables."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from commopt.plan.probe import Probe
from commopt.plan.profile import sent_bytes
from commopt.record.words import bytes_text, rate_text, seconds_text, times_text
from commopt.report.table import columns_of

if TYPE_CHECKING:
    from rich.table import Table

_MOST_ROWS = 12
_SHOWN_BYTES = 1 << 20  # of an exchange
_SMALLEST = 1 << 10
_SLOWEST = 5


def show(probe: Probe, stream: TextIO) -> None:
    """Print the links, the share of them that exchanges reach, the slowest methods, and the script's own times."""
    from rich.console import Console

    console = Console(file=stream, highlight=False, soft_wrap=True)
    for title, table in (_links(probe), _exchanges(probe), _codecs(probe)):
        console.print(f"\n[bold]{title}[/bold]")
        console.print(table)
    if probe.script is not None:
        script = probe.script
        overlap = "exchanged during backward" if script.overlap else "exchanged after backward"
        parts = f"{len(script.buckets)} bucket{'s' * (len(script.buckets) != 1)}, {overlap}"
        console.print(f"\n[bold]{Path(script.program).name}[/bold]: {script.parameters:,} parameters in {parts}")
        spread = f"{script.spread:.0%} spread between steps and ranks"
        console.print(f"a step takes {seconds_text(script.compute_s)} without communication ({spread})")
    console.print()


def _links(probe: Probe) -> tuple[str, Table]:
    rate = {(pair.source, pair.to): pair.bytes_per_s for pair in probe.pairs}
    pairs = sorted(probe.pairs, key=lambda pair: min(pair.bytes_per_s, rate[pair.to, pair.source]))
    seen: dict[frozenset[str], tuple[str, ...]] = {}
    for pair in sorted(pairs[: 2 * _MOST_ROWS], key=lambda pair: (probe.nodes.index(pair.source), pair.to)):
        said = [value for name in (pair.source, pair.to) if (value := probe.rates.get(name)) is not None]
        there, back = pair.bytes_per_s, rate[pair.to, pair.source]
        seen.setdefault(
            frozenset((pair.source, pair.to)),
            (
                f"{pair.source} - {pair.to}",
                seconds_text(pair.latency_s),
                rate_text(there),
                rate_text(back),
                rate_text(min(said)) if said else "-",
            ),
        )
    left = len(pairs) // 2 - len(seen)
    title = "Links, one pair at a time" + (f"; {left} faster pairs are in the file" if left > 0 else "")
    return title, columns_of(("nodes", "latency", "there", "back", "in the file"), list(seen.values()))


def _exchanges(probe: Probe) -> tuple[str, Table]:
    """The largest exchange of up to 1 MB, and the share of the slowest link that it uses."""
    machines, link = len(probe.nodes), min(pair.bytes_per_s for pair in probe.pairs)
    rows = []
    for operation, points in probe.exchanges.items():
        nbytes, seconds, busy = next((p for p in reversed(points) if p[0] <= _SHOWN_BYTES), points[0])
        share = probe.slots * sent_bytes(operation, nbytes, machines) / seconds / link
        times = (seconds_text(seconds), seconds_text(points[0][1]))
        rows.append((operation, bytes_text(nbytes), *times, f"{share:.0%}", f"{busy:.0%}"))
    title = f"Exchanges among {machines} machines; if all send at once, each sends {rate_text(min(probe.together.values()))}"
    return title, columns_of(
        ("exchange", "of", "takes", f"{bytes_text(_SMALLEST)} takes", "of the link", "of the processor"), rows
    )


def _codecs(probe: Probe) -> tuple[str, Table]:
    times = {name: (costs.exchange[-1], costs.step[-1]) for name, costs in probe.codecs.items()}
    slowest = sorted(times, key=lambda name: -times[name][0][1])[:_SLOWEST]
    elements = max((point[0] for point, _ in times.values()), default=0)
    copy_s = 4 * elements / probe.copy_bytes_per_s
    rows = []
    for name in slowest:
        (_, own_s), (_, step_s) = times[name]
        rows.append((name, seconds_text(own_s), times_text(own_s / copy_s), seconds_text(step_s)))
    title = (
        f"Slowest of {len(times)} methods without a network, for {elements / 1e6:.1f} M parameters on {probe.device}"
    )
    return title, columns_of(("method", "exchange", "in copies", "step"), rows)
