"""Lightning's own Trainer on two ranks, which are started once and write down what each case did; the tests then look at it."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import os
import runpy
import socket
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rig import FREEZE, METHODS, flat, loss_of, make_batch, make_method, make_model, train
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from commopt import build
from commopt.errors import CommoptError, MissingExtra
from commopt.integrations import ddp, plain
from commopt.methods import is_update_method

pytestmark = pytest.mark.timeout(300)  # for the ranks of all cases together
RANKS, STEPS = 2, 6
CASES: dict[str, Callable[[Path], Any]] = {}
COMPARED = ["dense", "ef_sign l1", "two_way int8", "dgc", "distributed_lion", "onebit_adam l1"]
RESUMED = {
    "ef_sign": {"name": "ef_sign"},
    "dgc": {"name": "dgc", "density": 0.1},
    "onebit_adam": {"name": "onebit_adam", "freeze_step": 2},
    "zero_one_adam": {"name": "zero_one_adam", "var_freeze_step": 2, "local_step_scaler": 1, "local_step_clipper": 2},
    "noloco": {"name": "noloco", "every": 2, "delay": 1},
    "diloco": {"name": "diloco", "every": 2},
}
LOSS_SCALE = 1024.0


def case(function: Callable[[Path], Any]) -> Callable[[Path], Any]:
    CASES[function.__name__] = function
    return function


# -- what runs on the ranks


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


def sgd(net: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.05)


def adam(net: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(net.parameters(), lr=0.01)


def trainer_of(strategy: Any, **options: Any) -> Any:
    from lightning.pytorch import Trainer

    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    given = {"accelerator": "cpu", "devices": RANKS, "max_steps": STEPS, **quiet, **options}
    return Trainer(strategy=strategy, **given)


def strategy_of(method: Any = None, **options: Any) -> Any:
    from commopt.integrations.lightning import CommoptStrategy

    return CommoptStrategy(method, timeout=timedelta(seconds=200), **options)


def fit(method: Any, configure: Any, ckpt_path: Any = None, strategy: Any = None, **options: Any) -> tuple[Any, Any]:
    """(module, trainer) after a fit."""
    net = module_class()(configure)
    trainer = trainer_of(strategy or strategy_of(method), **options)
    trainer.fit(net, zeros(200), zeros(4), ckpt_path=ckpt_path)
    return net, trainer


def fit_and_write(folder: Path, method: Any, configure: Any, ckpt_path: Any = None) -> tuple[Any, Any]:
    """A fit with a checkpoint at every third step."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    writer = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    return fit(method, configure, ckpt_path, callbacks=[writer], enable_checkpointing=True)


def choice_of(name: str) -> tuple[dict[str, Any], Any]:
    """A case of the rig as a choice, and what `configure_optimizers` returns for it."""
    method, options = METHODS[name]
    if method == "distributed_lion":
        return {"name": method, **options}, lambda net: build("distributed_lion", net.named_parameters(), **options)
    if is_update_method(method):
        return {"name": method, **options}, adam
    momentum = 0.0 if method == "dgc" else 0.9
    return {"name": method, **options}, lambda net: torch.optim.SGD(net.parameters(), lr=0.05, momentum=momentum)


@contextlib.contextmanager
def by_ddp(name: str, **options: Any) -> Iterator[Any]:
    """(DDP model, optimizer that steps, attachment): the same by hand."""
    overlap = options.pop("overlap", True)
    model = DistributedDataParallel(make_model())
    method, optimizer, steps = make_method(name, model.module, **options)
    attachment = ddp.attach(model, method, optimizer, overlap=overlap)
    yield model, steps, attachment
    attachment.detach()


