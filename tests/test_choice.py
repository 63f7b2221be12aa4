"""One way to name a method, wherever it stands: a word, a block, a file; and one door to put it in."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import commopt
from commopt import attach, build
from commopt.choice import read_choice
from commopt.cluster.spec import load_run
from commopt.errors import AttachError, ConfigError
from commopt.frameworks.plain import PlainRun
from commopt.methods import EFSign, resolve
from commopt.optim import LAMB, Lion
from commopt.run.outer import OuterRun
from commopt.run.stand_in import StandIn

ROOT = Path(commopt.__file__).parent.parent


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


@pytest.mark.parametrize(
    "choice",
    [
        {"name": "top_k", "density": 0.02},
        {"method": "top_k", "density": 0.02},
        {"top_k": {"density": 0.02}},
        {"method": {"name": "top_k", "density": 0.02}},
    ],
)
def test_every_form_of_a_block_names_the_same_method(choice: dict[str, Any], tmp_path: Path) -> None:
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
        ({}, "names no method"),
        ({"density": 0.1}, "names no method"),
        ({"name": 3}, "3 is not a method's name"),
        ({"name": "dgc", "densty": 0.1}, r"method dgc: unknown option 'densty'; did you mean 'density'\?"),
        ("dcg", r"unknown method 'dcg'; did you mean 'dgc'\?"),
        ("nowhere.yaml", "there is no such file"),
    ],
)
def test_what_is_no_choice_is_refused_with_what_to_write(choice: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build(choice)


def test_a_file_without_a_block_is_refused_by_its_name(tmp_path: Path) -> None:
    file = tmp_path / "other.yaml"
    file.write_text("nodes: 4")
    with pytest.raises(ConfigError, match=r"other\.yaml: method: is missing"):
        build(file)


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


# -- standing in for the user's optimizer


def test_an_update_method_steps_by_the_groups_of_the_optimizer_that_it_stands_in_for() -> None:
    model = model_of()
    weights = [p for p in model.parameters() if p.dim() > 1]
    biases = [p for p in model.parameters() if p.dim() == 1]
    adam = torch.optim.AdamW([{"params": weights, "weight_decay": 0.1}, {"params": biases, "lr": 5e-4}], lr=1e-3)
    run = attach(model, {"onebit_adam": {"freeze_step": 7}}, adam)
    assert run.optimizer is not adam
    assert all(a is b for a, b in zip(run.optimizer.param_groups, adam.param_groups, strict=True))
    adam.param_groups[1]["lr"] = 0.25
    assert run.method.settings("0.bias")["lr"] == 0.25  # type: ignore[attr-defined]
    assert run.method.settings("0.weight")["weight_decay"] == 0.1  # type: ignore[attr-defined]


def test_a_gradient_or_an_outer_method_leaves_the_optimizer() -> None:
    for name in ("ef_sign", "noloco"):
        model = model_of()
        adam = torch.optim.Adam(model.parameters())
        assert attach(model, name, adam).optimizer is adam


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("onebit_adam", torch.optim.SGD, "stands in for Adam or AdamW, not for SGD: pass torch.optim.AdamW"),
        ("zero_one_adam", torch.optim.NAdam, "not for NAdam"),
        ("distributed_lion", torch.optim.Adam, "stands in for Lion, not for Adam: pass commopt.optim.Lion"),
        ("onebit_lamb", torch.optim.Adam, "stands in for LAMB or Lamb or FusedLamb, not for Adam"),
        ("demo", torch.optim.RMSprop, "stands in for SGD, not for RMSprop"),
    ],
)
def test_a_method_does_not_stand_in_for_an_optimizer_of_another_kind(name: str, kind: Any, said: str) -> None:
    model = model_of()
    with pytest.raises(AttachError, match=said):
        attach(model, name, kind(model.parameters()))


@pytest.mark.parametrize(
    ("name", "kind"), [("distributed_lion", Lion), ("onebit_lamb", LAMB), ("demo", torch.optim.SGD)]
)
def test_each_method_stands_in_for_its_parent(name: str, kind: Any) -> None:
    model = model_of()
    run = attach(model, name, kind(model.parameters(), lr=0.02))
    assert run.optimizer.param_groups[0]["lr"] == 0.02


@pytest.mark.parametrize(
    ("name", "kind", "options", "said"),
    [
        ("onebit_adam", torch.optim.Adam, {"amsgrad": True}, "amsgrad=True of Adam has no counterpart"),
        ("onebit_adam", torch.optim.AdamW, {"maximize": True}, "maximize=True of AdamW has no counterpart"),
        ("onebit_adam", torch.optim.Adam, {"weight_decay": 0.1}, "as AdamW does: use AdamW"),
        ("demo", torch.optim.SGD, {"momentum": 0.9}, r"momentum=0\.9 of SGD has no counterpart"),
    ],
)
def test_a_setting_without_a_counterpart_is_refused(name: str, kind: Any, options: dict[str, Any], said: str) -> None:
    model = model_of()
    with pytest.raises(AttachError, match=said):
        attach(model, name, kind(model.parameters(), lr=0.1, **options))


# -- the door


def test_the_door_takes_names_blocks_files_classes_and_methods() -> None:
    file = ROOT / "configs" / "methods" / "ef_sign.yaml"
    choices: list[Any] = ["ef_sign", {"name": "ef_sign"}, file, EFSign, build("ef_sign")]
    for choice in choices:
        model = model_of()
        run = attach(model, choice, torch.optim.SGD(model.parameters(), lr=0.1))
        assert isinstance(run, PlainRun)
        assert run.method.name == "ef_sign"


def test_the_door_makes_update_and_outer_methods_too() -> None:
    model, other = model_of(), model_of()
    run = attach(model, "onebit_adam", torch.optim.Adam(model.parameters(), lr=0.01))
    assert isinstance(run.optimizer, StandIn)
    assert isinstance(attach(other, "noloco", torch.optim.SGD(other.parameters(), lr=0.1)), OuterRun)


@pytest.mark.parametrize("method", ["ef_sign", "onebit_adam", "noloco"])
def test_every_method_wants_an_optimizer(method: str) -> None:
    with pytest.raises(AttachError, match=rf"{method}: pass the optimizer of your training \(it is missing\)"):
        attach(model_of(), method)


def test_the_door_says_what_it_opens_for() -> None:
    with pytest.raises(AttachError, match="model: got list, expected a module"):
        attach([], "dense")  # type: ignore[arg-type]
    model = model_of()
    with pytest.raises(ConfigError, match="method: got function, expected a name, a block"):
        attach(model, build, torch.optim.SGD(model.parameters(), lr=0.1))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="method ef_sign: is made already, and takes no more options: seed"):
        resolve(build("ef_sign"), seed=1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("method: {name: dgc}\ndensity: 0.5", r"m\.yaml: density: stands beside the block of dgc"),
        ("method:\n  dgc:\ndensity: 0.5", r"m\.yaml: density: stands beside the block of dgc"),
        ("method: dgc\nname: my-run", r"m\.yaml: method dgc: unknown option 'name'"),
        ("method: dgc\ndensty: 0.5", r"m\.yaml: method dgc: unknown option 'densty'; did you mean 'density'"),
    ],
)
def test_an_option_in_the_wrong_place_is_not_passed_over(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "m.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        build(file)


def test_what_is_no_option_may_stand_beside_a_block(tmp_path: Path) -> None:
    file = tmp_path / "m.yaml"
    file.write_text("method: {name: dgc, density: 0.5}\nepochs: 3")
    assert read_choice(file) == ("dgc", {"density": 0.5})
    assert build(file).options.density == 0.5
    with pytest.raises(ConfigError, match="name: 'my-run' stands beside method: 'dgc'"):
        read_choice({"name": "my-run", "method": "dgc"})


@pytest.mark.parametrize("value", [0, -1.0, math.nan, True, "1"])
def test_a_norm_to_clip_to_is_above_zero(value: Any) -> None:
    model = model_of()
    with pytest.raises(ConfigError, match=r"max_norm: .* out of range; write a number above 0, or leave it out"):
        attach(model, "dense", torch.optim.SGD(model.parameters(), lr=0.1), max_norm=value)


def test_a_scaler_must_be_one() -> None:
    model = model_of()
    with pytest.raises(
        ConfigError, match=r"grad_scaler: float has no get_scale\(\); pass the torch\.amp\.GradScaler itself"
    ):
        attach(model, "dense", torch.optim.SGD(model.parameters(), lr=0.1), grad_scaler=65536.0)  # type: ignore[arg-type]
