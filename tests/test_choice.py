"""Naming a method by a word, a block or a file, the same everywhere; and attaching it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rig import make_model

import commopt
from commopt import attach, build
from commopt.choice import read_choice
from commopt.cluster.spec import load_run
from commopt.errors import ConfigError
from commopt.frameworks.plain import PlainRun
from commopt.methods import EFSign, resolve
from commopt.run.outer import OuterRun

ROOT = Path(commopt.__file__).parent.parent


@pytest.mark.parametrize(
    "choice",
    [
        {"name": "top_k", "density": 0.02},
        {"method": "top_k", "density": 0.02},
        {"top_k": {"density": 0.02}},
        {"method": {"name": "top_k", "density": 0.02}},
    ],
)
def test_every_form_of_a_block_names_the_same_method(choice: dict[str, Any]) -> None:
    assert read_choice(choice) == ("top_k", {"density": 0.02})
    made: Any = build(choice)
    assert (made.name, made.compressor.density) == ("top_k", 0.02)


@pytest.mark.parametrize(
    ("text", "suffix"),
    [
        ("method: {name: top_k, density: 0.02}", "yaml"),
        ("method: top_k\ndensity: 0.02", "yml"),
        ('{"method": {"top_k": {"density": 0.02}}}', "json"),
    ],
)
def test_a_file_holds_a_block(tmp_path: Path, text: str, suffix: str) -> None:
    file = tmp_path / f"method.{suffix}"
    file.write_text(text)
    assert read_choice(file) == read_choice(str(file)) == ("top_k", {"density": 0.02})


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        (7, "method: got int, expected a name, a block, a file or a commopt.Method"),
        (build, "method: got function, expected a name, a block"),
        ({}, "names no method"),
        ({"density": 0.1}, "names no method"),
        ({"name": 3}, "3 is not a method's name"),
        ({"name": "dgc", "densty": 0.1}, r"method dgc: unknown option 'densty'; did you mean 'density'\?"),
        ("dcg", r"unknown method 'dcg'; did you mean 'dgc'\?"),
        ("nowhere.yaml", "no such file"),
    ],
)
def test_what_is_no_choice_is_refused_with_what_to_write(choice: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build(choice)


def test_a_run_takes_the_same_block(tmp_path: Path) -> None:
    text = f"cluster: {ROOT}/configs/clusters/four-50mbit.yaml\nprogram: {ROOT}/launch/train.py\n"
    run = tmp_path / "run.yaml"
    for block in ("{name: dgc, density: 0.01}", "{dgc: {density: 0.01}}", "method.yaml"):
        (tmp_path / "method.yaml").write_text("method: {name: dgc, density: 0.01}")
        run.write_text(f"{text}method: {block}\n")
        assert load_run(run).methods == {"dgc": {"density": 0.01}}
    run.write_text(f"{text}method: dgc\nmethods: {{dense: {{}}}}\n")
    with pytest.raises(ConfigError, match=r"run\.yaml: method: stands beside methods; write one of the two"):
        load_run(run)
    run.write_text(f"{text}method: [dgc]\n")
    with pytest.raises(ConfigError, match=r"run\.yaml: method: \['dgc'\] is not a method"):
        load_run(run)


def test_options_add_to_a_block() -> None:
    made: Any = build({"name": "top_k", "density": 0.02}, density=0.03)
    assert made.compressor.density == 0.03


# -- attach


def test_attach_takes_names_blocks_files_classes_and_methods() -> None:
    file = ROOT / "configs" / "methods" / "ef_sign.yaml"
    choices: list[Any] = ["ef_sign", {"name": "ef_sign"}, file, EFSign, build("ef_sign")]
    for choice in choices:
        model = make_model()
        run = attach(model, choice, torch.optim.SGD(model.parameters(), lr=0.1))
        assert isinstance(run, PlainRun)
        assert run.method.name == "ef_sign"


def test_a_gradient_or_an_outer_method_leaves_the_optimizer() -> None:
    for name, kind in (("ef_sign", PlainRun), ("noloco", OuterRun)):
        model = make_model()
        adam = torch.optim.Adam(model.parameters())
        run = attach(model, name, adam)
        assert isinstance(run, kind)
        assert run.optimizer is adam


def test_a_method_that_is_made_takes_no_more_options() -> None:
    with pytest.raises(ConfigError, match="method ef_sign: is already built; it takes no options: seed"):
        resolve(build("ef_sign"), seed=1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nodes: 4", r"m\.yaml: method: is missing"),
        ("method: {name: dgc}\ndensity: 0.5", r"m\.yaml: density: stands beside the block of dgc"),
        ("method:\n  dgc:\ndensity: 0.5", r"m\.yaml: density: stands beside the block of dgc"),
        ("method: dgc\nname: my-run", r"m\.yaml: method dgc: unknown option 'name'"),
        ("method: dgc\ndensty: 0.5", r"m\.yaml: method dgc: unknown option 'densty'; did you mean 'density'"),
    ],
)
def test_a_file_without_a_method_or_with_a_misplaced_option_is_refused(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "m.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        build(file)


def test_keys_that_are_no_options_may_stand_beside_a_block(tmp_path: Path) -> None:
    file = tmp_path / "m.yaml"
    file.write_text("method: {name: dgc, density: 0.5}\nepochs: 3")
    assert read_choice(file) == ("dgc", {"density": 0.5})
    assert build(file).options.density == 0.5
    with pytest.raises(ConfigError, match="name: 'my-run' stands beside method: 'dgc'"):
        read_choice({"name": "my-run", "method": "dgc"})
