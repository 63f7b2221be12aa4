"""Links between machines over real sockets, each machine a thread."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import combinations

import pytest

from commopt.advise import pairs
from commopt.advise.pairs import Machines

Found = dict[tuple[int, int], tuple[float, float]]


def measured(machines: int, budget_s: float) -> tuple[Found, list[float], list[str]]:
    """Rates and latencies, rates while all send, and what rank 0 said."""
    said: list[str] = []

    texts, barrier = [""] * machines, threading.Barrier(machines, timeout=60.0)

    def tell(rank: int, text: str) -> list[str]:
        texts[rank] = text
        barrier.wait()
        told = list(texts)
        barrier.wait()
        return told

    def work(rank: int) -> tuple[Found, list[float]]:
        own = Machines([f"node{k}" for k in range(machines)], rank, True, partial(tell, rank))
        found = own.pairs(budget_s, said.append if rank == 0 else lambda _: None)
        together = own.together(found)
        own.close()
        return found, together

    with ThreadPoolExecutor(machines) as threads:
        every = list(threads.map(work, range(machines)))
    assert all(one == every[0] for one in every)
    return *every[0], said


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "_MOST_BYTES", 1 << 20)


def directions(machines: int) -> set[tuple[int, int]]:
    return {way for a, b in combinations(range(machines), 2) for way in ((a, b), (b, a))}


def test_pairs_are_measured_one_at_a_time_if_there_is_time() -> None:
    found, together, said = measured(4, budget_s=60.0)
    assert set(found) == directions(4)
    assert said == [f"latency and rate: node{a} - node{b}" for a, b in ((0, 1), (1, 2), (2, 3), (3, 0), (0, 2), (1, 3))]
    assert len(together) == 4
    assert min(together) > 0


def test_else_pairs_without_a_machine_in_common_are_measured_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "time", Ticking())
    found, _, said = measured(6, budget_s=10.0)  # fifteen pairs of a second each do not fit
    assert set(found) == directions(6)
    assert said[1] == "latency and rate: node1 - node2 and 2 more pairs"


def test_at_the_end_of_the_time_pairs_are_left_out_which_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "time", Ticking())
    found, together, said = measured(6, budget_s=2.5)
    assert set(found) < directions(6)
    assert said[-1] == f"the time is over: {15 - len(found) // 2} of 15 pairs were left out"
    assert min(together) > 0  # neighbours that were left out, too


class Ticking:
    """The time, of which a second passes for each thread whenever it looks."""

    perf_counter = staticmethod(time.perf_counter)

    def __init__(self) -> None:
        self._own = threading.local()

    def monotonic(self) -> float:
        self._own.now_s = getattr(self._own, "now_s", 0.0) + 1.0
        return float(self._own.now_s)


def test_disjoint_pairs_are_as_many_as_fit() -> None:
    ring = [(0, 1), (1, 2), (2, 3), (3, 4), (4, 0)]
    assert pairs._apart(ring) == [(0, 1), (2, 3)]
    assert pairs._apart(ring[1:]) == [(1, 2), (3, 4)]
