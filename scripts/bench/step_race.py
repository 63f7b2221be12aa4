"""The race of step.py: who runs, with which options, and what the stored cells say: loss after equal time, table and figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command import Report
from emulated import BUSY_CORES
from rich.text import Text
from sheets import Sheet, figure
from step_results import BASELINE, PEERS, busiest_bytes, nodes_of

from commopt.record.words import bytes_text, milliseconds, seconds_text, times_text
from commopt.report import drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Result = Mapping[str, Any]  # a stored cell

SECONDS, QUICK_SECONDS, LOOKS = 25.0, 10.0, 10
EMBEDDING_STD = 0.2  # with which the model learns in fewer steps
FIRST_STEPS = 3  # before the first look
OUTER = {"every": 20, "delay": 10, "message": "int8"}
OURS: Mapping[str, Mapping[str, Any]] = {
    "dense": {},
    "ef_sign": {},
    "onebit_adam": {"freeze_step": 10},
    "powersgd": {"rank": 1, "start_step": 2},  # as torch's hook
    "local_sgd": OUTER,
    "diloco": OUTER,
    "noloco": OUTER,
}
THEIRS: Mapping[str, Mapping[str, Any]] = {
    "torch_ddp": {},
    "torch_fp16": {},
    "torch_powersgd_one_bucket": {},
    "torch_post_localsgd": {},
    "decent_dp": {},
    "deepspeed_onebit_adam": {"freeze_step": 10},
    "grace_top_k": {"compress_ratio": 0.01},
    "public_lion": {},
    "public_demo": {},
    "hivemind_8bit": {},
}
OPTIONS: Mapping[str, Mapping[str, Any]] = {**THEIRS, **OURS}
QUICK = ("torch_ddp", "torch_powersgd_one_bucket", "ef_sign", "local_sgd")
ADAMW: Mapping[str, Any] = {"name": "adamw", "lr": 2e-3, "betas": [0.9, 0.99], "weight_decay": 0.01}
OPTIMIZERS: Mapping[str, Mapping[str, Any]] = {  # others run with AdamW
    "public_lion": {"name": "lion", "lr": 5e-4},
    "public_demo": {"name": "sgd", "lr": 2e-3},
}
LABELS: Mapping[str, tuple[str, str]] = {  # who a peer is, and what runs
    "torch_ddp": ("torch DDP", "torch"),
    "torch_fp16": ("torch fp16 hook", "torch"),
    "torch_powersgd_one_bucket": ("torch PowerSGD hook, rank 1", "torch, one bucket"),
    "torch_post_localsgd": ("torch post-local SGD, every 4", "torch"),
    "decent_dp": ("Decent-DP, one-peer-exp", "its package"),
    "deepspeed_onebit_adam": ("DeepSpeed 1-bit Adam", "format re-implemented"),
    "grace_top_k": ("GRACE top-k, 1 %, residual", "format re-implemented"),
    "public_lion": ("public Distributed Lion, majority", "format re-implemented"),
    "public_demo": ("public DeMo, 32 of 64 x 64", "format re-implemented"),
    "hivemind_8bit": ("Hivemind, uniform 8-bit", "format re-implemented"),
}
GOALS = (("torch_ddp", 10.0), ("torch_fp16", 5.0))
PEER_GOAL = 3.0  # over the best peer
HEADINGS = (
    "method",
    "what runs",
    "step\nms",
    "speed-up\nover DDP",
    "interface\nper step",
    "steps",
    "loss",
    "s to\nDDP's loss",
)


def settings_of(method: str, seconds: float) -> dict[str, Any]:
    """What a cell of the race has instead of the other cells' settings."""
    return {
        "options": OPTIONS.get(method, {}),
        "optimizer": OPTIMIZERS.get(method, ADAMW),
        "steps": FIRST_STEPS,
        "seconds": seconds,
        "looks": LOOKS,
        "embedding-std": EMBEDDING_STD,
    }


# ---- what the cells say ----------------------------------------------------------------------------------------------


def curve_of(result: Result) -> list[tuple[float, float]]:
    """(seconds, loss) of each look; infinite where training has diverged."""
    return [(seconds, math.inf if loss is None else loss) for seconds, loss in result.get("curve") or []]


def loss_at(result: Result, seconds: float) -> float | None:
    """The loss after so many seconds of training, interpolated; the last look's if that was just before. Infinite: it has diverged."""
    curve = curve_of(result)
    for (start_s, before), (end_s, after) in pairwise(curve):
        if start_s <= seconds <= end_s:
            share = (seconds - start_s) / (end_s - start_s)
            return before + (after - before) * share if math.isfinite(before + after) else math.inf
    return curve[-1][1] if curve and curve[-1][0] > 0.8 * seconds else None


