"""Other ways into an engine than our `initialize`: attach, Accelerate, and a `commopt` block that was read too late."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed_rig import ADAM, SGD, log, make_engine, train
from framework_ranks import new_accelerator
from rig import loss_of, make_batch, make_model
from torch import Tensor, nn

import commopt
from commopt.errors import AttachError
from commopt.run.stand_in import StandIn

STEPS = 3
on_two_ranks = pytest.mark.ranks("deepspeed", 2)


# -- clipping


@pytest.mark.parametrize(
    ("own", "norm"), [({}, 1.0), ({"gradient_clipping": 0.5}, 0.5), ({"gradient_clipping": 0.0}, None)]
)
@on_two_ranks
def test_gradient_clipping_is_the_max_norm_of_an_update_method(own: dict[str, float], norm: float | None) -> None:
    from commopt.deepspeed import initialize

    model = make_model()
    config = {"train_micro_batch_size_per_gpu": 8, **ADAM, "commopt": "onebit_adam", **own}
    with log() as told:
        engine = initialize(model=model, model_parameters=model.parameters(), config=config)[0]
    assert engine.commopt.max_norm == norm
    is_told = any("DeepSpeed then clips to a norm of 1.0" in line for line in told)
    assert is_told == (not own and engine.global_rank == 0)


# -- half precision


@pytest.mark.parametrize("half", ["bf16", "fp16"])
@on_two_ranks
def test_deepspeeds_dry_step_on_zeros_leaves_nothing_behind(half: str) -> None:
    adam = {"type": "AdamW", "params": {"lr": 0.1, "weight_decay": 0.5, "torch_adam": True}}
    engine = make_engine({"optimizer": adam, half: {"enabled": True}}, ours=False)
    run = commopt.attach(engine, "onebit_adam")
    for low, master in zip(engine.optimizer.fp16_groups[0], engine.optimizer.fp32_groups[0], strict=True):
        assert torch.equal(low.float(), master)
    train(engine, 1)
    assert int(run.method.state["steps"]) == 1
    assert isinstance(engine.optimizer.optimizer, StandIn)


# -- a block that was read too late


@on_two_ranks
def test_a_block_that_was_read_too_late_is_not_passed_over() -> None:
    """Engines made by deepspeed.initialize without install()."""
    own = {**SGD, "commopt": {"method": "dgc", "density": 0.1}}
    words = (
        r"'dgc', 'density': 0.1} in the configuration has had no effect.*commopt.deepspeed.install\(\) was not called"
    )
    for method in ("ef_sign", "dgc"):
        with pytest.raises(AttachError, match=words):
            commopt.attach(make_engine(own, ours=False), method)
    engine = make_engine(own, ours=False)
    commopt.attach(engine, {"dgc": {"density": 0.1}}).close()
    commopt.attach(engine, "ef_sign")  # the block has been answered


# -- Accelerate


def prepared(with_schedule: bool = False, **config: Any) -> tuple[Any, ...]:
    """(accelerator, what it has prepared, the optimizer inside)"""
    from accelerate import DeepSpeedPlugin

    config |= {"train_micro_batch_size_per_gpu": 8, "gradient_clipping": 0.0, "zero_optimization": {"stage": 0}}
    # on CPUs Accelerate counts one process under DeepSpeed, which trains with two
    accelerator = new_accelerator(cpu=False, deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    model = make_model()
    adam = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: float(0.5**step))
    return accelerator, *accelerator.prepare(model, adam, *([schedule] if with_schedule else [])), adam


def step(accelerator: Any, engine: Any, optimizer: Any, number: int) -> None:
    x, y = make_batch(engine.global_rank, number)
    accelerator.backward(loss_of(engine(x), y))
    optimizer.step()


@on_two_ranks
def test_accelerates_schedule_goes_on_in_an_engine() -> None:
    accelerator, engine, optimizer, schedule, adam = prepared(True)
    before = [p.clone() for p in engine.module.parameters()]
    with pytest.raises(AttachError, match="overlap=True with a DeepSpeed engine"):
        commopt.attach(engine, "ef_sign", optimizer, overlap=True)
    run = commopt.attach(engine, {"onebit_adam": {"freeze_step": 2}}, optimizer)
    for number in range(STEPS):
        step(accelerator, engine, optimizer, number)
        schedule.step()
        assert run.optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == 0.01 * 0.5 ** (number + 1)
    assert all(not torch.equal(p, q) for p, q in zip(before, engine.module.parameters(), strict=True))
    assert run.replicas_are_equal()
    assert run.steps == STEPS
    assert isinstance(optimizer.optimizer, StandIn)
    with pytest.raises(AttachError, match="has taken the place of this AdamW"):
        adam.step()


@on_two_ranks
def test_after_install_accelerates_own_engine_reads_the_block() -> None:
    import deepspeed

    from commopt.deepspeed import install

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepspeed.DeepSpeedEngine, "__init__", deepspeed.DeepSpeedEngine.__init__)  # back at the end
        install()
        accelerator, engine, optimizer, _ = prepared(commopt="onebit_adam")
    step(accelerator, engine, optimizer, 0)
    assert engine.commopt.method.name == "onebit_adam"
    assert isinstance(engine.optimizer, StandIn)
    assert isinstance(optimizer.optimizer, StandIn)


# -- the configurations of DeepSpeed's tutorials for its old optimizers, with batches and steps shrunk

CONFIGS = Path(__file__).parents[2] / "configs" / "deepspeed"


class Bert(nn.Module):
    """The tutorials' models in small: sums over a vocabulary, and more than one kind of parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 50)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.layer(self.words(x))).flatten(0, 1).float(), x.flatten())


TUTORIALS = sorted(path.name for path in CONFIGS.glob("*.json") if path.name.startswith(("bert", "squad")))


@pytest.mark.parametrize("name", TUTORIALS)
@on_two_ranks
def test_configurations_of_the_old_tutorials_load_and_train(name: str) -> None:
    from commopt.deepspeed import initialize

    assert len(TUTORIALS) == 4
    torch.manual_seed(1)
    model = Bert()
    decays = [p for p in model.parameters() if p.dim() > 1]
    rest = [{"params": decays, "weight_decay": 0.01}, {"params": [p for p in model.parameters() if p.dim() < 2]}]
    engine, optimizer, _, _ = initialize(model=model, model_parameters=rest, config=str(CONFIGS / name))
    assert optimizer is engine.optimizer
    losses = []
    for step in range(60):
        generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
        loss = engine(torch.randint(50, (2, 8), generator=generator))
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    steps = engine.commopt.method.applied_steps
    engine.commopt.finish()
    assert sum(losses[-8:]) < sum(losses[:8])
    assert engine.commopt.replicas_are_equal()
    accumulation = json.loads((CONFIGS / name).read_text())["train_batch_size"] // (3 if "squad" in name else 2) // 2
    assert 60 // accumulation - 20 < steps <= 60 // accumulation  # at a scale of 2^16 the first ones overflow