@case
def equal_to_ddp(_: Path) -> Any:
    found = {}
    for name in COMPARED:
        choice, configure = choice_of(name)
        net, trainer = fit(None if name == "distributed_lion" else choice, configure)
        attachment = trainer.strategy.attachment
        with by_ddp(name) as (model, optimizer, by_hand):
            train(model, optimizer, dist.get_rank(), STEPS)
        sent = [one.group.traffic.payload_bytes for one in (attachment, by_hand)]
        found[name] = flat(net), flat(model.module), sent, net.payload_mb, attachment.replicas_are_equal()
    return found


@case
def accumulated(_: Path) -> Any:
    found = {}
    for name in ("ef_sign l1", "onebit_adam l1"):
        choice, configure = choice_of(name)
        net, _trainer = fit(choice, configure, accumulate_grad_batches=3)
        with by_ddp(name) as (model, optimizer, _by_hand):
            for step in range(STEPS):
                optimizer.zero_grad()
                for micro in range(3):
                    x, y = make_batch(dist.get_rank(), 3 * step + micro)
                    with model.no_sync() if micro < 2 else contextlib.nullcontext():
                        (loss_of(model(x), y) / 3).backward()
                optimizer.step()
        found[name] = flat(net), flat(model.module), net.payload_mb
    return found


@case
def clipped(_: Path) -> Any:
    """By the Trainer, after the exchange; and by the method, before it."""
    choice, configure = choice_of("ef_sign l1")
    by_trainer, _trainer = fit(choice, configure, gradient_clip_val=0.05)
    with by_ddp("ef_sign l1") as (model, optimizer, _by_hand):
        for step in range(STEPS):
            x, y = make_batch(dist.get_rank(), step)
            optimizer.zero_grad()
            loss_of(model(x), y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
    choice, configure = choice_of("onebit_adam l1")
    by_method, _trainer = fit({**choice, "max_norm": 0.05}, configure)
    with by_ddp("onebit_adam l1", max_norm=0.05, overlap=False) as (other, optimizer, _by_hand):
        train(other, optimizer, dist.get_rank(), STEPS)
    return {"trainer": (flat(by_trainer), flat(model.module)), "method": (flat(by_method), flat(other.module))}


@case
def mixed(_: Path) -> Any:
    """Autocast in bfloat16, and in float16 with a GradScaler, which the Trainer only makes for GPUs."""
    from lightning.pytorch.plugins import MixedPrecision

    found: dict[str, tuple[Any, ...]] = {}
    for name in ("ef_sign l1", "onebit_adam l1"):
        choice, configure = choice_of(name)
        net, _trainer = fit(choice, configure, precision="bf16-mixed")
        with by_ddp(name) as (model, optimizer, _by_hand):
            for step in range(STEPS):
                x, y = make_batch(dist.get_rank(), step)
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                    loss = loss_of(model(x), y)
                loss.backward()
                optimizer.step()
        found[name] = flat(net), flat(model.module)
        scaler = torch.amp.GradScaler("cpu", init_scale=LOSS_SCALE)
        net, trainer = fit(choice, configure, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
        other = torch.amp.GradScaler("cpu", init_scale=LOSS_SCALE)
        with by_ddp(name, grad_scaler=other) as (model, optimizer, _by_hand):
            for step in range(STEPS):
                x, y = make_batch(dist.get_rank(), step)
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.float16, cache_enabled=False):
                    loss = loss_of(model(x), y)
                other.scale(loss).backward()
                other.step(optimizer)
                other.update()
        found[f"{name} scaled"] = flat(net), flat(model.module), trainer.strategy.attachment.replicas_are_equal()
    return found


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.02, total_steps=STEPS + 1),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=1e9),
    "sequential": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.ConstantLR(o, 0.1, 2), torch.optim.lr_scheduler.ExponentialLR(o, 0.5)],
        milestones=[3],
    ),
}


def scheduled(net: Any, kind: str) -> Any:
    optimizer = adam(net)
    config = {"scheduler": SCHEDULES[kind](optimizer), "interval": "step", "monitor": "loss"}
    return {"optimizer": optimizer, "lr_scheduler": config}