def seconds_to(result: Result, loss: float) -> float | None:
    """The seconds of training in which a loss was reached first, interpolated; None if it never was."""
    for (start_s, before), (end_s, after) in pairwise(curve_of(result)):
        if after <= loss < before < math.inf:
            return start_s + (end_s - start_s) * (before - loss) / (before - after)
    return None


def final_loss(result: Result) -> float | None:
    return loss_at(result, result["seconds"])


def step_s(result: Result) -> float:
    """The mean steady step; of all steps, if none is steady."""
    return float(result["step_mean_s"] or result["curve"][-1][0] / result["steps"])


def times_as_fast(result: Result, other: Result) -> float | None:
    """How many times as fast a cell reaches the loss that another one ends with."""
    loss = final_loss(other)
    reached_s = None if loss is None else seconds_to(result, loss)
    return other["seconds"] / reached_s if reached_s else None


def label_of(result: Result) -> str:
    method = str(result["method"])
    return LABELS[method][0] if method in LABELS else method


def is_ours(result: Result) -> bool:
    return result["method"] not in PEERS


def ranked(results: Sequence[Result]) -> list[Result]:
    """Those that finished, the lowest final loss first."""
    known = {id(one): loss for one in results if (loss := final_loss(one)) is not None}
    return sorted((one for one in results if id(one) in known), key=lambda one: known[id(one)])


def report(results: Sequence[Result]) -> Report:
    """A table for each race, and a figure of the first one."""
    if not results:
        return Report([])
    races = dict.fromkeys((one["cluster"], one["model"], one["seconds"]) for one in results)
    each = [[one for one in results if (one["cluster"], one["model"], one["seconds"]) == race] for race in races]
    lines = [line for own in each for line in remarks(own)]
    first = ranked(each[0])
    return Report([sheet(own) for own in each], lines, (lambda file: draw_figure(first, file)) if first else None)


def title_of(results: Sequence[Result]) -> str:
    first = results[0]
    parameters = next((one["parameters"] for one in results if one.get("parameters")), 0)
    return (
        f"{nodes_of(first)} nodes, {first['rate'] or 'unshaped'}, GPT of {parameters / 1e6:.2f} M parameters, "
        f"{first['seconds']:g} s of training each"
    )


def sheet(results: Sequence[Result]) -> Sheet:
    """A row for each method, the lowest loss first, and then what failed."""
    finished = ranked(results)
    baseline = next((one for one in finished if one["method"] == BASELINE), None)
    rows = [row_of(one, baseline) for one in finished]
    rows += [[*names_of(one), Text("failed", "bold red"), *[""] * 5] for one in results if one["status"] != "finished"]
    return Sheet(title_of(results), HEADINGS, rows, left=HEADINGS[:2])


def names_of(one: Result) -> list[str | Text]:
    if is_ours(one):
        options = ", ".join(f"{key} {value}" for key, value in one["settings"]["options"].items())
        return [Text(f"`{one['method']}`" + f" {options}" * bool(options), "bold"), "commopt"]
    return [Text(label_of(one), "dim"), LABELS.get(one["method"], ("", "torch"))[1]]


def row_of(one: Result, baseline: Result | None) -> list[str | Text]:
    faster = step_s(baseline) / step_s(one) if baseline else None
    nbytes, loss = busiest_bytes(one), final_loss(one)
    goal = final_loss(baseline) if baseline else None
    reached_s = one["seconds"] if one is baseline else None if goal is None else seconds_to(one, goal)
    return [
        *names_of(one),
        milliseconds(step_s(one)),
        "-" if faster is None else times_text(faster),
        "-" if nbytes is None else bytes_text(nbytes),
        str(one["steps"]),
        "-" if loss is None else f"{loss:.3f}" if math.isfinite(loss) else "diverged",
        "-" if reached_s is None else f"{reached_s:.1f}",
    ]


def remarks(results: Sequence[Result]) -> list[str]:
    """Whether the goals are met, by our method that is the first at a loss; and what the table does not show."""
    best = ranked(results)
    ours, theirs = [one for one in best if is_ours(one)], next((one for one in best if not is_ours(one)), None)
    against = [(next((one for one in best if one["method"] == name), None), goal) for name, goal in GOALS]
    lines = []
    for other, goal in [*against, (theirs, PEER_GOAL)]:
        if ours and other is not None:
            fastest = max(ours, key=lambda one: times_as_fast(one, other) or 0.0)
            lines.append(verdict(fastest, other, goal, is_best=other is theirs))
    lines += [f"{one['name']} failed: {one['failure']}" for one in results if one["status"] != "finished"]
    lines += [f"{one['name']}: {text}" for one in results for text in one.get("events", [])]
    disturbed = [one for one in results if float(one.get("others_cores") or 0.0) > BUSY_CORES]
    if disturbed:
        most, who = max(one["others_cores"] for one in disturbed), ", ".join(one["method"] for one in disturbed)
        lines.append(f"Not to be trusted, since other programs used up to {most:.1f} cores meanwhile: {who}.")
    return lines


