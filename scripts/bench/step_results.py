"""What the stored cells of step.py say: floors, ratios, targets, tables, and where the time of a profiled step goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from command import Report
from emulated import BUSY_CORES
from rich.text import Text
from sheets import Sheet, judged

from commopt.plan.links import parse_rate
from commopt.record.words import bytes_text, milliseconds, seconds_text

PEERS = (
    "torch_ddp", "torch_fp16", "torch_powersgd", "torch_powersgd_one_bucket", "torch_post_localsgd", "decent_dp",
    "deepspeed_onebit_adam", "grace_top_k", "public_lion", "public_demo", "hivemind_8bit",
)  # fmt: skip
BASELINE = "torch_ddp"
TARGET = 1.15  # over max(compute, floor), and unshaped over torch DDP, where each rank has a core
WITHOUT_TARGET = (
    "dense",
    "fp16",
    "dice_sgd",
    *PEERS,
)  # others send signs, few values, low ranks, or at most 8 bits of each
HEADINGS = ("step\nms", "compute\nms", "floor\nms", "ratio", "x DDP", "interface\nper step", "payload\nper step")

Result = Mapping[str, Any]  # a stored cell


def floor_s(result: Result) -> float | None:
    """Seconds that the link needs for a step's bytes: of the node and direction with most; None where not limited or counted."""
    nodes, rate = result.get("interface_bytes") or {}, result.get("rate")
    counts = [count for node in nodes.values() for count in (node["sent"], node["received"]) if count is not None]
    return max(counts) / parse_rate(rate) if rate and counts else None


def ratio_to_floor(result: Result) -> float | None:
    """step / max(compute, floor), on shaped links."""
    floor, step_s, compute_s = floor_s(result), result.get("step_s"), result.get("compute_s")
    return step_s / max(compute_s, floor) if floor and step_s and compute_s else None


def ratio_to_ddp(result: Result, baseline: Result | None) -> float | None:
    """The step over torch DDP's."""
    step_s, other_s = result.get("step_s"), (baseline or {}).get("step_s")
    return step_s / other_s if step_s and other_s else None


def verdict(result: Result, baseline: Result | None) -> tuple[float, bool] | None:
    """The target that a cell has, and whether it is met; None where it has none, or no number."""
    if result["method"] in PEERS or nodes_of(result) > result["environment"]["cpu_count"]:
        return None
    if result["rate"] is None:
        ratio = ratio_to_ddp(result, baseline)
    else:
        ratio = None if result["method"] in WITHOUT_TARGET else ratio_to_floor(result)
    return None if ratio is None else (TARGET, ratio <= TARGET)


def nodes_of(result: Result) -> int:
    """How many nodes the cluster of a cell has; cells of long ago don't say it, and had four."""
    return int(result.get("nodes", 4))


def is_uneven(result: Result) -> bool:
    """Whether a median hides that some steps communicate and others do not."""
    step_s, mean_s = result.get("step_s"), result.get("step_mean_s")
    return bool(step_s and mean_s and abs(mean_s / step_s - 1) > 0.2)


def is_disturbed(result: Result) -> bool:
    """Whether other programs used the cores meanwhile."""
    return float(result.get("others_cores") or 0.0) > BUSY_CORES


def report(results: Sequence[Result]) -> Report:
    """One table for each cluster and model, and the remarks."""
    if not results:
        return Report([])
    places = dict.fromkeys((one["cluster"], one["model"]) for one in results)
    sheets = [sheet([one for one in results if (one["cluster"], one["model"]) == place]) for place in places]
    return Report(sheets, remarks(results))


def sheet(results: Sequence[Result]) -> Sheet:
    """The stored cells of one cluster and model."""
    first = results[0]
    baseline = next((one for one in results if one["method"] == BASELINE), None)
    parameters = next((one["parameters"] for one in results if one.get("parameters")), None)
    size = f"{parameters / 1e6:.2f} M parameters" if parameters else first["model"]
    title = f"{nodes_of(first)} nodes, {first['rate'] or 'unshaped'}, GPT of {size}"
    rows = [row_of(one, baseline) for one in results]
    return Sheet(title, ("method", *HEADINGS, "target"), rows, left=("method", "target"))


