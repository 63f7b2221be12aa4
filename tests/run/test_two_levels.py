"""Machines with several ranks: what is exchanged between them, beside one rank for each machine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from exchanges import every_operation, expected
from level_rig import Net, gradient, start, train
from presets import PRESETS, Preset, sgd
from rig import flat
from torch import Tensor, nn

import commopt
from commopt.errors import AttachError, GroupError
from commopt.groups import Group, LocalGroup, SimGroup, SimWorld
from commopt.plan.links import LinkModel

STEPS, SAVED_AT = 8, 5
CASES = [
    *(preset for preset in PRESETS if preset.name != "dice_sgd"),
    Preset("ef_sign", {"scale": "l2", "residual_bits": 8}),
    Preset("ef21(sign)", {"server": {"compressor": "top_k", "density": 0.2}}, sgd(0.1)),
    Preset("two_way", {"worker": "4bit", "server": "fp8", "residual_bits": 8, "dense_1d": True}),
]
RESIZED = ("ef21", "dgc", "powersgd", "zero_one_adam", "distributed_lion", "loco")
SENT = ("dense", "two_way", "dgc", "powersgd")  # one of each kind


def on_machines(group: SimGroup, per_machine: int, lone: bool) -> tuple[Group, list[int]]:
    """The group of a rank, and whose gradients it has: its own, or as a lone rank those of its machine."""
    if lone:
        return group, list(range(per_machine * group.rank, per_machine * (group.rank + 1)))
    return group.by_machine(per_machine), [group.rank]


@pytest.mark.parametrize(
    ("number", "preset"), list(enumerate(CASES)), ids=lambda x: str(x) if isinstance(x, Preset) else ""
)
def test_machines_are_single_ranks_with_their_mean_gradients_bit_for_bit(number: int, preset: Preset) -> None:
    machines, per_machine = [(3, 2), (2, 3)][number % 2]

    def work(group: SimGroup, lone: bool) -> tuple[Tensor, list[Any], float, bool]:
        ours, ranks = on_machines(group, per_machine, lone)
        run = start(preset, ours, 8000)
        trained, voided = train(run, range(STEPS), ranks, (6, machines * per_machine - 1))
        run.finish()
        return trained, voided, run.traffic.payload_bytes, run.replicas_are_equal()

    alone = SimWorld[Any](machines).run(lambda group: work(group, True))
    shared = SimWorld[Any](machines * per_machine).run(lambda group: work(group, False))
    for rank, (trained, voided, _, are_equal) in enumerate(shared):
        assert torch.equal(trained, alone[0][0])
        assert voided == alone[rank // per_machine][1]
        assert are_equal
    for machine, (*_, sent, _) in enumerate(alone):  # each of its ranks adds headers, and pads nothing in a gather
        of_machine = sum(sent for *_, sent, _ in shared[machine * per_machine : (machine + 1) * per_machine])
        assert 0.8 * sent <= of_machine <= 1.12 * sent


@pytest.mark.parametrize("preset", [preset for preset in PRESETS if preset.name in SENT], ids=str)
def test_a_machine_sends_what_one_rank_would(preset: Preset) -> None:
    def work(group: SimGroup, lone: bool) -> float:
        ours, _ = on_machines(group, 2, lone)
        net = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 256))
        run = commopt.attach(net, preset.method(), preset.optimizer(net), group=ours)
        for step in range(6):
            for k, p in enumerate(net.parameters()):
                p.grad = gradient(group.rank, step, k, p.shape)
            run.optimizer.step()
        return run.traffic.payload_bytes

    alone = SimWorld[float](3).run(lambda group: work(group, True))
    shared = SimWorld[float](6).run(lambda group: work(group, False))
    for machine in range(3):
        assert sum(shared[2 * machine : 2 * machine + 2]) == pytest.approx(alone[machine], rel=0.02)


def begin(group: SimGroup, preset: Preset, folder: Path, lone: bool = False) -> Tensor:
    """Train, and save in the middle."""
    ours, ranks = on_machines(group, 2, lone)
    run = start(preset, ours)
    train(run, range(SAVED_AT), ranks)
    run.save(folder)
    return train(run, range(SAVED_AT, STEPS), ranks)[0]


def go_on(group: SimGroup, preset: Preset, folder: Path, per_machine: int) -> Tensor:
    """Load what two ranks of each machine, or one, saved; each machine has the gradients of two ranks."""
    run = start(preset, group if per_machine == 1 else group.by_machine(per_machine))
    run.load(folder)
    machine = group.rank // per_machine
    return train(run, range(SAVED_AT, STEPS), [2 * machine, 2 * machine + 1])[0]


@pytest.mark.parametrize("preset", CASES, ids=str)
def test_machines_go_on_bit_for_bit_with_as_many_ranks_or_others(preset: Preset, tmp_path: Path) -> None:
    whole = SimWorld[Tensor](4).run(lambda group: begin(group, preset, tmp_path / "a"))[0]
    for ranks, per_machine in ((4, 2), (6, 3)):
        for trained in SimWorld[Tensor](ranks).run(lambda group: go_on(group, preset, tmp_path / "a", per_machine)):  # noqa: B023
            assert torch.equal(trained, whole)


@pytest.mark.parametrize("preset", [preset for preset in CASES if preset.name in RESIZED], ids=str)
def test_machines_that_are_more_or_have_one_rank_go_on_as_lone_ranks_would(preset: Preset, tmp_path: Path) -> None:
    SimWorld[Tensor](4).run(lambda group: begin(group, preset, tmp_path / "two"))
    whole = SimWorld[Tensor](2).run(lambda group: begin(group, preset, tmp_path / "one", True))[0]
    for ranks, per_machine, folder in ((2, 1, "two"), (4, 2, "one")):
        for trained in SimWorld[Tensor](ranks).run(lambda group: go_on(group, preset, tmp_path / folder, per_machine)):  # noqa: B023
            assert torch.equal(trained, whole)
    fewer = SimWorld[Tensor](3).run(lambda group: go_on(group, preset, tmp_path / "one", 1))
    for trained in SimWorld[Tensor](6).run(lambda group: go_on(group, preset, tmp_path / "two", 2)):
        assert torch.equal(trained, fewer[0])


@pytest.mark.parametrize(("name", "options"), [("dense", {}), ("ef_sign", {}), ("dgc", {"density": 0.1})])
def test_gradients_are_clipped_by_the_norm_of_the_machines_means(name: str, options: dict[str, Any]) -> None:
    preset = Preset(name, options, sgd(0.1))

    def work(group: SimGroup, lone: bool) -> Tensor:
        ours, ranks = on_machines(group, 2, lone)
        return train(start(preset, ours, max_norm=0.5), range(4), ranks)[0]

    shared = SimWorld[Tensor](4).run(lambda group: work(group, False))
    alone = SimWorld[Tensor](2).run(lambda group: work(group, True))
    torch.testing.assert_close(shared[0], alone[0], rtol=0, atol=1e-6)
    assert all(torch.equal(one, shared[0]) for one in shared)


def test_without_communication_a_machine_trains_alone() -> None:
    def work(group: SimGroup) -> tuple[Tensor, float]:
        run = start(Preset("ef_sign"), group.by_machine(2))
        before = run.traffic.payload_bytes
        with run.communication_off():
            train(run, range(3), [group.rank])
        return flat(run.model), run.traffic.payload_bytes - before

    trained = SimWorld[Any](4).run(work)
    assert torch.equal(trained[0][0], trained[1][0])
    assert not torch.equal(trained[0][0], trained[2][0])
    assert all(sent == 0 for _, sent in trained)


def test_a_world_is_a_group_of_all_its_ranks() -> None:
    def work(group: SimGroup) -> None:
        world, rank = group.by_machine(2), group.rank
        assert (world.rank, world.size, world.per_machine) == (rank, 6, 2)
        assert every_operation(world, torch.device("cpu")) == expected(rank, 6)
        assert world.tell(f"rank {rank}") == [f"rank {k}" for k in range(6)]
        assert set(world.traffic.by_peer) <= {k for k in range(6) if k // 2 != rank // 2}

    SimWorld[None](6).run(work)


def test_simulated_links_are_between_machines() -> None:
    links = LinkModel((0, 0, 1, 1), (1e6, 1e6), (0.0, 0.0), (0, 0))

    def work(group: SimGroup) -> float:
        world = group.by_machine(2)
        world.between.all_reduce(torch.zeros(1000))  # by both of a machine's ranks: 8,000 bytes through its card
        assert world.inside is not None
        world.inside.all_reduce(torch.zeros(1000))
        return group.seconds

    assert SimWorld[float](4, links).run(work) == pytest.approx([8e-3] * 4)
    with pytest.raises(ValueError, match="are not machines of 3 ranks"):
        SimWorld[Any](4).run(lambda group: group.by_machine(3))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Preset("dice_sgd").method(), "dice_sgd in this form on machines with several ranks"),
        (
            lambda: Preset("ef_sign", {"scale": "model"}).method(),
            "ef_sign in this form .*group=commopt.groups.TorchGroup",
        ),
    ],
)
def test_what_machines_cannot_share_out_is_refused(make: Callable[[], Any], said: str) -> None:
    def work(group: SimGroup) -> None:
        net = Net()
        commopt.attach(net, make(), torch.optim.SGD(net.parameters(), lr=0.1), group=group.by_machine(2))

    with pytest.raises(AttachError, match=said):
        SimWorld[None](4).run(work)


def test_a_world_of_unequal_machines_is_refused() -> None:
    def work(group: SimGroup) -> None:
        inside: Group = LocalGroup() if group.rank == 0 else SimGroup(group.world, group.rank, (1, 2))
        commopt.World(inside, SimGroup(group.world, group.rank, (0, 1)) if group.rank < 2 else LocalGroup())

    with pytest.raises(GroupError, match="machines have 1, 2 ranks: start as many on each"):
        SimWorld[None](3).run(work)


def test_gradients_may_travel_in_bfloat16_inside() -> None:
    def work(group: SimGroup, dtype: torch.dtype | None) -> tuple[Tensor, float]:
        world = group.by_machine(2)
        world.inner_dtype = dtype
        trained, _ = train(start(Preset("two_way", {}, sgd(0.1)), world), range(3), [group.rank])
        inside: Any = world.inside
        return trained, inside.traffic.nbytes["", "all_to_all", ""]

    exact, rounded = (SimWorld[Any](4).run(partial(work, dtype=dtype)) for dtype in (None, torch.bfloat16))
    assert torch.equal(exact[0][0], rounded[0][0])  # these gradients have 7 bits
    assert rounded[0][1] < 0.51 * exact[0][1]
