from __future__ import annotations

import socket
from typing import Any

import pytest

from commopt.plan.links import wire_bytes
from commopt.record.meter import BACKGROUND_BYTES, TrafficRow, Window, merge, transmitted_bytes, verify, window

NODE_OF_RANK = {0: "a", 1: "a", 2: "b", 3: "b"}
ROW = TrafficRow("dense", "all_reduce", "bucket0", 10, 5e6)


def traffic(by_peer: dict[str, float], calls: int) -> dict[str, Any]:
    nbytes = sum(by_peer.values())
    row = {"method": "dense", "operation": "all_reduce", "bucket": "b0", "calls": calls, "bytes": nbytes}
    return {"payload_bytes": nbytes, "by_peer": by_peer, "by_operation": [row]}


def test_window_is_the_difference_of_two_readings() -> None:
    got = window(traffic({"1": 100.0}, 2), traffic({"1": 400.0, "2": 50.0}, 5))
    assert got == Window(350.0, {1: 300.0, 2: 50.0}, (TrafficRow("dense", "all_reduce", "b0", 3, 350.0),))
    reading = traffic({"1": 100.0}, 2)
    assert window(reading, reading).rows == ()  # not called in it


def test_merge_adds_ranks_and_puts_the_largest_first() -> None:
    small = TrafficRow("dense", "broadcast", "b0", 1, 8.0)
    assert merge([small, ROW, ROW]) == (TrafficRow("dense", "all_reduce", "bucket0", 20, 1e7), small)


def test_only_bytes_for_other_nodes_leave_the_node() -> None:
    windows = {0: Window(7e6, {1: 2e6, 2: 5e6}, (ROW,)), 1: Window(6e6, {0: 2e6, 3: 4e6}, (ROW,))}
    check = verify("a", windows, NODE_OF_RANK, wire_bytes(9e6, 9000), mtu=9000)
    assert check.payload_bytes == 9e6
    assert check.ratio == pytest.approx(1.0)
    assert check.ok
    assert check.defect is None


RING = TrafficRow("random_k", "all_reduce", "bucket0", 43, 1.5e5)
SMALL = TrafficRow("onebit_adam", "all_gather", "bucket0", 24, 1.2e5)


@pytest.mark.parametrize(
    ("nbytes", "row", "off", "ok"),
    [
        *((5e6, ROW, off, ok) for off, ok in ((1, True), (1.029, True), (0.971, True), (1.031, False), (0.969, False))),
        *((1.5e5, RING, off, ok) for off, ok in ((1.35, True), (1.8, False))),
        *((1.2e5, SMALL, off, ok) for off, ok in ((1.09, True), (1.3, False))),  # each exchange has packets of its own
    ],
)
def test_three_percent_and_a_little_for_each_exchange_is_the_limit(
    nbytes: float, row: TrafficRow, off: float, ok: bool
) -> None:
    assert verify("a", {0: Window(nbytes, {2: nbytes}, (row,))}, NODE_OF_RANK, off * wire_bytes(nbytes)).ok is ok


def test_disagreement_is_a_defect_of_the_count_with_its_rows() -> None:
    windows = {0: Window(5e6, {2: 5e6}, (ROW,))}
    defect = str(verify("a", windows, NODE_OF_RANK, 1.5 * wire_bytes(5e6)).defect)
    assert "defect in commopt's byte count: 50.0% more bytes left a" in defect
    assert "dense all_reduce bucket0: 10 calls, 5,000,000 bytes" in defect
    assert "gso_max_segs" not in defect
    assert "gso_max_segs" in str(verify("a", windows, NODE_OF_RANK, 1.002 * 5e6).defect)  # it saw no headers


def test_background_traffic_of_a_silent_node_is_no_defect() -> None:
    silent = {0: Window(0.0, {}, ())}
    assert verify("a", silent, NODE_OF_RANK, BACKGROUND_BYTES).ok
    check = verify("a", silent, NODE_OF_RANK, 1e6)
    assert check.ratio is None
    assert check.defect is not None
    assert "count: more bytes left a" in check.defect


def test_the_kernel_counts_what_is_sent() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        before = transmitted_bytes("lo")
        sender.sendto(b"x" * 1000, ("127.0.0.1", 9))
        assert transmitted_bytes("lo") - before >= 1000


def test_unknown_interface_is_named() -> None:
    with pytest.raises(OSError, match="'nowhere0'"):
        transmitted_bytes("nowhere0")