@case
def rates(_: Path) -> Any:
    """What each step's rate is under the update method, and with Adam itself."""
    found = {}
    for kind in SCHEDULES:
        choice, _configure = choice_of("onebit_adam l1")
        net, trainer = fit(
            {key: x for key, x in choice.items() if key != "lr"}, lambda net, kind=kind: scheduled(net, kind)
        )
        acts_on_what_steps = (
            trainer.lr_scheduler_configs[0].scheduler.optimizer is trainer.strategy.attachment.optimizer
        )
        betas = trainer.optimizers[0].param_groups[0]["betas"]
        other = adam(make_model())
        schedule, expected = SCHEDULES[kind](other), []
        for _step in range(STEPS):
            expected.append(other.param_groups[0]["lr"])
            other.step()
            schedule.step(*([1.0] if kind == "plateau" else []))
        found[kind] = net.rates, expected, acts_on_what_steps, betas == other.param_groups[0]["betas"]
    return found


@case
def resumed(folder: Path) -> Any:
    """Straight through; stopped after a checkpoint in the middle and resumed; and without what other ranks had to send."""
    found = {}
    for name, choice in RESUMED.items():
        configure = sgd if name in ("ef_sign", "dgc") else adam
        place = folder / f"checkpoints of {name}"
        straight, trainer = fit_and_write(place, choice, configure)
        again, _trainer = fit_and_write(place, choice, configure, place / "step=3.ckpt")
        stored = torch.load(place / "step=3.ckpt", weights_only=True)
        del stored["commopt"]
        if dist.get_rank() == 0:
            torch.save(stored, place / "without.ckpt")
        dist.barrier()
        try:
            without: Any = flat(fit_and_write(place, choice, configure, place / "without.ckpt")[0])
        except CommoptError as error:
            without = str(error)
        found[name] = flat(again), flat(straight), without, trainer.strategy.attachment.steps
    return found


@case
def outer(_: Path) -> Any:
    """Replicas that differ at first and are averaged now and then, and the same by hand."""
    found = {}
    for name, options in (
        ("noloco", {"every": 2, "final_average": True}),
        ("diloco", {"every": 3}),
        ("local_sgd", {"every": 2}),
    ):
        net = module_class()(sgd)
        with torch.no_grad():
            net.net[0].bias.add_(dist.get_rank())  # which starting together undoes
        trainer = trainer_of(strategy_of({"name": name, **options}))
        trainer.fit(net, zeros(200), zeros(4))
        model: Any = make_model()
        attachment: Any = plain.attach(model, build({"name": name, **options}), optimizer := sgd(model))
        attachment.join()
        train(model, optimizer, dist.get_rank(), STEPS)
        attachment.finish()
        attachment.close()
        rounds = [len(trainer.strategy.attachment.reports), len(attachment.reports)]
        is_wrapped = isinstance(trainer.strategy.model, DistributedDataParallel)
        found[name] = flat(net), flat(model), rounds, net.payload_mb, is_wrapped
    return found


