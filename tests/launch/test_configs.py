"""Every file under configs/ is one that the commands accept."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import commopt
from commopt.choice import read_choice
from commopt.cli.training import check_methods, chosen_methods
from commopt.cluster.spec import load_cluster, load_run

CONFIGS = Path(__file__).parents[2] / "configs"
CLUSTERS = sorted((CONFIGS / "clusters").glob("*.yaml"))
RUNS = sorted((CONFIGS / "runs").glob("*.yaml"))
METHOD_FILES = sorted((CONFIGS / "methods").glob("*.yaml"))
assert CLUSTERS
assert RUNS
assert METHOD_FILES


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.name)
def test_a_cluster_can_be_loaded(path: Path) -> None:
    assert load_cluster(path).link_model().ranks == load_cluster(path).ranks
    assert len(path.read_text().splitlines()) < 30


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_a_run_can_be_loaded_and_its_methods_made(path: Path) -> None:
    run = load_run(path)
    check_methods(run, chosen_methods(run, []))
    program = run.program.read_text()
    assert [word for word in run.argument_words() if word.startswith("--") and not _is_taken(word[2:], program)] == []
    assert len(path.read_text().splitlines()) < 30


def _is_taken(name: str, program: str) -> bool:
    """Whether launch/train.py has this argument: named alone, or in its table of sizes."""
    return f'"--{name}"' in program or re.search(rf'"{re.escape(name)}": \d', program) is not None


@pytest.mark.parametrize("path", METHOD_FILES, ids=lambda path: path.name)
def test_a_method_file_is_named_after_the_method_that_it_makes(path: Path) -> None:
    _, options = read_choice(path)
    method = commopt.build(path)
    assert path.stem == "_".join([method.name, *([options["worker"]] if "worker" in options else [])])
    assert path.read_text().startswith("# ")
