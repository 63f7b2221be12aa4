"""Lightning's own Trainer on two ranks, which are started once and write down what each case did."""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
from typing import Any

import pytest
import torch
from lightning_cases import CASES, COMPARED, RANKS, RESUMED, SCHEDULES, STEPS
from rig import FREEZE, flat, make_model

from commopt.errors import MissingExtra
from commopt.methods import METHODS

pytestmark = pytest.mark.timeout(300)  # for the ranks of all cases together


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What each case returned, by rank."""
    folder = tmp_path_factory.mktemp("lightning")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    shared = {
        "WORLD_SIZE": RANKS,
        "LOCAL_WORLD_SIZE": RANKS,
        "GROUP_RANK": 0,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    words = ["python", "-c", "import lightning_cases; lightning_cases.main()", str(folder)]
    ranks, logs = [], [folder / f"log.{rank}" for rank in range(RANKS)]
    for rank, log in enumerate(logs):
        own = {**shared, "RANK": rank, "LOCAL_RANK": rank, "TORCHELASTIC_RUN_ID": "test", "GLOO_SOCKET_IFNAME": "lo"}
        environment = {**os.environ, **{key: str(x) for key, x in own.items()}}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        with log.open("wb") as file:
            ranks.append(subprocess.Popen(words, env=environment, cwd=folder, stdout=file, stderr=file))
    try:
        for process in ranks:
            process.wait(timeout=280)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    tails = "".join(log.read_text(encoding="utf-8", errors="replace")[-3000:] for log in logs)
    assert [process.returncode for process in ranks] == [0] * RANKS, tails
    return {name: [torch.load(folder / f"{name}.{rank}") for rank in range(RANKS)] for name in CASES}


def same(results: Any) -> bool:
    return all(torch.equal(one[0], one[1]) for one in results)


@pytest.mark.parametrize("name", COMPARED)
def test_training_is_bit_for_bit_that_of_ddp_with_the_method(answers: dict[str, list[Any]], name: str) -> None:
    results = [found[name] for found in answers["equal_to_ddp"]]
    assert same(results)
    assert torch.equal(results[0][0], results[1][0])
    assert not torch.equal(results[0][0], flat(make_model()))
    for _, _, (sent, by_hand), payload_mb, are_equal in results:
        assert are_equal
        assert sent == by_hand > 0
        assert sum(payload_mb) == pytest.approx(sent / 1e6)


def test_one_bit_adam_sends_a_32nd_once_frozen(answers: dict[str, list[Any]]) -> None:
    found = answers["equal_to_ddp"][0]
    dense, frozen = (found[name][3] for name in ("dense", "onebit_adam l1"))
    parameters = sum(p.numel() for p in make_model().parameters())
    assert dense == pytest.approx([4 * parameters / 1e6] * STEPS)
    assert frozen[:FREEZE] == pytest.approx(dense[:FREEZE])
    a_scale_for_each_block = 4 / 64  # bytes an element; a sign is 1 / 8, and an element of dense 4
    assert frozen[FREEZE] / dense[FREEZE] == pytest.approx((1 / 8 + a_scale_for_each_block) / 4, rel=0.1)


@pytest.mark.parametrize("name", ["ef_sign l1", "onebit_adam l1"])
def test_accumulated_gradients_are_exchanged_once_a_step(answers: dict[str, list[Any]], name: str) -> None:
    results = [found[name] for found in answers["accumulated"]]
    assert same(results)
    assert torch.equal(results[0][0], results[1][0])
    assert len(results[0][2]) == 3 * STEPS


def test_the_trainer_clips_what_a_gradient_method_leaves(answers: dict[str, list[Any]]) -> None:
    assert same(found["trainer"] for found in answers["clipped"])


def test_max_norm_clips_before_the_exchange_without_overlap(answers: dict[str, list[Any]]) -> None:
    assert same(found["method"] for found in answers["clipped"])


@pytest.mark.parametrize("name", ["ef_sign l1", "onebit_adam l1", "ef_sign l1 scaled", "onebit_adam l1 scaled"])
def test_mixed_precision_is_that_of_autocast_and_scaler_by_hand(answers: dict[str, list[Any]], name: str) -> None:
    results = [found[name] for found in answers["mixed"]]
    assert same(results)
    assert torch.equal(results[0][0], results[1][0])
    assert bool(results[0][0].isfinite().all())


@pytest.mark.parametrize("kind", SCHEDULES)
def test_schedulers_act_on_the_optimizer_that_stands_in_for_adam(answers: dict[str, list[Any]], kind: str) -> None:
    for found in answers["rates"]:
        rates, expected, acts_on_what_steps, betas_are_equal = found[kind]
        assert rates == pytest.approx(expected)
        assert len(set(expected)) > 1
        assert acts_on_what_steps
        assert betas_are_equal


@pytest.mark.parametrize("name", RESUMED)
def test_a_checkpoint_holds_what_every_rank_needs_to_go_on_bit_for_bit(
    answers: dict[str, list[Any]], name: str
) -> None:
    results = [found[name] for found in answers["resumed"]]
    assert same(results)
    for _, straight, without, steps in results:
        assert steps == STEPS
        if METHODS[name].kind == "update":
            assert f"holds no state of {name}" in without
        else:
            assert not torch.equal(without, straight)


def test_another_number_of_ranks_takes_the_mean_of_what_was_to_be_sent(answers: dict[str, list[Any]]) -> None:
    (values, without), (others, _) = (found["four ranks"] for found in answers["resumed"])
    assert torch.equal(values, others)
    assert not torch.equal(values, without)


def test_a_link_to_a_checkpoint_finds_the_state_beside_it(answers: dict[str, list[Any]]) -> None:
    assert same(found["linked"] for found in answers["resumed"])


def test_the_state_of_a_checkpoint_goes_with_it(answers: dict[str, list[Any]]) -> None:
    for files, best in answers["kept"]:
        assert files == sorted(f"{name}{end}" for name in (best, "last.ckpt") for end in ("", ".commopt"))


def test_a_checkpoint_after_an_error_waits_for_nobodys_residuals(answers: dict[str, list[Any]]) -> None:
    for step, optimizer, has_residuals in answers["interrupted"]:
        assert step == 3
        assert optimizer == ["param_groups", "state"]
        assert not has_residuals


@pytest.mark.parametrize("name", ["noloco", "diloco", "local_sgd"])
def test_an_outer_method_averages_replicas_without_ddp(answers: dict[str, list[Any]], name: str) -> None:
    results = [found[name] for found in answers["outer"]]
    assert same(results)
    for _, _, (rounds, by_hand), payload_mb, is_wrapped in results:
        assert rounds == by_hand > 0
        assert 0 < sum(payload_mb) < sum(answers["equal_to_ddp"][0]["dense"][3])
        assert not is_wrapped
    assert torch.equal(results[0][0], results[1][0])


SAID = {
    "no optimizer": "AttachError: configure_optimizers without an optimizer",
    "unknown": "ConfigError: unknown method 'dcg'; did you mean 'dgc'?",
    "value": "ConfigError: method dgc: density: 2 is out of range",
    "update option": "ConfigError: method onebit_adam: freeze_step: -1 is out of range",
    "rate": "ConfigError: method onebit_adam: lr: is not an option of this method; set it on the optimizer",
    "hook": "AttachError: ddp_comm_hook with CommoptStrategy: the method is the communication hook",
    "option": "ConfigError: find_unused_parameter: unknown option of DDPStrategy; did you mean 'find_unused_parameters'?",
    "outer option": "AttachError: bucket_cap_mb with noloco: an outer method trains without DDP",
    "outer overlap": "AttachError: overlap with noloco: an outer method exchanges no gradients",
    "kind": "AttachError: onebit_adam stands in for Adam or AdamW, not for SGD",
    "clip": "AttachError: gradient_clip_val with onebit_adam: it has exchanged its momentum when the Trainer clips; leave it out, and "
    "write CommoptStrategy(..., max_norm=1.0)",
    "norm": "AttachError: overlap=True with max_norm: it needs the gradients of all buckets at once",
    "manual": "AttachError: manual optimization with CommoptStrategy: gradients are exchanged in backward",
    "frozen": "AttachError: the model has no trainable parameter",
    "ranks": "AttachError: the ranks' configurations differ: optimizer.groups.0.lr is 0.02 on rank 0 and 0.01 on rank 1",
    "bn": "AttachError: sync_batchnorm with noloco: it exchanges in every step",
    "second": "AttachError: this ef_sign was attached to a model before; build another one",
}
NOT_RESUMED = {
    "other ranks": "CheckpointError: the checkpoint holds 4 replicas under noloco, and there are 2 ranks",
    "other method": "was saved under ef_sign, not top_k",
    "no folder": "lonely.ckpt.commopt: is missing, and holds the method's state: move it along with its checkpoint",
    "other step": "is of step 3, and",
}


@pytest.mark.parametrize("what", NOT_RESUMED)
def test_a_checkpoint_that_does_not_belong_here_is_refused(answers: dict[str, list[Any]], what: str) -> None:
    for found in answers["resumed"]:
        assert NOT_RESUMED[what] in found["refused"][what]
        assert found["refused"][what].startswith("CheckpointError: ")


@pytest.mark.parametrize("what", SAID)
def test_what_does_not_fit_is_refused_with_the_reason_on_every_rank(answers: dict[str, list[Any]], what: str) -> None:
    for found in answers["refused"]:
        assert found[what].startswith(SAID[what])


def test_what_fails_on_one_rank_fails_on_all(answers: dict[str, list[Any]]) -> None:
    told, failed = (found["one rank"] for found in answers["refused"])
    assert failed.startswith("AttachError: onebit_adam stands in for Adam or AdamW, not for SGD")
    assert told.startswith("AttachError: rank 1 could not attach: AttachError: onebit_adam stands in for Adam or AdamW")


def test_training_goes_on_after_what_was_refused(answers: dict[str, list[Any]]) -> None:
    assert all(found["fine"] == found["first"] == "" for found in answers["refused"])


def test_a_strategy_serves_another_fit_with_a_method_of_its_own(answers: dict[str, list[Any]]) -> None:
    for (values, sent, parts, method, steps, callbacks), other in zip(
        answers["again"], answers["equal_to_ddp"], strict=True
    ):
        assert not torch.equal(values, flat(make_model()))
        assert 0 < sent < other["dense"][2][0]
        assert (parts, method) == (RANKS, "onebit_adam")  # written after the fit had ended
        assert steps == STEPS
        assert callbacks == 1


def test_the_example_prints_losses_bytes_and_what_it_saved(answers: dict[str, list[Any]]) -> None:
    first, second = answers["example"]
    lines = first.splitlines()
    losses = [float(line.split()[3]) for line in lines[:2]]
    sent, dense = (float(lines[2].split()[k]) for k in (4, 11))
    assert losses[1] < losses[0]
    assert 0.5 * dense < sent < 0.6 * dense  # three of six steps are dense
    assert "with the method's state on 2 ranks" in lines[3]
    assert second == ""


def test_without_lightning_the_import_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=r"pip install 'commopt\[lightning\]'"):
        importlib.import_module("commopt.frameworks.lightning")