@case
def refused(folder: Path) -> Any:
    """What each misuse is told, on every rank."""

    def manual(net: Any) -> Any:
        net.automatic_optimization = False
        return net

    def frozen(net: Any) -> Any:
        net.requires_grad_(False)
        return net

    def attempt(
        change: Any = None, method: Any = "onebit_adam", configure: Any = adam, given: Any = None, **options: Any
    ) -> str:
        try:
            strategy = strategy_of(method, **(given or {}))
            net = module_class()(configure)
            trainer_of(strategy, **options).fit((change or copy.copy)(net), zeros(200), zeros(4))
        except (CommoptError, TypeError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def differing(net: Any) -> Any:
        return adam(net) if dist.get_rank() else torch.optim.Adam(net.parameters(), lr=0.02)

    def one_fails(net: Any) -> Any:
        return sgd(net) if dist.get_rank() else adam(net)

    update = build("onebit_adam", make_model().named_parameters())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*configure_optimizers. returned .None.")  # what is tried here
        answers = {"no optimizer": attempt(configure=lambda net: None)}
    answers |= {
        "unknown": attempt(method="dcg"),
        "value": attempt(method={"name": "dgc", "density": 2}),
        "update option": attempt(method={"name": "onebit_adam", "freeze_step": -1}),
        "instance": attempt(method=update),
        "hook": attempt(given={"ddp_comm_hook": print}),
        "option": attempt(given={"find_unused_parameter": True}),
        "outer option": attempt(method="noloco", given={"bucket_cap_mb": 1}),
        "outer overlap": attempt(method="noloco", given={"overlap": False}),
        "nothing": attempt(method=None),
        "both": attempt(configure=lambda net: build("onebit_adam", net.named_parameters())),
        "kind": attempt(configure=sgd),
        "clip": attempt(gradient_clip_val=1.0),
        "norm": attempt(method={"name": "ef_sign", "max_norm": 1.0}, configure=sgd, given={"overlap": True}),
        "manual": attempt(manual),
        "frozen": attempt(frozen),
        "rate": attempt(method={"name": "onebit_adam", "lr": 0.1}, configure=lambda net: scheduled(net, "lambda")),
        "ranks": attempt(configure=differing),
        "one rank": attempt(configure=one_fails),
        "bn": attempt(method="noloco", configure=sgd, sync_batchnorm=True),
        "fine": attempt(),
    }
    built = build("ef_sign")
    answers["first"], answers["second"] = (attempt(method=built, configure=sgd) for _ in range(2))
    fit_and_write(folder / "other", "ef_sign", sgd)
    try:
        fit_and_write(folder / "other", {"name": "top_k", "density": 0.1}, sgd, folder / "other" / "step=3.ckpt")
    except CommoptError as error:
        answers["other method"] = f"{type(error).__name__}: {error}"
    return answers


@case
def again(folder: Path) -> Any:
    """A strategy by its name, for two fits, with a validation and a checkpoint in between."""
    configure = lambda net: build("onebit_adam", net.named_parameters(), lr=0.01, freeze_step=FREEZE)  # noqa: E731
    net, trainer = fit(None, configure, strategy="commopt")
    first, sent = flat(net), trainer.strategy.attachment.group.traffic.payload_bytes
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using .DistributedSampler.")  # advice for benchmarks
        trainer.validate(net, zeros(4), verbose=False)
    trainer.save_checkpoint(folder / "after.ckpt")
    stored = torch.load(folder / "after.ckpt", weights_only=True)["commopt"]
    other = module_class()(configure)
    trainer.fit_loop.epoch_loop.max_steps = 2 * STEPS
    trainer.fit(other, zeros(200), zeros(4))
    return (
        first,
        sent,
        len(stored["parts"]),
        stored["method"],
        trainer.strategy.attachment.steps,
        len(trainer.callbacks),
    )


@case
def example(folder: Path) -> Any:
    """What launch/lightning_train.py prints."""
    launch = Path(__file__).parents[2] / "launch"
    corpus = folder / f"corpus {dist.get_rank()}"
    corpus.write_bytes(bytes(range(32, 127)) * 900)
    words = f"--steps 6 --layers 1 --width 16 --method onebit_adam --save {folder}/example.ckpt --corpus".split()
    sys.argv[1:] = [*words, str(corpus), "--options", '{"freeze_step": 3}']
    sys.path.insert(0, str(launch))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(str(launch / "lightning_train.py"), run_name="__main__")
    sys.path.remove(str(launch))
    return printed.getvalue()


def work(rank: int, folder: Path, names: list[str]) -> None:
    """Be one rank: carry out the cases, and write down what they return."""
    warnings.simplefilter("error")
    # Lightning's advice on speed, which tiny runs do not need
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message=".*number of training batches")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*deprecated")  # Lightning's own use of torch's trees
    # the cases draw a batch by its step, which needs no state of a loader
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable")
    warnings.filterwarnings("ignore", message="Checkpoint directory .* is not empty")
    torch.set_num_threads(1)
    for name in names or CASES:
        answer = CASES[name](folder)
        torch.save(answer, folder / f"{name}.{rank}")


