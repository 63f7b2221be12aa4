"""Lightning's own Trainer on two ranks, and the same training by hand."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from framework_ranks import error_of, gathered, run_program, train_by_ddp
from pool import Pool
from rig import FREEZE, METHODS, flat, loss_of, make_batch, make_method, make_model, mean_norm, train
from rig import sgd_of as sgd
from told import Quick, assert_chosen
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from commopt import attach, build
from commopt.errors import CheckpointError
from commopt.methods import METHODS as METHODS_BY_NAME
from commopt.optim import make_optimizer

STEPS = 6
on_two_ranks = pytest.mark.ranks("lightning", 2)
DENSE_MB = 4e-6 * flat(make_model()).numel()
# case: method, options of the Trainer and the strategy, and what they are by hand
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    **{
        name: (name, {}, {})
        for name in ("dense", "ef_sign l1", "two_way int8", "dgc", "distributed_lion", "onebit_adam l1")
    },
    "clipped by the Trainer": ("ef_sign l1", {"gradient_clip_val": 0.05}, {"clip": 0.05}),
    "clipped by the method": ("onebit_adam l1", {"given": {"max_norm": 0.05}}, {"max_norm": 0.05}),
    **{
        f"{name}, {what}": (name, options, by_hand)
        for name in ("ef_sign l1", "onebit_adam l1")
        for what, options, by_hand in (
            ("accumulated", {"accumulate_grad_batches": 3}, {"every": 3}),
            ("bfloat16", {"precision": "bf16-mixed"}, {"dtype": torch.bfloat16}),
            ("float16", {}, {"dtype": torch.float16}),
        )
    },
}
RESUMED: dict[str, dict[str, Any]] = {
    "ef_sign": {"name": "ef_sign"},
    "onebit_adam": {"name": "onebit_adam", "freeze_step": 2},
    "zero_one_adam": {"name": "zero_one_adam", "var_freeze_step": 2, "local_step_scaler": 1, "local_step_clipper": 2},
    "noloco": {"name": "noloco", "every": 2, "delay": 1},
    "diloco": {"name": "diloco", "every": 2},
}


def module_class() -> Any:
    from lightning.pytorch import LightningModule

    class Net(LightningModule):  # type: ignore[misc]
        """The rig's model and batches; what differs between cases is given."""

        def __init__(self, configure: Any) -> None:
            super().__init__()
            self.net, self.configure = make_model(), configure
            self.rates: list[float] = []
            self.payload_mb: list[float] = []

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.net(x)
            return y

        def configure_optimizers(self) -> Any:
            return self.configure(self)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
            accumulates = self.trainer.accumulate_grad_batches > 1
            x, y = make_batch(self.global_rank, batch_idx if accumulates else self.trainer.global_step)
            loss: Tensor = loss_of(self(x), y)
            self.log("loss", loss.detach(), on_step=True)
            return loss

        def on_train_batch_end(self, *_: Any) -> None:
            self.payload_mb.append(float(self.trainer.callback_metrics.get("commopt/payload_mb", -1.0)))

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log("val", loss_of(self(make_batch(0, 99)[0]), make_batch(0, 99)[1]), sync_dist=True)

    return Net


def zeros(n: int) -> Any:
    return torch.utils.data.DataLoader(torch.zeros(n, 1))  # type: ignore[arg-type]


