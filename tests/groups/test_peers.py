"""The mailbox, groups made of peers, and the roll call of a round's members, over simulated and real peers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rig import normal
from torch import Tensor
from transports import RANKS, Run, over_simulated_peers, over_tcp_peers, simulated

from commopt.errors import GroupError
from commopt.groups import SimGroup
from commopt.groups.peers import GROUP, KEPT, Latecomers, Letter, Mailbox, PeerGroup, Peers, Roll, call_roll
from commopt.groups.simulated_peers import DETECT_S
from commopt.wire.payload import Payload


def letter(sequence: int) -> Letter:
    return Letter(sequence, Payload.of(torch.tensor([sequence])))


def box_of(*sequences: int, channel: str = "c") -> Mailbox:
    box = Mailbox()
    for sequence in sequences:
        box.put(1, channel, letter(sequence))
    return box


def test_the_mailbox_gives_each_message_once_by_peer_channel_and_number() -> None:
    box = box_of(3, 4)
    assert [taken.sequence for taken in (box.take(1, "c", 3), box.take(1, "c", 4)) if taken] == [3, 4]
    assert box.take(1, "c", 4) is None
    box = box_of(3)
    assert box.take(2, "c", 3) is None
    assert box.take(1, "other", 3) is None


def test_an_older_message_is_dropped_and_never_given() -> None:
    box = box_of(1, 2, 5)
    assert box.take(1, "c", 3) is None
    assert box.take(1, "c", 1) is None
    assert box.take(1, "c", 2, or_newer=True) is not None  # what is left is number 5


def numbers(*taken: Letter | None) -> list[int | None]:
    return [None if one is None else one.sequence for one in taken]


def test_a_newer_message_serves_and_stays_for_its_own_round() -> None:
    box = box_of(5, 7)
    assert numbers(*(box.take(1, "c", 3, or_newer=True) for _ in range(2))) == [7, 7]
    assert numbers(box.take(1, "c", 5, or_newer=True), box.take(1, "c", 7)) == [5, 7]
    assert box.take(1, "c", 7, or_newer=True) is None


def test_of_too_many_messages_the_newest_stay() -> None:
    box = box_of(*range(KEPT + 5))
    assert [one.sequence for _, one in box.drain("c")] == list(range(5, KEPT + 5))
    other = box_of(*range(KEPT))
    other.put(2, "c", letter(100))
    assert len(other.drain("c")) == KEPT + 1  # each peer and channel has its own bound


def test_messages_of_a_group_are_all_kept() -> None:
    assert len(box_of(*range(3 * KEPT), channel=f"{GROUP}c").drain(f"{GROUP}c")) == 3 * KEPT


def test_draining_takes_one_channel_of_all_peers_in_order() -> None:
    box = box_of(2, 1)
    box.put(0, "c", letter(9))
    box.put(0, "d", letter(4))
    assert [(peer, one.sequence) for peer, one in box.drain("c")] == [(0, 9), (1, 1), (1, 2)]
    assert box.drain("c") == []
    assert [(peer, one.sequence) for peer, one in box.drain("d")] == [(0, 4)]


def test_forgetting_a_peer_leaves_the_others_mail() -> None:
    box = box_of(1)
    box.put(2, "c", letter(1))
    box.forget(1)
    assert [peer for peer, _ in box.drain("c")] == [2]


def test_a_peer_that_fills_its_room_loses_its_messages_and_the_others_keep_theirs() -> None:
    box = box_of()
    box.put(2, "c", letter(1))
    for k in range(100):
        box.put(1, f"{k}", letter(k), 10_000)
    left = sum(len(box.drain(f"{k}")) for k in range(100))
    assert 0 < left * 1024 < 10_000
    assert box.take(2, "c", 1) is not None
    for k in range(100):  # what has been read takes no room
        box.put(1, "c", letter(k), 3_000)
        assert box.take(1, "c", k) is not None


@pytest.fixture(params=["simulated", "tcp"])
def run(request: pytest.FixtureRequest) -> Run:
    """run(n, function, *args): function(peers, *args) on n ranks of one transport."""
    return over_simulated_peers if request.param == "simulated" else over_tcp_peers


def some_of_all(peers: Peers) -> float | None:
    if peers.rank == 1:
        return None
    group = PeerGroup(peers, [0, 2], "test", 0, 20.0)
    x = torch.full((300,), float(peers.rank))
    group.all_reduce(x)
    assert group.size == 2
    return float(x.mean())


def test_a_group_of_some_leaves_the_others_alone(run: Run) -> None:
    assert run(3, some_of_all) == [2.0, None, 2.0]


def in_pieces(peers: Peers) -> tuple[Tensor, list[int]]:
    """The sum of 5,003 elements from each, and the bytes of what this member sent, in order."""
    sent: list[int] = []
    send = peers.send

    def noted(peer: int, channel: str, sequence: int, payload: Payload, **options: float) -> None:
        sent.append(payload.nbytes)
        send(peer, channel, sequence, payload, **options)

    peers.send = noted  # type: ignore[method-assign]
    x = normal(5003, peers.rank)
    PeerGroup(peers, range(peers.size), "test", 0, 20.0).all_reduce(x)
    return x, sent


@pytest.mark.parametrize("n", [2, 3])
def test_a_large_tensor_is_summed_in_pieces_to_the_same_bits(run: Run, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(n, in_pieces)
    monkeypatch.setattr("commopt.groups.peers._PIECE", 600)
    for (x, sent), (total, _) in zip(run(n, in_pieces), whole, strict=True):
        assert torch.equal(x, total)
        assert len(sent) == 2 * 9 * (n - 1)
        assert max(sent) <= 4 * -(-556 // n)
    monkeypatch.setattr("commopt.groups.peers._PIECES", 2)
    for (x, sent), (total, _) in zip(run(n, in_pieces), whole, strict=True):
        assert torch.equal(x, total)
        assert len(sent) == 2 * 2 * (n - 1)


def with_one_missing(peers: Peers) -> tuple[str, float]:
    if peers.rank == 2:
        return "", 0.0
    begun_s = peers.seconds
    group = PeerGroup(peers, range(3), "test", 0, 0.5)
    with pytest.raises(GroupError) as caught:
        group.all_reduce(torch.zeros(3))
    return str(caught.value), peers.seconds - begun_s


def test_a_member_that_does_not_answer_ends_the_exchange_within_the_timeout(run: Run) -> None:
    for words, seconds in run(3, with_one_missing)[:2]:
        assert "rank 2 did not answer rank" in words
        assert seconds < 5.0


def with_another_layout(peers: Peers) -> str:
    group = PeerGroup(peers, range(2), "test", 0, 5.0)
    with pytest.raises(GroupError) as caught:
        group.all_gather(Payload.of(torch.zeros(3 + peers.rank)))
    return str(caught.value)


def test_another_layout_is_an_error_and_not_other_numbers(run: Run) -> None:
    assert all("sent another layout than rank" in words for words in run(2, with_another_layout))


# -- the roll call

CARD_S = 4.0


def roll_of(peers: Peers, wait_s: float = 0.0, sequence: int = 0, **options: Any) -> Roll:
    if wait_s:
        peers.sleep(wait_s)
    return call_roll(peers, "r", sequence, torch.tensor([10 + peers.rank, sequence]), CARD_S, **options)


@pytest.mark.parametrize("n", RANKS)
def test_all_that_are_there_are_on_the_roll_with_their_cards(run: Run, n: int) -> None:
    for roll in run(n, roll_of):
        assert roll.members == tuple(range(n))
        assert {rank: card.tolist() for rank, card in roll.cards.items()} == {rank: [10 + rank, 0] for rank in range(n)}


def roll_of_expected(peers: Peers) -> tuple[int, ...]:
    return roll_of(peers, expected=[1, 3]).members if peers.rank in (1, 3) else ()


def test_only_those_expected_are_on_the_roll(run: Run) -> None:
    assert run(4, roll_of_expected) == [(), (1, 3), (), (1, 3)]


@pytest.mark.parametrize(  # without rank 0 the next one convenes
    ("dead", "known_s", "costs_s"), [(0, 3.0, 0.0), (1, 3.0, 0.0), (3, 3.0, 0.0), (2, 0.0, DETECT_S)]
)
def test_a_dead_one_costs_its_detection_or_nothing_if_it_is_known(dead: int, known_s: float, costs_s: float) -> None:
    def rank_of(group: SimGroup) -> tuple[tuple[int, ...], float]:
        group.peers.announce(1)  # where it is killed
        group.peers.sleep(known_s)
        begun_s = group.seconds
        return roll_of(group.peers).members, group.seconds - begun_s

    _, results = simulated(4, rank_of, faults=[{"at_step": 1, "kill": dead}])
    alive = [rank for rank in range(4) if rank != dead]
    for members, took_s in [results[rank] for rank in alive]:
        assert members == tuple(alive)
        assert took_s == pytest.approx(costs_s, abs=0.1)


def test_a_convener_that_dies_unnoticed_leaves_each_alone_for_one_round() -> None:
    def rank_of(group: SimGroup) -> list[tuple[int, ...]]:
        group.peers.announce(1)
        return [roll_of(group.peers, sequence=sequence).members for sequence in range(2)]

    world, results = simulated(3, rank_of, faults=[{"at_step": 1, "kill": 0}])
    assert results[1:] == [[(1,), (1, 2)], [(2,), (1, 2)]]
    assert world.seconds < CARD_S


def test_who_is_late_is_left_out_and_learns_it_at_once() -> None:
    """Rank 2 is 100 s behind; nobody waits for it in every round, and it waits for nobody."""

    def rank_of(group: SimGroup) -> list[tuple[tuple[int, ...], float]]:
        late, rounds = Latecomers(), []
        if group.rank == 2:
            group.peers.sleep(100.0)
        for sequence in range(8):
            begun_s = group.seconds
            roll = roll_of(group.peers, sequence=sequence, late=late)
            rounds.append((roll.members, group.seconds - begun_s))
        group.peers.sleep(200.0)
        return rounds

    _, results = simulated(3, rank_of)
    assert [members for members, _ in results[0]] == [(0, 1)] * 8
    assert [members for members, _ in results[1]] == [(0, 1)] * 8
    assert [members for members, _ in results[2]] == [(2,)] * 8
    waited = [round(seconds, 1) for _, seconds in results[0]]
    assert waited == [CARD_S / 2, 0.0, CARD_S / 2, 0.0, 0.0, CARD_S / 2, 0.0, 0.0]
    assert [round(seconds, 1) for _, seconds in results[2]] == [0.0] * 8


def test_who_is_only_a_little_late_is_back_within_two_rounds() -> None:
    def rank_of(group: SimGroup) -> list[tuple[int, ...]]:
        late, rolls = Latecomers(), []
        for sequence in range(4):
            begun_s = group.seconds
            if group.rank == 1:
                group.peers.sleep(3.0 if sequence == 0 else 0.5)
            rolls.append(roll_of(group.peers, sequence=sequence, late=late).members)
            group.peers.sleep(max(0.0, begun_s + 20.0 - group.seconds))
        return rolls

    _, results = simulated(2, rank_of)
    assert results[0] == [(0,), (0,), (0, 1), (0, 1)]
    assert results[1] == [(1,), (1,), (0, 1), (0, 1)]


def test_pauses_grow_to_eight_rounds_and_end_when_the_peer_is_in_time_or_down() -> None:
    late = Latecomers()

    def rolls_until_waited_for() -> int:
        count = 0
        while not late.is_waited_for(1):
            count += 1
        late.note_late(1)
        return count

    assert [rolls_until_waited_for() for _ in range(7)] == [0, 1, 2, 4, 8, 8, 8]
    assert late.is_waited_for(2)
    late.forget(1)
    assert [rolls_until_waited_for() for _ in range(3)] == [0, 1, 2]


@given(
    waits=st.lists(st.floats(0.0, 6.0), min_size=4, max_size=4),
    killed=st.sets(st.integers(0, 3), max_size=2),
    cut=st.sets(st.tuples(st.integers(0, 3), st.integers(0, 3)).filter(lambda pair: pair[0] < pair[1]), max_size=3),
)
@settings(max_examples=40)
def test_all_on_a_roll_of_several_have_the_same_one(
    waits: list[float], killed: set[int], cut: set[tuple[int, int]]
) -> None:
    faults: list[dict[str, Any]] = [{"at_step": 1, "kill": rank} for rank in killed]
    faults += [{"at_step": 1, "cut": [a, b], "for_s": 2.5} for a, b in cut]

    def rank_of(group: SimGroup) -> list[Roll]:
        late = Latecomers()
        group.peers.announce(1)
        return [roll_of(group.peers, waits[(group.rank + sequence) % 4], sequence, late=late) for sequence in range(3)]

    _, results = simulated(4, rank_of, faults=faults)
    for sequence in range(3):
        rolls = {rank: result[sequence] for rank, result in enumerate(results) if result is not None}
        for rank, roll in rolls.items():
            assert rank in roll.members
            for other in roll.members:  # a member that did not hear of it in time averages with nobody
                assert rolls[other].members in (roll.members, (other,))