def verdict(ours: Result, other: Result, goal: float, *, is_best: bool) -> str:
    """How many times as fast as another one our best method gets to its loss, beside the goal."""
    times, who = times_as_fast(ours, other), short_name(other) + " (the best peer)" * is_best
    if times is None:
        return f"`{ours['method']}` does not reach the final loss of {who}; goal {goal:g}x missed."
    step = step_s(other) / step_s(ours)
    return (
        f"`{ours['method']}` reaches the final loss of {who} in {seconds_text(ours['seconds'] / times)}, {times_text(times)} as fast, "
        f"goal {goal:g}x {'met' if times >= goal else 'missed'}. Its step is {times_text(step)} as fast."
    )


# ---- the figure ------------------------------------------------------------------------------------------------------


def draw_figure(results: Sequence[Result], file: Path) -> None:
    """Loss against seconds, and the step of each: ours in colours, torch DDP black, and other peers grey."""
    colours, first = colours_of(results), results[0]
    with figure(file, "The race: loss after equal time", 9.2, 2) as (above, below):
        drawing.entitle(above, f"{nodes_of(first)} nodes, {first['rate'] or 'unshaped'}: held-out loss")
        for one in results:
            seconds, losses = zip(*curve_of(one), strict=True)
            width = 1.9 if is_ours(one) else 1.1
            above.plot(seconds, losses, color=colours[one["name"]], linewidth=width, zorder=3 if is_ours(one) else 2)
        above.set_xlabel("seconds of training")
        above.set_xlim(0, first["seconds"])
        ends = [(short_name(one), colours[one["name"]], loss) for one in results if (loss := final_loss(one))]
        name_ends(above, [end for end in ends if math.isfinite(end[2])])
        drawing.entitle(below, "milliseconds a step")
        draw_steps(below, sorted(results, key=step_s), colours)


def short_name(result: Result) -> str:
    return label_of(result).partition(",")[0].replace(" hook", "")


def colours_of(results: Sequence[Result]) -> dict[str, str]:
    """By name: a colour for each of ours."""
    named = drawing.colours(
        [(one["name"], one["method"] + "_" * (one["method"] == "dense")) for one in results if is_ours(one)]
    )
    grey = {one["name"]: drawing.INK if one["method"] == BASELINE else drawing.DENSE_COLOUR for one in results}
    return grey | named


def name_ends(ax: Axes, ends: Sequence[tuple[str, str, float]]) -> None:
    """Name each line at the right of the frame, as near to its end as others leave room: (name, colour, y)."""
    low, high = ax.get_ylim()
    gap = (high - low) / 21
    ordered = sorted(ends, key=lambda end: end[2])
    places = list[float]()
    for _, _, y in ordered:
        places.append(max(y, places[-1] + gap) if places else y)
    for k, top in enumerate(high - gap * n for n in range(len(places))):  # too far up: down from the upper edge
        places[-1 - k] = min(places[-1 - k], top)
    for (name, colour, y), place in zip(ordered, places, strict=True):
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 0, "relpos": (0, 0.5)}
        ax.annotate(
            name, (1.0, y), (1.06, place), ax.get_yaxis_transform(), ax.get_yaxis_transform(), color=colour,
            va="center", fontsize=9.5, fontweight="bold", annotation_clip=False, arrowprops=line,
        )  # fmt: skip


def draw_steps(ax: Axes, results: Sequence[Result], colours: Mapping[str, str]) -> None:
    """A bar for each step, the fastest on top."""
    steps_ms = [step_s(one) * 1e3 for one in results]
    ax.barh(range(len(results)), steps_ms, color=[colours[one["name"]] for one in results], height=0.72)
    for place, (one, ms) in enumerate(zip(results, steps_ms, strict=True)):
        said, ink = f"{short_name(one)}  {milliseconds(ms / 1e3)}", drawing.INK
        drawing.note(ax, said, (ms, place), (5, 0), ink, va="center", fontsize=9.5)
    ax.set_xlim(0, max(steps_ms) * 1.02)
    ax.invert_yaxis()
    drawing.name_lanes(ax, [], [])
