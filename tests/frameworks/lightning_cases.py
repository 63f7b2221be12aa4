"""What the ranks of test_lightning.py do: Lightning's own Trainer in many cases, and the same by hand."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import runpy
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rig import FREEZE, METHODS, flat, loss_of, make_batch, make_method, make_model, train
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from commopt import attach, build
from commopt.errors import CommoptError
from commopt.groups import LocalGroup, SimWorld
from commopt.optim import make_optimizer
from commopt.run import storage

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


def strategy_of(method: Any, **options: Any) -> Any:
    from commopt.frameworks.lightning import CommoptStrategy

    return CommoptStrategy(method, timeout=timedelta(seconds=200), **options)


def fit(method: Any, configure: Any, ckpt_path: Any = None, given: Any = None, **options: Any) -> tuple[Any, Any]:
    """(module, trainer) after a fit; given: options of the strategy."""
    net = module_class()(configure)
    trainer = trainer_of(strategy_of(method, **(given or {})), **options)
    trainer.fit(net, zeros(200), zeros(4), ckpt_path=ckpt_path)
    return net, trainer


def fit_and_write(folder: Path, method: Any, configure: Any, ckpt_path: Any = None) -> tuple[Any, Any]:
    """A fit with a checkpoint at every third step."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    writer = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    return fit(method, configure, ckpt_path, callbacks=[writer], enable_checkpointing=True)


def choice_of(name: str) -> tuple[dict[str, Any], Any]:
    """A case of the rig as a choice, and what `configure_optimizers` returns for it."""
    method, options, block = METHODS[name]
    return {"name": method, **options}, lambda net: make_optimizer(block, net.parameters())


@contextlib.contextmanager
def by_ddp(name: str, **options: Any) -> Iterator[Any]:
    """(DDP model, optimizer that steps, run): the same by hand."""
    model = DistributedDataParallel(make_model())
    run = attach(model, *make_method(name, model.module), **options)
    yield model, run.optimizer, run
    run.close()


@case
def equal_to_ddp(_: Path) -> Any:
    found = {}
    for name in COMPARED:
        choice, configure = choice_of(name)
        net, trainer = fit(choice, configure)
        run = trainer.strategy.run
        with by_ddp(name) as (model, optimizer, by_hand):
            train(model, optimizer, dist.get_rank(), STEPS)
        sent = [one.traffic.payload_bytes for one in (run, by_hand)]
        found[name] = flat(net), flat(model.module), sent, net.payload_mb, run.replicas_are_equal()
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
    by_method, _trainer = fit(choice, configure, given={"max_norm": 0.05})
    with by_ddp("onebit_adam l1", max_norm=0.05) as (other, optimizer, _by_hand):
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
        found[f"{name} scaled"] = flat(net), flat(model.module), trainer.strategy.run.replicas_are_equal()
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
        net, trainer = fit(choice, lambda net, kind=kind: scheduled(net, kind))
        stepping = trainer.strategy.run.optimizer
        is_shared = stepping.param_groups is trainer.lr_scheduler_configs[0].scheduler.optimizer.param_groups
        acts_on_what_steps = is_shared and stepping is trainer.optimizers[0]
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
    found: dict[str, Any] = {}
    for name, choice in RESUMED.items():
        configure = sgd if name in ("ef_sign", "dgc") else adam
        place = folder / f"checkpoints of {name}"
        straight, trainer = fit_and_write(place, choice, configure)
        again, _trainer = fit_and_write(place, choice, configure, place / "step=3.ckpt")
        if dist.get_rank() == 0:
            rewrite(place, "without", None)
            rewrite(place, "four", {"ranks": 4})
            rewrite(place, "lonely", {})
            (place / "link.ckpt").symlink_to("step=3.ckpt")
        dist.barrier()
        without = attempt_to_resume(place / "without.ckpt", choice, configure)
        found[name] = flat(again), flat(straight), without, trainer.strategy.run.steps
    place = folder / "checkpoints of ef_sign"
    found["refused"] = {
        "other method": attempt_to_resume(place / "step=3.ckpt", {"name": "top_k", "density": 0.1}, sgd),
        "no folder": attempt_to_resume(place / "lonely.ckpt", RESUMED["ef_sign"], sgd),
        "other ranks": attempt_to_resume(folder / "checkpoints of noloco" / "four.ckpt", RESUMED["noloco"], adam),
    }
    if dist.get_rank() == 0:
        shutil.move(place / "step=6.ckpt.commopt", place / "lonely.ckpt.commopt")
        save_as_four(place)
    dist.barrier()
    found["refused"]["other step"] = attempt_to_resume(place / "lonely.ckpt", RESUMED["ef_sign"], sgd)
    linked, four = (attempt_to_resume(place / name, RESUMED["ef_sign"], sgd) for name in ("link.ckpt", "four.ckpt"))
    found["linked"] = linked, found["ef_sign"][1]
    found["four ranks"] = four, found["ef_sign"][2]
    return found


