"""The race of scripts/bench/step.py: what the re-implemented formats send and lose, the common clock, and what is said of stored cells."""

from __future__ import annotations

import math
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from script import module
from torch import Tensor, nn

bench, race, formats, ranks = (module(name) for name in ("step", "step_race", "step_formats", "step_ranks"))
sheets, store = module("sheets"), module("store")
RANKS = 4


# ---- formats ---------------------------------------------------------------------------------------------------------


class Threads:
    """The part of torch.distributed that the formats call, for ranks that are threads."""

    def __init__(self) -> None:
        self.mine, self.barrier, self.table = threading.local(), threading.Barrier(RANKS), [Any] * RANKS

    def run(self, job: Callable[[int], Any]) -> list[Any]:
        def rank(k: int) -> Any:
            self.mine.rank = k
            return job(k)

        with ThreadPoolExecutor(RANKS) as pool:
            return list(pool.map(rank, range(RANKS)))

    def meet(self, part: Any) -> list[Any]:
        self.table[self.mine.rank] = part
        self.barrier.wait(20)
        parts = list(self.table)
        self.barrier.wait(20)
        return parts

    def get_rank(self) -> int:
        return int(self.mine.rank)

    def get_world_size(self) -> int:
        return RANKS

    def all_reduce(self, x: Tensor) -> None:
        x.copy_(sum(self.meet(x.clone())))

    def all_gather(self, every: list[Tensor], x: Tensor, async_op: bool) -> Any:
        for place, part in zip(every, self.meet(x.clone()), strict=True):
            place.copy_(part)
        return Done()

    def all_to_all_single(self, out: Tensor, x: Tensor, out_sizes: list[int], sizes: list[int]) -> None:
        parts = self.meet(torch.split(x, sizes))
        out.copy_(torch.cat([part[self.mine.rank] for part in parts]))


class Done:
    """A call that has ended already."""

    def wait(self) -> None: ...


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Threads:
    made = Threads()
    monkeypatch.setattr(formats, "dist", made)
    return made


def settings(name: str, optimizer: str = "adamw", lr: float = 0.01) -> dict[str, Any]:
    return {"options": race.OPTIONS[name], "optimizer": {"name": optimizer, "lr": lr}}


def fitted(name: str, threads: Threads, steps: int) -> list[tuple[list[Tensor], float, float]]:
    """A line fitted by all ranks: parameters, the loss, and bytes sent per element and step, by rank."""

    def job(rank: int) -> tuple[list[Tensor], float, float]:
        generator = torch.Generator().manual_seed(0)
        model = nn.Linear(64, 128)
        with torch.no_grad():
            for p in model.parameters():
                p.normal_(generator=generator)
        wanted = torch.randn(128, 64, generator=generator)
        wire = formats.Wire()
        optimizer = formats.FORMATS[name](model, settings(name), wire)
        data = torch.Generator().manual_seed(1 + rank)
        for _ in range(steps):
            x = torch.randn(16, 64, generator=data)
            optimizer.zero_grad()
            (model(x) - x @ wanted.T).square().mean().backward()
            optimizer.step()
        n = sum(p.numel() for p in model.parameters())
        distance = float((model.weight.detach() - wanted).square().mean())
        return [p.detach() for p in model.parameters()], distance, wire.traffic.payload_bytes / n / steps

    return threads.run(job)


@pytest.mark.parametrize("name", formats.FORMATS)
def test_every_format_gets_nearer_and_replicas_agree(name: str, threads: Threads) -> None:
    start, end = (fitted(name, threads, steps) for steps in (1, 20))
    apart = max(float((a - b).abs().max()) for rank in end[1:] for a, b in zip(rank[0], end[0][0], strict=True))
    assert end[0][1] < 0.97 * start[0][1]
    # Hivemind sends every rank another difference
    assert 0 < apart < 0.1 if name == "hivemind_8bit" else apart == 0.0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("public_lion", (RANKS - 1) * 1.0),  # 64 bits for 8 signs
        ("grace_top_k", (RANKS - 1) * 12 * (81 + 1) / (64 * 128 + 128)),  # values of 4 bytes and indices of 8
        ("public_demo", (RANKS - 1) * 12 * (32 * 2 + 32 * 2) / (64 * 128 + 128)),  # 2 chunks, and 2 of the bias
        ("hivemind_8bit", None),
    ],
)
def test_formats_send_what_the_public_code_sends(name: str, expected: float | None, threads: Threads) -> None:
    sent = [rank[2] for rank in fitted(name, threads, 2)]
    if expected is None:  # about a byte to the owners, and one back
        assert sum(sent) / (RANKS - 1) == pytest.approx(2 * (1 + 2 * 1032 / 8320), rel=0.01)
    else:
        assert sent == pytest.approx([expected] * RANKS)