def overview(results: Sequence[Result]) -> list[Sheet]:
    """For each model a table of steps by method and cluster, with what there are targets for: over max(compute, floor), or over DDP."""
    clusters = dict.fromkeys((one["cluster"], one["rate"]) for one in results)
    sheets = []
    for model in dict.fromkeys(one["model"] for one in results):
        own = {(one["method"], one["cluster"]): one for one in results if one["model"] == model}
        rows: list[list[str | Text]] = []
        for method in dict.fromkeys(name for name, _ in own):
            cells = [(own.get((method, name)), own.get((BASELINE, name))) for name, _ in clusters]
            rows.append([f"`{method}`", *(_said(one, baseline) for one, baseline in cells)])
        sizes = [one["parameters"] for one in own.values() if one["parameters"]]
        size = f"GPT of {max(sizes, default=0) / 1e6:.2f} M parameters"
        title = f"{nodes_of(results[0])} nodes with a core each, {size}: ms a step, and its ratio"
        sheets.append(
            Sheet(title, ("method", *(rate or "unshaped, over DDP" for _, rate in clusters)), rows, left=("method",))
        )
    return sheets


def _said(one: Result | None, baseline: Result | None) -> str:
    if one is None or not one.get("step_s"):
        return "" if one is None else "failed"
    ratio = ratio_to_ddp(one, baseline) if one["rate"] is None else ratio_to_floor(one)
    return _text(one["step_s"], milliseconds) + ("" if ratio is None else f", {ratio:.2f}")


def row_of(one: Result, baseline: Result | None) -> list[str | Text]:
    name = Text(f"{one['method']} *", "dim") if one["method"] in PEERS else Text(one["method"], "bold")
    if one["status"] != "finished":
        return [name, Text("failed", "bold red"), *[""] * len(HEADINGS)]
    target, is_met = verdict(one, baseline) or (0.0, None)
    said = f"<= {target:.2f} {'met' if is_met else 'missed'}{' ?' * is_disturbed(one)}" if target else ""
    return [
        name,
        _text(one.get("step_s"), milliseconds) + ("~" if is_uneven(one) else ""),
        _text(one.get("compute_s"), milliseconds),
        _text(floor_s(one), milliseconds),
        _text(ratio_to_floor(one), "{:.2f}".format),
        _text(ratio_to_ddp(one, baseline), "{:.2f}".format),
        _text(busiest_bytes(one), bytes_text),
        _text(one.get("payload_bytes"), bytes_text),
        judged(said, is_met),
    ]


def _text(value: float | None, form: Callable[[float], str]) -> str:
    return "-" if value is None else form(value)


def busiest_bytes(result: Result) -> float | None:
    """Bytes per step on the interface and in the direction with most."""
    nodes = result.get("interface_bytes") or {}
    return max((n for node in nodes.values() for n in node.values() if n is not None), default=None)


def remarks(results: Sequence[Result]) -> list[str]:
    """What the tables do not show, in sentences."""
    lines = [f"{one['name']} failed: {one['failure']}" for one in results if one["status"] != "finished"]
    for one in results:
        if one["status"] == "finished" and one.get("step_s") is None:
            lines.append(f"{one['name']}: no step was past the method's warm-up")
        if is_uneven(one):
            mean_ms = milliseconds(one["step_mean_s"])
            lines.append(f"~ {one['name']}: its steps are not alike, and take {mean_ms} ms on average")
        lines += [
            f"{one['name']}: {text}" for text in one.get("events", [])
        ]  # void buckets, replicas that have drifted
    if any(one["method"] in PEERS for one in results):
        hooks = "no hook, fp16_compress_hook, and powerSGD_hook of rank 1"
        lines.append(
            f"* peers: torch's own, in DDP's default buckets unless named otherwise, are {hooks}; others are in step_peers.py"
        )
    for nodes, cores in sorted({(nodes_of(one), one["environment"]["cpu_count"]) for one in results}):
        if nodes > cores:
            lines.append(f"{nodes} ranks shared {cores} cores: compute is that of a crowded machine.")
    disturbed = [one for one in results if is_disturbed(one)]
    if disturbed:
        most, who = max(one["others_cores"] for one in disturbed), ", ".join(one["name"] for one in disturbed)
        lines.append(f"? Not to be trusted, since other programs used up to {most:.1f} cores meanwhile: {who}")
    return lines


def outcome(result: Result) -> str:
    """A cell's result in a few words."""
    if result["status"] != "finished":
        return f"failed: {result['failure']}"
    parts = ["no steady step" if result["step_s"] is None else f"{seconds_text(result['step_s'])} a step"]
    if (ratio := ratio_to_floor(result)) is not None:
        parts.append(f"{ratio:.2f} x max(compute, floor)")
    if is_disturbed(result):
        parts.append(f"other programs on {result['others_cores']:.1f} cores")
    return ", ".join(parts)
