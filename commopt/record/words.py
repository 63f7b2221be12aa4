"""Quantities as text, with about three digits."""

import math
from collections.abc import Sequence


def seconds_text(seconds: float) -> str:
    """`131 ms`, `9.4 s`, `6 min 13 s`, `2 h 5 min`."""
    if seconds < 0.9995:
        return f"{milliseconds(seconds)} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def milliseconds(seconds: float) -> str:
    """Milliseconds without a unit: `1242`, `13.1`, `0.42`."""
    ms = seconds * 1e3
    return f"{ms:.0f}" if ms >= 99.95 else f"{ms:.1f}" if ms >= 9.995 else f"{ms:.2f}"


def megabytes(nbytes: float) -> str:
    """Megabytes (10^6) without a unit: `6.10`, `0.190`, `0.0042`."""
    mb = nbytes / 1e6
    if mb >= 9.995:
        return f"{mb:.1f}" if mb < 999.5 else f"{mb:,.0f}"
    return f"{mb:.2f}" if mb >= 0.9995 or mb == 0 else f"{mb:.3f}" if mb >= 0.09995 else f"{mb:.4f}"


def bytes_text(nbytes: float) -> str:
    """`6.1 MB`, `190 kB`, `830 B`; powers of ten."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if nbytes >= 0.9995 * factor:
            value = nbytes / factor
            return f"{value:.0f} {unit}" if value >= 99.5 else f"{value:.1f} {unit}"
    return f"{nbytes:.0f} B"


def rate_text(bytes_per_s: float) -> str:
    """`47.9 Mbit/s`, `10 Gbit/s`, `300 kbit/s`, `unlimited`."""
    if math.isinf(bytes_per_s):
        return "unlimited"
    bits = 8 * bytes_per_s
    for factor, unit in ((1e12, "Tbit/s"), (1e9, "Gbit/s"), (1e6, "Mbit/s")):
        if bits >= 0.9995 * factor:
            return f"{bits / factor:.3g} {unit}"
    return f"{bits / 1e3:.3g} kbit/s"


def times_text(ratio: float) -> str:
    """`9.5x`, `32x`, `0.80x`."""
    return f"{ratio:.0f}x" if ratio >= 19.5 else f"{ratio:.1f}x" if ratio >= 0.995 else f"{ratio:.2f}x"


def spread_text(spread: float) -> str:
    """A consensus distance in two digits: `0.013`, `0.50`, `2.1e-05`."""
    if spread >= 9.95 or spread == 0:
        return f"{spread:.0f}"
    return f"{spread:#.2g}" if spread >= 9.95e-5 else f"{spread:.1e}"


def fault_text(kind: str, names: Sequence[str], for_s: float | None, factor: float | None) -> str:
    """`node2 killed`, `node0 cut from node1 for 20 s`, `node3 slowed 5.0x`."""
    slowed = f"slowed {times_text(factor or 1.0)}"
    words = {"kill": "killed", "restart": "started again", "hang": "hung", "slow": slowed}
    done = f"{names[0]} cut from {names[-1]}" if kind == "cut" else f"{' and '.join(names)} {words.get(kind, kind)}"
    return done if for_s is None else f"{done} for {seconds_text(for_s)}"