def test_one_bit_adam_sends_a_bit_each_way_and_keeps_what_signs_lose(threads: Threads) -> None:
    def job(rank: int) -> tuple[Tensor, Tensor, Tensor, float]:
        torch_generator = torch.Generator().manual_seed(rank)
        m = torch.randn(1000, generator=torch_generator)
        wire = formats.Wire()
        adam = formats.OneBitAdam(nn.Linear(10, 100, bias=False), settings("deepspeed_onebit_adam"), wire)
        worker, server = adam.errors
        mean = adam.compressed(m, worker, server)
        return mean, m - worker[:1000], server, wire.traffic.payload_bytes

    every = threads.run(job)
    seen = torch.stack([sent for _, sent, _, _ in every]).mean(0)  # of what workers sent
    kept = torch.cat([server for _, _, server, _ in every])[:1000]
    for mean, _, _, nbytes in every:
        assert torch.equal(mean, every[0][0])
        torch.testing.assert_close(mean + kept, seen, rtol=1e-5, atol=1e-6)
        assert nbytes == (RANKS - 1) * (2 * 128 / RANKS + 2 * 4)  # 1024 bits after padding, and a scale each way


@pytest.mark.parametrize("shape", [(128, 192), (24,), (5, 7), (256, 64)])
def test_demo_cosines_lose_nothing(shape: tuple[int, ...], threads: Threads) -> None:
    def job(_: int) -> Any:
        return formats.PublicDeMo(nn.Linear(1, 1), settings("public_demo"), formats.Wire())

    demo, x = threads.run(job)[0], torch.randn(shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(demo.decoded(demo.encoded(x), x.shape), x, rtol=1e-4, atol=1e-4)
    assert float(demo.encoded(torch.ones(shape))[0, 0]) > 0.9  # the mean is the first cosine


# ---- the clock -------------------------------------------------------------------------------------------------------


def test_looks_fall_on_the_marks_and_the_race_ends_with_its_seconds(tmp_path: Path) -> None:
    clock, steps, stops = ranks.Clock(tmp_path, 0, 1, seconds=10.0, looks=4), 3, list[int]()
    while steps not in stops[-1:]:  # a step takes 0.5 s
        stops.append(steps)
        steps = clock.next_stop(steps, 0.5 * (steps - (stops[-2] if len(stops) > 1 else 0)), steps - ([0, *stops])[-2])
    assert stops == [3, 7, 13, 20]  # marks at 1.25, 3.5, 6.5 and 10 s
    assert clock.trained_s == 10.0


def test_ranks_agree_on_the_next_look_by_their_mean(tmp_path: Path) -> None:
    clocks = [ranks.Clock(tmp_path, rank, 2, seconds=8.0, looks=2) for rank in range(2)]
    with ThreadPoolExecutor(2) as pool:
        stops = list(pool.map(lambda clock: clock.next_stop(2, 1.0 + clock.rank, 2), clocks))
    assert stops == [2 + round((8.0 * 0.5**1.5 - 1.5) / 0.75)] * 2


# ---- what is said of stored cells ------------------------------------------------------------------------------------


def cell(method: str, step_s: float, losses: list[float], **other: Any) -> dict[str, Any]:
    """A stored cell of a race of 8 seconds, with a look every 4 seconds."""
    counts = {f"node{n}": {"sent": 1e6 * step_s, "received": 1e6 * step_s} for n in range(4)}
    one = bench.Cell("two-50mbit", "1m", method, 8.0)
    return {
        "name": one.name, "cluster": "two-50mbit", "nodes": 2, "model": "1m", "method": method, "seconds": 8.0, "rate": "50mbit",
        "settings": bench.settings_of(one), "status": "finished", "failure": None, "parameters": 1_065_344,
        "step_mean_s": step_s, "steps": round(8 / step_s), "interface_bytes": counts, "others_cores": 0.0,
        "curve": [[4.0 * k, loss] for k, loss in enumerate(losses)], **other,
    }  # fmt: skip


CELLS = [
    cell("torch_ddp", 1.0, [5.5, 4.5, 4.0]),
    cell("torch_fp16", 0.5, [5.5, 4.0, 3.5]),
    cell("ef_sign", 0.1, [5.5, 2.5, 2.0]),
    cell("grace_top_k", 0.2, [5.5, 3.0, 2.5], others_cores=0.9),
    cell("decent_dp", 0.2, [], status="failed", failure="is not installed", curve=[], step_mean_s=None),
]


def test_losses_are_read_at_equal_time() -> None:
    ddp, sign = CELLS[0], CELLS[2]
    assert race.loss_at(ddp, 6.0) == pytest.approx(4.25)
    assert race.loss_at(cell("dense", 1.0, [5.5, 4.5, 4.0], curve=[[0, 5.5], [7.8, 4.0]]), 8.0) == 4.0
    assert race.loss_at(cell("dense", 1.0, [], curve=[[0, 5.5], [4.0, 4.0]]), 8.0) is None  # it ended too early
    assert race.seconds_to(sign, 4.0) == pytest.approx(2.0)
    assert race.seconds_to(ddp, 3.9) is None
    assert race.times_as_fast(sign, ddp) == pytest.approx(4.0)
    diverged = cell("dense", 1.0, [], curve=[[0, 5.5], [4.0, None], [8.0, None]])
    assert race.loss_at(diverged, 8.0) == math.inf
    assert race.seconds_to(diverged, 5.0) is None
    assert str(race.row_of(diverged, ddp)[6]) == "diverged"


def test_the_table_ranks_by_loss_and_says_whether_goals_are_met() -> None:
    report = race.report(CELLS)
    rows = [[str(word) for word in row] for row in report.sheets[0].rows]
    assert [row[0] for row in rows] == [
        "`ef_sign`", "GRACE top-k, 1 %, residual", "torch fp16 hook", "torch DDP", "Decent-DP, one-peer-exp",
    ]  # fmt: skip
    assert rows[0][1:] == ["commopt", "100", "10.0x", "100 kB", "80", "2.000", "2.0"]
    assert rows[1][1] == "format re-implemented"
    assert rows[4][2] == "failed"
    said = "\n".join(report.remarks)
    assert "final loss of torch DDP in 2.0 s, 4.0x as fast, goal 10x missed. Its step is 10.0x as fast" in said
    assert "final loss of GRACE top-k (the best peer) in 4.0 s, 2.0x as fast, goal 3x missed" in said
    assert "race-8s-two-50mbit-1m-decent_dp failed: is not installed" in report.remarks
    assert "up to 0.9 cores meanwhile: grace_top_k" in said


def test_everyone_in_the_race_is_known_and_named() -> None:
    assert set(race.THEIRS) <= set(race.PEERS)
    assert set(race.LABELS) == set(race.THEIRS)
    assert set(race.QUICK) <= set(race.OPTIONS)
    assert "torch_ddp" in race.OPTIONS
    for method in race.OURS:
        module("building").build(
            {"method": method, **bench.settings_of(bench.Cell("two-50mbit", "1m", method, 8.0))}, nn.Linear(2, 2)
        )


def test_the_race_is_shown_drawn_and_written_from_what_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    monkeypatch.setattr(bench, "PAGE", tmp_path / "steps.md")
    bench.PAGE.write_text(
        "# A\n<!-- written by scripts/bench/step.py --page -->\nold\n<!-- end -->\n"
        "<!-- written by scripts/bench/codec_costs.py --page -->\nkept\n<!-- end -->\n"
    )
    file = tmp_path / "cells.jsonl"
    for one in CELLS:
        store.Store(file).put(one["name"], one["settings"], one)
    bench.run(bench.parser().parse_args(["--page", "--seconds", "8", "--results", str(file)]))
    text = bench.PAGE.read_text()
    assert "| `ef_sign` | commopt | 100 |" in text
    assert "old" not in text
    assert "kept" in text
    assert (tmp_path / "steps.png").read_bytes()[:4] == b"\x89PNG"
    place = ["--race", "--seconds", "8", "--methods", "ef_sign,torch_ddp", "--results", str(file)]
    bench.run(bench.parser().parse_args(place))  # all of it is stored
    assert "0 cells to measure, 2 are stored already" in capsys.readouterr().out
