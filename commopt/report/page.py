"""The report: one HTML page that needs no network, the pictures as files, and the results as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from commopt.errors import LaunchError
from commopt.record.words import times_text
from commopt.report import drawing, plots, table
from commopt.report.document import Cluster, Node, NodeBytes, Results, RunResult

if TYPE_CHECKING:
    from jinja2 import Template
    from matplotlib.figure import Figure

SHOWN_NODES = 8  # boxes in the drawing of a site, and rows of a run's byte counts
GOOD_LOSS = 0.02  # the headline prefers methods whose validation loss is at most this far above dense's
MODES = {
    "netns": "by the kernel: each node is a network namespace on this machine, and its interface is shaped to the link",
    "paced": "by pacing: a message is delivered no earlier than the link would have; the kernel shapes nothing",
    "none": "not at all: the links are those of the machines themselves",
}
PICTURES = {
    "loss_steps": plots.loss_against_steps,
    "loss_seconds": plots.loss_against_seconds,
    "bytes": plots.bytes_per_step,
    "step_time": plots.step_time,
    "spread": plots.spread_against_steps,
    "faults": plots.progress_under_faults,
}
FILES = ("results.json", "report.html", *(f"{name}.png" for name in PICTURES))


def write_report(results: Results, out_dir: Path) -> list[Path]:
    """Write results.json, report.html and the pictures in `out_dir`, each whole or not at all; returns their paths.

    Removes pictures that only an older report there had. Raises LaunchError for a file that cannot be written.
    """
    drawn = draw(results)
    contents = {"results.json": results_json(results).encode(), "report.html": page(results, drawn).encode()}
    contents |= {f"{name}.png": drawing.png(figure) for name, figure in drawn.items()}
    return write_all(out_dir, contents, stale=[f"{name}.png" for name in PICTURES if name not in drawn])


def write_all(out_dir: Path, contents: Mapping[str, bytes], stale: Sequence[str] = ()) -> list[Path]:
    """Write files into a folder, each whole or not at all, and remove the stale ones; returns the paths of those written.

    Raises LaunchError for a file that cannot be written.
    """
    path = out_dir
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            path = out_dir / name
            _write_whole(path, content)
        for path in (out_dir / name for name in stale):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise LaunchError(f"{path}: cannot be written: {(error.strerror or str(error)).lower()}") from None
    return [out_dir / name for name in contents]


def keep_last_good(results: Results, out_dir: Path) -> Path | None:
    """If a run failed, move a report whose runs all finished to `out_dir`/last-good; returns that folder if it did.

    Raises LaunchError if it cannot be moved.
    """
    try:
        before = json.loads((out_dir / "results.json").read_bytes())["runs"]
        is_good = all(run["status"] == "finished" for run in before)
    except (OSError, ValueError, KeyError, TypeError):  # there is none, or it is not a report
        return None
    if not is_good or all(run.status == "finished" for run in results.runs):
        return None
    kept = out_dir / "last-good"
    try:
        kept.mkdir(exist_ok=True)
        for path in (out_dir / name for name in FILES):
            if path.is_file():
                path.replace(kept / path.name)
    except OSError as error:
        raise LaunchError(f"{kept}: cannot be written: {(error.strerror or str(error)).lower()}") from None
    return kept


def results_json(results: Results) -> str:
    """The results document, with a line end."""
    return results.model_dump_json(indent=1) + "\n"


def draw(results: Results) -> dict[str, Figure]:
    """The pictures that these results have data for, by file name without suffix."""
    spreads = [point.spread for run in results.runs if run.rounds for point in run.rounds.spread]
    has = {"spread": any(spread > 0 for spread in spreads), "faults": results.has_faults}
    return {name: picture(results) for name, picture in PICTURES.items() if has.get(name, True)}


def page(results: Results, drawn: Mapping[str, Figure] | None = None) -> str:
    """The HTML page: the pictures are inline, and there is no script. drawn: the pictures, if they exist already."""
    called = (headline, table.event_texts, table.fault_row, checked_nodes, options_text, link_text, sites)
    labels = {name: (picture.__doc__ or name).splitlines()[0] for name, picture in PICTURES.items()}
    inline = {name: drawing.svg(figure, labels[name]) for name, figure in (drawn or draw(results)).items()}
    return template("page.html").render(
        {function.__name__: function for function in called},
        results=results,
        columns=table.COLUMNS,
        rows=list(zip(results.runs, table.cells(results), table.readings(results), strict=True)),
        nothing=table.NOTHING,
        pictures=inline,
        round_columns=table.ROUND_COLUMNS,
        round_rows=list(zip([run for run in results.runs if run.rounds], table.round_cells(results), strict=True)),
        fault_columns=table.FAULT_COLUMNS,
        palette=drawing.DARK,
        run_colours=drawing.run_colours(results),
        mode=MODES.get(results.cluster.emulation, results.cluster.emulation),
    )


def template(name: str) -> Template:
    """A page's template, beside this file."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(name)