def adam(net: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(net.parameters(), lr=0.01)


def trainer_of(strategy: Any, **options: Any) -> Any:
    from lightning.pytorch import Trainer

    options = {"logger": False, "accelerator": "cpu", "devices": 2, "max_steps": STEPS, **options}
    quiet = {f"enable_{what}": False for what in ("progress_bar", "model_summary", "checkpointing")}
    return Trainer(strategy=strategy, **{**quiet, **options})


def strategy_of(method: Any, **options: Any) -> Any:
    from commopt.frameworks.lightning import CommoptStrategy

    return CommoptStrategy(method, timeout=timedelta(seconds=200), **options)


def fit(
    method: Any, configure: Any, ckpt_path: Any = None, given: Any = None, change: Any = None, **options: Any
) -> tuple[Any, Any]:
    """(module, trainer) after a fit; given: options of the strategy; change: called with the module before."""
    net = module_class()(configure)
    if change is not None:
        change(net)
    trainer = trainer_of(strategy_of(method, **(given or {})), **options)
    trainer.fit(net, zeros(200), zeros(4), ckpt_path=ckpt_path)
    return net, trainer


def fit_and_write(folder: Path, choice: dict[str, Any], ckpt_path: Any = None) -> tuple[Any, Any]:
    """A fit with a checkpoint at every third step."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    writer = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    configure = sgd if choice["name"] == "ef_sign" else adam
    return fit(choice, configure, ckpt_path, callbacks=[writer], enable_checkpointing=True)


def choice_of(name: str) -> tuple[dict[str, Any], Any]:
    """A case of the rig as a choice, and what `configure_optimizers` returns for it."""
    method, options, block = METHODS[name]
    return {"name": method, **options}, lambda net: make_optimizer(block, net.parameters())


@pytest.mark.parametrize("case", CASES)
@on_two_ranks
def test_training_is_bit_for_bit_that_of_ddp_with_the_method(case: str) -> None:
    from lightning.pytorch.plugins import MixedPrecision

    name, options, by_hand = CASES[case]
    if by_hand.get("dtype") == torch.float16:  # whose scaler the Trainer makes for GPUs only
        scaler, other = (torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2))
        options, by_hand = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}, {**by_hand, "scaler": other}
    net, trainer = fit(*choice_of(name), **options)
    sent, every = trainer.strategy.run.traffic.payload_bytes, by_hand.get("every", 1)
    assert trainer.strategy.run.replicas_are_equal()
    model = make_model()
    batches = [make_batch(dist.get_rank(), k) for k in range(every * STEPS)]
    expected, expected_bytes = train_by_ddp(model, *make_method(name, model), batches, **by_hand)
    assert torch.equal(flat(net), expected)
    assert bool(expected.isfinite().all())
    assert not torch.equal(expected, flat(make_model()))
    assert sent == expected_bytes > 0
    assert len(net.payload_mb) == every * STEPS
    payload_mb = net.payload_mb[every - 1 :: every]
    assert sum(payload_mb) == pytest.approx(sent / 1e6)
    if case == "dense":
        assert payload_mb == pytest.approx([DENSE_MB] * STEPS)
    if case == "onebit_adam l1":
        assert payload_mb[:FREEZE] == pytest.approx([DENSE_MB] * FREEZE)
        a_scale_for_each_block = 4 / 64  # bytes an element; a sign is 1 / 8, and an element of dense 4
        assert payload_mb[FREEZE] / DENSE_MB == pytest.approx((1 / 8 + a_scale_for_each_block) / 4, rel=0.2)


@on_two_ranks
def test_the_runs_grad_norm_is_that_of_the_mean() -> None:
    _, trainer = fit("dense", sgd, given={"max_norm": 0.05}, max_steps=1)
    assert trainer.strategy.run.grad_norm == pytest.approx(mean_norm(2, 0), rel=1e-6)


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.02, total_steps=STEPS + 1),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=1e9),
}


@pytest.mark.parametrize("kind", SCHEDULES)
@on_two_ranks
def test_schedulers_act_on_the_optimizer_that_stands_in_for_adam(kind: str) -> None:
    def scheduled(net: Any) -> Any:
        optimizer = adam(net)
        config = {"scheduler": SCHEDULES[kind](optimizer), "interval": "step", "monitor": "loss"}
        return {"optimizer": optimizer, "lr_scheduler": config}

    net, trainer = fit(choice_of("onebit_adam l1")[0], scheduled)
    stepping = trainer.strategy.run.optimizer
    assert stepping is trainer.optimizers[0]
    assert stepping.param_groups is trainer.lr_scheduler_configs[0].scheduler.optimizer.param_groups
    other = adam(make_model())
    schedule, expected = SCHEDULES[kind](other), []
    for _ in range(STEPS):
        expected.append(other.param_groups[0]["lr"])
        other.step()
        schedule.step(*([1.0] if kind == "plateau" else []))
    assert net.rates == pytest.approx(expected)
    assert len(set(expected)) > 1
    assert stepping.param_groups[0]["betas"] == other.param_groups[0]["betas"]


# -- checkpoints


@pytest.mark.parametrize("name", RESUMED)
@on_two_ranks
def test_a_checkpoint_holds_what_every_rank_needs_to_go_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    choice = RESUMED[name]
    straight, trainer = fit_and_write(tmp_path, choice)
    assert trainer.strategy.run.steps == STEPS
    assert torch.equal(resumed(tmp_path / "step=3.ckpt", choice), flat(straight))
    rewrite(tmp_path, "without", None)
    if METHODS_BY_NAME[name].kind == "update":
        assert f"holds no state of {name}" in error_of(resumed, tmp_path / "without.ckpt", choice)
    else:
        assert not torch.equal(resumed(tmp_path / "without.ckpt", choice), flat(straight))


@on_two_ranks
def test_auto_chooses_and_goes_on_with_its_choice_from_a_checkpoint(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    writer = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    options = {"callbacks": [writer], "enable_checkpointing": True, "max_steps": 8}
    net, trainer = fit(Quick, sgd, **options)
    assert_chosen(trainer.strategy.run)
    model = make_model()
    batches = [make_batch(dist.get_rank(), k) for k in range(8)]
    expected, sent = train_by_ddp(model, Quick, sgd(model), batches)
    assert torch.equal(flat(net), expected)
    assert sum(net.payload_mb) == pytest.approx(sent / 1e6)
    net, trainer = fit(Quick, sgd, tmp_path / "step=5.ckpt", **options)
    assert (trainer.strategy.run.method.choice, trainer.strategy.run.events) == ("two_way(int8)", [])
    assert torch.equal(flat(net), expected)


def resumed(checkpoint: Path, choice: dict[str, Any]) -> Tensor:
    """The parameters after a fit from a checkpoint."""
    return flat(fit_and_write(checkpoint.parent, choice, checkpoint)[0])


def rewrite(folder: Path, name: str, said: dict[str, Any] | None) -> None:
    """Write a checkpoint that says something else of the folder beside it, or nothing, and has none."""
    if dist.get_rank() == 0:
        stored = torch.load(folder / "step=3.ckpt", weights_only=True)
        own = stored.pop("commopt")
        torch.save(stored if said is None else {**stored, "commopt": {**own, **said}}, folder / f"{name}.ckpt")
    dist.barrier()


@on_two_ranks
def test_a_checkpoint_is_resumed_with_what_belongs_to_it_or_refused(tmp_path: Path) -> None:
    """Checkpoints that were moved, linked, or written by another job."""
    ef_sign = RESUMED["ef_sign"]

    def assert_refused(name: str, choice: dict[str, Any], said: str) -> None:
        with pytest.raises(CheckpointError, match=said):
            resumed(tmp_path / name, choice)

    straight = flat(fit_and_write(tmp_path, ef_sign)[0])
    rewrite(tmp_path, "lonely", {})
    rewrite(tmp_path, "noloco", {"ranks": 4, "method": "noloco"})
    assert_refused("step=3.ckpt", {"name": "top_k", "density": 0.1}, "was saved under ef_sign, not top_k")
    assert_refused("lonely.ckpt", ef_sign, "lonely.ckpt.commopt: holds no state of ef_sign: .* moved without its state")
    assert_refused("noloco.ckpt", RESUMED["noloco"], "holds 4 replicas under noloco, and there are 2 ranks")
    if dist.get_rank() == 0:
        (tmp_path / "link.ckpt").symlink_to("step=3.ckpt")
        shutil.move(tmp_path / "step=6.ckpt.commopt", tmp_path / "lonely.ckpt.commopt")
    dist.barrier()
    assert_refused("lonely.ckpt", ef_sign, "is of step 3, and")
    assert torch.equal(resumed(tmp_path / "link.ckpt", ef_sign), straight)


@on_two_ranks
def test_the_state_of_a_checkpoint_goes_with_it(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    options = {"every_n_train_steps": 2, "monitor": "loss", "mode": "max", "save_last": True}
    writer = ModelCheckpoint(tmp_path, filename="{step}", **options)
    fit("ef_sign", sgd, callbacks=[writer], enable_checkpointing=True)
    dist.barrier()
    kept = (Path(writer.best_model_path).name, "last.ckpt")
    assert sorted(one.name for one in tmp_path.iterdir()) == sorted(
        f"{k}{end}" for k in kept for end in ("", ".commopt")
    )


@on_two_ranks
def test_a_checkpoint_after_an_error_waits_for_nobodys_residuals(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import LambdaCallback

    path = tmp_path / "error.ckpt"
    net = module_class()(sgd)
    net.on_before_zero_grad = lambda _: 1 / (3 - net.trainer.global_step)
    writer = LambdaCallback(on_exception=lambda trainer, *_: trainer.save_checkpoint(path, False))
    trainer = trainer_of(strategy_of("ef_sign"), callbacks=[writer])
    with contextlib.suppress(ZeroDivisionError):
        trainer.fit(net, zeros(200), zeros(4))
    dist.barrier()
    stored = torch.load(path, weights_only=True)
    assert stored["global_step"] == 3
    assert sorted(stored["optimizer_states"][0]) == ["param_groups", "state"]
    assert "commopt" not in stored
    assert not (tmp_path / "error.ckpt.commopt").exists()


# -- outer methods


@pytest.mark.parametrize(
    ("name", "options"),
    [("noloco", {"every": 2, "final_average": True}), ("diloco", {"every": 3}), ("local_sgd", {"every": 2})],
)
@on_two_ranks
def test_an_outer_method_averages_replicas_without_ddp(name: str, options: dict[str, Any]) -> None:
    """Replicas that differ at first, and the same by hand."""
    net = module_class()(sgd)
    with torch.no_grad():
        net.net[0].bias.add_(dist.get_rank())  # which starting together undoes
    trainer = trainer_of(strategy_of({"name": name, **options}))
    trainer.fit(net, zeros(200), zeros(4))
    model = make_model()
    run = attach(model, {"name": name, **options}, sgd(model))
    run.join()
    train(model, run.optimizer, dist.get_rank(), STEPS)
    run.finish()
    run.close()
    assert torch.equal(flat(net), flat(model))
    assert len(trainer.strategy.run.reports) == len(run.reports) > 0
    assert 0 < sum(net.payload_mb) < STEPS * DENSE_MB
    assert not isinstance(trainer.strategy.model, DistributedDataParallel)
    assert torch.equal(*gathered(flat(net)))


# -- what does not fit


def attempt(method: Any = "onebit_adam", configure: Any = adam, **options: Any) -> str:
    """The error of a fit, or nothing."""
    return error_of(fit, method, configure, **options)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"method": "dcg"}, "ConfigError: unknown method 'dcg'; did you mean 'dgc'?"),
    "hook": (
        {"given": {"ddp_comm_hook": print}},
        "AttachError: ddp_comm_hook with CommoptStrategy: the method is the communication hook",
    ),
    "option": (
        {"given": {"find_unused_parameter": True}},
        "ConfigError: find_unused_parameter: unknown option of DDPStrategy; did you mean 'find_unused_parameters'?",
    ),
    "outer option": (
        {"method": "noloco", "given": {"bucket_cap_mb": 1}},
        "AttachError: bucket_cap_mb with noloco: an outer method trains without DDP",
    ),
    "outer overlap": (
        {"method": "noloco", "given": {"overlap": False}},
        "AttachError: overlap with noloco: an outer method exchanges no gradients",
    ),
    "clip": (
        {"gradient_clip_val": 1.0},
        "AttachError: gradient_clip_val with onebit_adam: what it has exchanged when the Trainer clips is more than a gradient; "
        "leave it out, and write CommoptStrategy(..., max_norm=1.0)",
    ),
    "manual": (
        {"change": lambda net: setattr(net, "automatic_optimization", False)},
        "AttachError: manual optimization with CommoptStrategy: gradients are exchanged in backward",
    ),
    "frozen": (
        {"change": lambda net: net.requires_grad_(False)},
        "AttachError: the model: it has no trainable parameter",
    ),
    "bn": (
        {"method": "noloco", "configure": sgd, "sync_batchnorm": True},
        "AttachError: sync_batchnorm with noloco: it exchanges in every step",
    ),
    "no optimizer": ({"configure": lambda net: None}, "AttachError: configure_optimizers without an optimizer"),
}


@pytest.mark.parametrize("case", REFUSED)
@on_two_ranks
def test_what_does_not_fit_is_refused_with_the_reason_on_every_rank(case: str) -> None:
    options, said = REFUSED[case]
    assert attempt(**options).startswith(said)


@on_two_ranks
def test_what_fails_on_one_rank_fails_on_all_and_training_goes_on_after_it() -> None:
    wrong = "AttachError: onebit_adam stands in for Adam or AdamW"
    of_rank_1 = wrong if dist.get_rank() else f"AttachError: rank 1 could not attach: {wrong}"
    assert attempt(configure=lambda net: (sgd if dist.get_rank() else adam)(net)).startswith(of_rank_1)
    assert attempt() == ""


@on_two_ranks
def test_a_method_that_was_built_serves_one_fit() -> None:
    built = build("ef_sign")
    assert attempt(method=built, configure=sgd) == ""
    second = attempt(method=built, configure=sgd)
    assert second.startswith("AttachError: this ef_sign: it was attached to a model before; build another one")


@on_two_ranks
def test_a_strategy_serves_another_fit_with_a_method_of_its_own(tmp_path: Path) -> None:
    """With a validation and a checkpoint in between."""
    net, trainer = fit({"name": "onebit_adam", "freeze_step": FREEZE}, adam)
    assert not torch.equal(flat(net), flat(make_model()))
    assert 0 < trainer.strategy.run.traffic.payload_bytes / 1e6 < STEPS * DENSE_MB
    trainer.validate(net, zeros(4), verbose=False)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    stored = torch.load(tmp_path / "after.ckpt", weights_only=True)["commopt"]
    assert (stored["ranks"], stored["method"]) == (2, "onebit_adam")  # written after the fit had ended
    trainer.fit_loop.epoch_loop.max_steps = 2 * STEPS
    trainer.fit(module_class()(adam), zeros(200), zeros(4))
    assert trainer.strategy.run.steps == STEPS
    assert len(trainer.callbacks) == 1


def test_the_example_prints_losses_bytes_and_what_it_saved(lightning_ranks: Pool, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.write_bytes(bytes(range(32, 127)) * 900)
    words = ["--steps", "6", "--layers", "1", "--width", "16", "--options", '{"freeze_step": 3}']
    words += ["--save", f"{tmp_path}/example.ckpt", "--corpus", str(corpus)]
    first, second = lightning_ranks.run(2, run_program, "lightning_train.py", *words)
    lines = first.splitlines()
    losses = [float(line.split()[3]) for line in lines[:2]]
    sent, dense = (float(lines[2].split()[k]) for k in (4, 11))
    assert losses[1] < losses[0]
    assert 0.5 * dense < sent < 0.6 * dense  # three of six steps are dense
    assert "with the method's state on 2 ranks" in lines[3]
    assert second == ""