def attempt_to_resume(checkpoint: Path, choice: Any, configure: Any) -> Any:
    """The parameters after a fit from a checkpoint, or the error."""
    try:
        return flat(fit_and_write(checkpoint.parent, choice, configure, checkpoint)[0])
    except CommoptError as error:
        return f"{type(error).__name__}: {error}"


def rewrite(folder: Path, name: str, said: dict[str, Any] | None) -> None:
    """A checkpoint that says something else of the folder beside it, or nothing, and has none."""
    stored = torch.load(folder / "step=3.ckpt", weights_only=True)
    own = stored.pop("commopt")
    torch.save(stored if said is None else {**stored, "commopt": {**own, **said}}, folder / f"{name}.ckpt")


def save_as_four(folder: Path) -> None:
    """The method's state of twice as many ranks, each of which has as much to send as another."""
    stored = storage.open_checkpoint(folder / "step=3.ckpt.commopt" / "commopt", LocalGroup())
    content = [storage.Content(stored.shared(), stored.own(rank % 2), stored.meta) for rank in range(4)]
    place = folder / "four.ckpt.commopt" / "commopt"
    SimWorld[None](4).run(lambda group: storage.save(place, content[group.rank], group))


@case
def interrupted(folder: Path) -> Any:
    """What is written after an error."""
    from lightning.pytorch.callbacks import LambdaCallback

    writer = LambdaCallback(on_exception=lambda trainer, *_: trainer.save_checkpoint(folder / "error.ckpt", False))
    net = module_class()(sgd)
    net.on_before_zero_grad = lambda _: 1 / (3 - net.trainer.global_step)
    trainer = trainer_of(strategy_of("ef_sign"), callbacks=[writer])
    with contextlib.suppress(ZeroDivisionError):
        trainer.fit(net, zeros(200), zeros(4))
    stored = torch.load(folder / "error.ckpt", weights_only=True)
    has_state = "commopt" in stored or (folder / "error.ckpt.commopt").exists()
    return stored["global_step"], sorted(stored["optimizer_states"][0]), has_state


@case
def kept(folder: Path) -> Any:
    """What is left of the checkpoints of a training that keeps the best one alone."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    place = folder / "kept"
    writer = ModelCheckpoint(
        place, filename="{step}", every_n_train_steps=2, monitor="loss", mode="max", save_last=True
    )
    fit("ef_sign", sgd, callbacks=[writer], enable_checkpointing=True)
    return sorted(one.name for one in place.iterdir()), Path(writer.best_model_path).name


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
        model = make_model()
        run = attach(model, {"name": name, **options}, sgd(model))
        run.join()
        train(model, run.optimizer, dist.get_rank(), STEPS)
        run.finish()
        run.close()
        rounds = [len(trainer.strategy.run.reports), len(run.reports)]
        is_wrapped = isinstance(trainer.strategy.model, DistributedDataParallel)
        found[name] = flat(net), flat(model), rounds, net.payload_mb, is_wrapped
    return found


@case
def refused(_: Path) -> Any:
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

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*configure_optimizers. returned .None.")  # what is tried here
        answers = {"no optimizer": attempt(configure=lambda net: None)}
    answers |= {
        "unknown": attempt(method="dcg"),
        "value": attempt(method={"name": "dgc", "density": 2}),
        "update option": attempt(method={"name": "onebit_adam", "freeze_step": -1}),
        "rate": attempt(method={"name": "onebit_adam", "lr": 0.1}),
        "hook": attempt(given={"ddp_comm_hook": print}),
        "option": attempt(given={"find_unused_parameter": True}),
        "outer option": attempt(method="noloco", given={"bucket_cap_mb": 1}),
        "outer overlap": attempt(method="noloco", given={"overlap": False}),
        "kind": attempt(configure=sgd),
        "clip": attempt(gradient_clip_val=1.0),
        "norm": attempt(method="ef_sign", configure=sgd, given={"overlap": True, "max_norm": 1.0}),
        "manual": attempt(manual),
        "frozen": attempt(frozen),
        "ranks": attempt(configure=differing),
        "one rank": attempt(configure=one_fails),
        "bn": attempt(method="noloco", configure=sgd, sync_batchnorm=True),
        "fine": attempt(),
    }
    built = build("ef_sign")
    answers["first"], answers["second"] = (attempt(method=built, configure=sgd) for _ in range(2))
    return answers


@case
def again(folder: Path) -> Any:
    """A strategy for two fits, with a validation and a checkpoint in between."""
    net, trainer = fit({"name": "onebit_adam", "freeze_step": FREEZE}, adam)
    first, sent = flat(net), trainer.strategy.run.traffic.payload_bytes
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using .DistributedSampler.")  # advice for benchmarks
        trainer.validate(net, zeros(4), verbose=False)
    trainer.save_checkpoint(folder / "after.ckpt")
    stored = torch.load(folder / "after.ckpt", weights_only=True)["commopt"]
    other = module_class()(adam)
    trainer.fit_loop.epoch_loop.max_steps = 2 * STEPS
    trainer.fit(other, zeros(200), zeros(4))
    return (
        first,
        sent,
        stored["ranks"],
        stored["method"],
        trainer.strategy.run.steps,
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