def headline(results: Results) -> str:
    """The comparison in a few words: the largest gain over dense, or why there is none."""
    finished = [run for run in results.runs if run.status == "finished"]
    if not finished:
        return "No run finished"
    dense = results.dense
    rivals = [run for run in finished if run.method != "dense" and run.speedup_vs_dense and None not in run.train_loss]
    if dense is None or not rivals:
        return f"{', '.join(run.name for run in results.runs)} on {results.cluster.name}"
    good = [run for run in rivals if (table.loss_above_dense(run, dense) or 0.0) <= GOOD_LOSS]
    best = max(good or rivals, key=lambda run: run.speedup_vs_dense or 0.0)
    if (best.speedup_vs_dense or 0.0) < 1.03:
        return f"No method beat dense on {results.cluster.name}"
    above = table.loss_above_dense(best, dense)
    loss = "" if above is None else f", {table.loss_text(best, above)}"
    return f"{best.name}: steps {times_text(best.speedup_vs_dense or 0.0)} faster than dense{loss}"


def checked_nodes(run: RunResult) -> list[tuple[str, NodeBytes]]:
    """The nodes whose byte counts are shown, with their names; of more than SHOWN_NODES, the one whose ratio is farthest from 1."""
    if len(run.nodes) <= SHOWN_NODES:
        return [(node.node, node) for node in run.nodes]
    farthest = max(run.nodes, key=lambda node: abs((1.0 if node.ratio is None else node.ratio) - 1))
    return [(f"{farthest.node}, the farthest of {len(run.nodes)}", farthest)]


def options_text(run: RunResult) -> str:
    """`warmup: 24, scale: l2`, or `defaults`."""
    words = {key: v if isinstance(v, str) else json.dumps(v, default=str) for key, v in run.options.items()}
    return ", ".join(f"{key}: {word}" for key, word in words.items()) or "defaults"


def sites(cluster: Cluster) -> dict[str | None, list[list[Node]]]:
    """The boxes drawn on the switch of each site (None: no sites): one per node or, of many, per group of equal neighbours."""
    by_site: dict[str | None, list[Node]] = {}
    for node in cluster.nodes:
        by_site.setdefault(node.site, []).append(node)
    is_large = max(map(len, by_site.values()), default=0) > SHOWN_NODES // max(1, len(by_site))
    alike = (lambda node: (node.ranks, link_text(node))) if is_large else (lambda node: node.name)
    return {site: [list(boxed) for _, boxed in groupby(nodes, key=alike)] for site, nodes in by_site.items()}


def link_text(node: Node) -> str:
    """`50mbit, 1ms`: the link in tc's units, or `unlimited`."""
    extras = {"{} delay": node.delay, "±{}": node.jitter, "{} loss": node.loss}
    return ", ".join([node.rate or "unlimited", *(text.format(value) for text, value in extras.items() if value)])


def _write_whole(path: Path, content: bytes) -> None:
    """Write a temporary file beside it and rename that, so that a reader never sees half a file."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
