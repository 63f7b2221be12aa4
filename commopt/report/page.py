"""The report: one HTML page that needs no network, the pictures as files, and the results as JSON."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from commopt.errors import ConfigError, LaunchError
from commopt.record.words import times_text
from commopt.report import drawing, plots
from commopt.report.columns import NOTHING
from commopt.report.outer_plots import PICTURE_NAMES, outer_pictures
from commopt.report.outer_table import FAULT_COLUMNS, ROUND_COLUMNS, fault_cells, round_cells
from commopt.report.results import Cluster, Node, NodeBytes, Results, RunResult
from commopt.report.table import COLUMNS, cells, event_texts, loss_above_dense, readings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN_NODES = 8  # boxes in the drawing of a site, and rows of a run's byte counts
GOOD_LOSS = 0.02  # the headline prefers methods whose validation loss is at most this far above dense's
MODES = {
    "netns": "by the kernel: each node is a network namespace on this machine, and its interface is shaped to the link",
    "paced": "by pacing: a message is delivered no earlier than the link would have; the kernel shapes nothing",
    "none": "not at all: the links are those of the machines themselves",
}
PICTURES = (*plots.PLOTS, *PICTURE_NAMES)
FILES = ("results.json", "report.html", *(f"{name}.png" for name in PICTURES))


def write_report(results: Results, out_dir: Path) -> list[Path]:
    """Write results.json, report.html and the pictures in `out_dir`, each whole or not at all; returns their paths.

    A picture of an older report that this one has not is removed. Raises LaunchError for a file that cannot be written.
    """
    drawn = {name: draw(results) for name, draw in {**plots.PLOTS, **outer_pictures(results)}.items()}
    contents = {"results.json": results_json(results).encode(), "report.html": page(results).encode()}
    contents |= {f"{name}.png": drawing.png(figure) for name, figure in drawn.items()}
    path = out_dir
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            path = out_dir / name
            _write_whole(path, content)
        for path in (out_dir / f"{name}.png" for name in PICTURES if name not in drawn):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise LaunchError(f"{path}: cannot be written: {(error.strerror or str(error)).lower()}") from None
    return [out_dir / name for name in contents]


def results_json(results: Results) -> str:
    """The results document, with a line end."""
    return results.model_dump_json(indent=1) + "\n"


def read_results(path: Path) -> Results:
    """The document that `write_report` wrote. Raises ConfigError if the file is not such a document."""
    from pydantic import ValidationError

    try:
        return Results.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{path}: is not a results document: {where + ': ' if where else ''}{first['msg']}") from None


def page(results: Results) -> str:
    """The HTML page: the pictures are inline, and there is no script."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pictures, outer = (
        {name: _inline(draw, results) for name, draw in which.items()}
        for which in (plots.PLOTS, outer_pictures(results))
    )
    return environment.get_template("page.html").render(
        results=results,
        headline=headline(results),
        columns=COLUMNS,
        rows=list(zip(results.runs, cells(results), strict=True)),
        nothing=NOTHING,
        readings=list(zip(results.runs, readings(results), strict=True)),
        pictures=pictures,
        outer_pictures=outer,
        round_columns=ROUND_COLUMNS,
        round_rows=list(zip([run for run in results.runs if run.rounds], round_cells(results), strict=True)),
        fault_columns=FAULT_COLUMNS,
        fault_rows=[(run, fault_cells(run)) for run in results.runs if run.faults],
        palette=drawing.DARK,
        run_colours=drawing.colours(results),
        sites=sites(results.cluster),
        link=link_text,
        mode=MODES.get(results.cluster.emulation, results.cluster.emulation),
        event_texts=event_texts,
        checked_nodes=checked_nodes,
        options_text=options_text,
        parameters=None if results.model.parameters is None else f"{results.model.parameters:,}",
    )


def _inline(draw: Callable[[Results], Figure], results: Results) -> str:
    return drawing.svg(draw(results), (draw.__doc__ or draw.__name__).splitlines()[0])


def headline(results: Results) -> str:
    """The comparison in a few words: the largest gain over dense, or what kept it from being told."""
    finished = [run for run in results.runs if run.status == "finished"]
    if not finished:
        return "No run finished"
    dense = results.dense
    rivals = [
        run
        for run in finished
        if run.method != "dense" and run.speedup_vs_dense is not None and None not in run.train_loss
    ]
    if dense is None or not rivals:
        return f"{', '.join(run.name for run in results.runs)} on {results.cluster.name}"
    good = [run for run in rivals if (loss_above_dense(run, dense) or 0.0) <= GOOD_LOSS]
    best = max(good or rivals, key=lambda run: run.speedup_vs_dense or 0.0)
    if (best.speedup_vs_dense or 0.0) < 1.03:
        return f"No method beat dense on {results.cluster.name}"
    above = loss_above_dense(best, dense)
    loss = "" if above is None else f", val loss {abs(above) * 100:.1f} % {'above' if above > 0 else 'below'}"
    return f"{best.name}: steps {times_text(best.speedup_vs_dense or 0.0)} faster than dense{loss}"


def checked_nodes(run: RunResult) -> list[tuple[str, NodeBytes]]:
    """The nodes whose two byte counts are shown, with their names: of many, the one that is farthest from 1."""
    if len(run.nodes) <= SHOWN_NODES:
        return [(node.node, node) for node in run.nodes]
    farthest = max(run.nodes, key=lambda node: abs((1.0 if node.ratio is None else node.ratio) - 1))
    return [(f"{farthest.node}, the farthest of {len(run.nodes)}", farthest)]


def options_text(run: RunResult) -> str:
    """`warmup: 24, scale: l2`, or `defaults`."""
    return ", ".join(f"{key}: {_word(value)}" for key, value in run.options.items()) or "defaults"


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


@dataclass(frozen=True)
class Box:
    """One box of the drawing: a node, or several that are alike."""

    name: str
    nodes: int
    ranks: int
    link: str


@dataclass(frozen=True)
class Site:
    """The boxes on one switch; `name` is None where there are no sites."""

    name: str | None
    boxes: Sequence[Box]


def sites(cluster: Cluster) -> list[Site]:
    """What the drawing shows: every node, or neighbours that are alike in one box where there are many."""
    by_site: dict[str | None, list[Node]] = {}
    for node in cluster.nodes:
        by_site.setdefault(node.site, []).append(node)
    return [Site(name, _boxes(nodes, SHOWN_NODES // len(by_site))) for name, nodes in by_site.items()]


def _boxes(nodes: Sequence[Node], limit: int) -> list[Box]:
    groups: list[list[Node]] = []
    for node in nodes:
        alike = groups and (groups[-1][0].ranks, link_text(groups[-1][0])) == (node.ranks, link_text(node))
        if alike and len(nodes) > limit:
            groups[-1].append(node)
        else:
            groups.append([node])
    return [
        Box(
            group[0].name if len(group) == 1 else f"{group[0].name} … {group[-1].name}",
            len(group),
            group[0].ranks,
            link_text(group[0]),
        )
        for group in groups
    ]


def link_text(node: Node) -> str:
    """`50mbit, 1ms`: the link in tc's units, or `unlimited`."""
    parts = [
        node.rate or "unlimited",
        node.delay and f"{node.delay} delay",
        node.jitter and f"±{node.jitter}",
        node.loss and f"{node.loss} loss",
    ]
    return ", ".join(part for part in parts if part)


def _write_whole(path: Path, content: bytes) -> None:
    """Write beside the file and rename, so that a reader never sees half of it."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def schema() -> Mapping[str, Any]:
    """The JSON schema of the results document, every field described."""
    return Results.model_json_schema(by_alias=True)