def main() -> None:
    try:
        work(int(os.environ["RANK"]), Path(sys.argv[1]), sys.argv[2:])
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(1)  # the other rank is not waited for


# -- what the tests look at


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
    words = [sys.executable, "-c", "import test_lightning; test_lightning.main()", str(folder)]
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
def test_schedulers_act_on_the_optimizer_that_took_adams_place(answers: dict[str, list[Any]], kind: str) -> None:
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
        if is_update_method(name):
            assert f"holds no state of {name}" in without
        else:
            assert not torch.equal(without, straight)


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
    "no optimizer": "AttachError: configure_optimizers returned no optimizer",
    "unknown": "ConfigError: unknown method 'dcg'; did you mean 'dgc'?",
    "value": "ConfigError: method dgc: density: 2 is out of range",
    "update option": "ConfigError: method onebit_adam: freeze_step: -1 is out of range",
    "instance": "AttachError: OnebitAdam is an optimizer: return it from configure_optimizers",
    "hook": "ConfigError: ddp_comm_hook: the method is the communication hook here",
    "option": "ConfigError: find_unused_parameter: unknown option of DDPStrategy; did you mean 'find_unused_parameters'?",
    "outer option": "ConfigError: bucket_cap_mb: an outer method trains without DDP",
    "outer overlap": "ConfigError: overlap: an outer method exchanges no gradients",
    "nothing": "AttachError: CommoptStrategy has no method, and configure_optimizers returned Adam",
    "both": "AttachError: configure_optimizers returned onebit_adam, which is a method itself",
    "kind": "ConfigError: method onebit_adam is an optimizer itself and can stand in for Adam or AdamW, not for SGD",
    "clip": "AttachError: gradient_clip_val: onebit_adam has exchanged its momentum when the Trainer clips",
    "norm": "AttachError: max_norm needs the gradients of all buckets at once",
    "manual": "AttachError: manual optimization: gradients are exchanged in backward",
    "frozen": "AttachError: the model has no trainable parameter",
    "rate": "AttachError: lr: 0.1 of onebit_adam would be overwritten by the scheduler",
    "ranks": "AttachError: the ranks' configurations differ: optimizer.groups.0.lr is 0.02 on rank 0 and 0.01 on rank 1",
    "bn": "AttachError: sync_batchnorm: it exchanges in every step",
    "second": "AttachError: this ef_sign was attached to a model before; build another one",
    "other method": "CheckpointError: the checkpoint was saved under ef_sign, not top_k",
}


@pytest.mark.parametrize("what", SAID)
def test_what_does_not_fit_is_refused_with_the_reason_on_every_rank(answers: dict[str, list[Any]], what: str) -> None:
    for found in answers["refused"]:
        assert found[what].startswith(SAID[what])


def test_what_fails_on_one_rank_fails_on_all(answers: dict[str, list[Any]]) -> None:
    told, failed = (found["one rank"] for found in answers["refused"])
    assert failed.startswith("ConfigError: method onebit_adam is an optimizer itself")
    assert told.startswith(
        "AttachError: rank 1 could not attach: ConfigError: method onebit_adam is an optimizer itself"
    )


def test_training_goes_on_after_what_was_refused(answers: dict[str, list[Any]]) -> None:
    assert all(found["fine"] == found["first"] == "" for found in answers["refused"])


def test_a_strategy_by_its_name_takes_the_method_from_configure_optimizers(answers: dict[str, list[Any]]) -> None:
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
        importlib.import_module("commopt.integrations.lightning")
