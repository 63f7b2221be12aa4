"""Messages of flat parameters: nothing is lost, an undelivered one is taken back, and a bad one is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rig import normal
from torch import Tensor

from commopt.errors import ConfigError
from commopt.gossip.messages import Message
from commopt.wire.bucket import ParameterIndex
from commopt.wire.payload import Payload

SHAPES = ((40, 30), (40,), (17, 40), (3,))
TOTAL = 40 * 30 + 40 + 17 * 40 + 3
COMPRESSED: list[Any] = [
    "int8",
    "4bit",
    "sign",
    {"compressor": "top_k", "density": 0.1},
    {"compressor": "random_k", "density": 0.1},
    {"compressor": "threshold", "threshold": 1.0},
]


def bound(given: Any, rank: int = 0, **options: Any) -> Message:
    message = Message(given, **options)
    message.bind(ParameterIndex.of([(str(k), torch.zeros(s)) for k, s in enumerate(SHAPES)]), rank)
    return message


def residual(message: Message) -> Tensor:
    return message.state["residual"].clone()


def test_without_a_compressor_a_message_is_the_tensor_itself() -> None:
    message = bound(None)
    x = normal(TOTAL, 1)
    assert torch.equal(message.unpack(message.pack(x, 0), 0), x)  # type: ignore[arg-type]
    assert message.pack(x, 0).nbytes == 4 * TOTAL
    assert message.state == {}
    assert message.bytes_per_element() == 4.0


@pytest.mark.parametrize("form", COMPRESSED, ids=str)
def test_what_was_sent_and_what_is_kept_make_up_what_was_given(form: Any) -> None:
    message, total, sent = bound(form), torch.zeros(TOTAL), torch.zeros(TOTAL)
    for sequence in range(10):
        x = normal(TOTAL, sequence)
        decoded = message.unpack(message.pack(x, sequence), sequence)
        assert decoded is not None
        total, sent = total + x, sent + decoded
    torch.testing.assert_close(sent + residual(message), total, rtol=1e-4, atol=1e-4)
    assert float(residual(message).norm()) > 0


@pytest.mark.parametrize("form", COMPRESSED, ids=str)
def test_without_error_feedback_nothing_is_kept(form: Any) -> None:
    options = {**(form if isinstance(form, dict) else {"compressor": form}), "error_feedback": False}
    message = bound(options)
    first, second = (message.pack(normal(TOTAL, 1), 0) for _ in range(2))
    assert torch.equal(first.buffer, second.buffer)
    assert message.state == {}


@pytest.mark.parametrize("form", COMPRESSED, ids=str)
def test_taking_a_message_back_restores_the_residual(form: Any) -> None:
    message = bound(form)
    message.pack(normal(TOTAL, 1), 0)
    before = residual(message)
    x = normal(TOTAL, 2)
    payload = message.pack(x, 1)
    assert not torch.allclose(residual(message), before)
    message.take_back(x, payload, 1)
    torch.testing.assert_close(residual(message), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", [None, *COMPRESSED], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_message_that_is_not_finite_is_refused(form: Any, bad: float) -> None:
    message = bound(form)
    x = normal(TOTAL, 1)
    x[500] = bad
    before = residual(message) if form is not None else torch.zeros(0)
    payload = message.pack(x, 0)
    assert message.unpack(payload, 0) is None
    if form is not None:
        message.take_back(x, payload, 0)
        torch.testing.assert_close(residual(message), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", [None, *COMPRESSED], ids=str)
@pytest.mark.parametrize("other", [None, *COMPRESSED], ids=str)
def test_a_message_of_another_form_or_size_is_refused(form: Any, other: Any) -> None:
    """From a rank that was started with other options, or another model."""
    message, sender, smaller = bound(form), bound(other), Message(other)
    smaller.bind(ParameterIndex(("x",), (900,)), 0)
    assert message.unpack(smaller.pack(normal(900, 1), 0), 0) is None
    if str(form) != str(other):
        assert message.unpack(sender.pack(normal(TOTAL, 1), 0), 0) is None
    assert message.unpack(Payload.of(), 0) is None
    assert message.unpack(Payload.of(torch.zeros(TOTAL, dtype=torch.uint8)), 0) is None
    assert message.unpack(Payload.of(torch.tensor([-1], dtype=torch.int32)), 0) is None


@given(st.integers(0, 2**31 - 1), st.sampled_from(COMPRESSED), st.integers(0, 50))
def test_what_one_rank_packs_another_unpacks_alike(seed: int, form: Any, sequence: int) -> None:
    sender, receiver = bound(form, rank=0), bound(form, rank=1)
    payload = sender.pack(normal(TOTAL, seed), sequence)
    mine, theirs = sender.unpack(payload, sequence), receiver.unpack(payload, sequence)
    assert mine is not None
    assert theirs is not None
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("given_as", "words"),
    [
        ({"error_feedback": True}, "no compressor is named; write {compressor: int8}, or leave message out"),
        ({"compressor": None}, "no compressor is named"),
        ("int9", "message: .*'int9'"),
        ({"compressor": "top_k", "densty": 0.1}, "message: .*densty"),
        ({"compressor": "int8", "error_feedback": 1}, "message: error_feedback: 1 is out of range"),
    ],
)
def test_a_message_that_cannot_be_is_refused_in_words_that_name_the_fix(given_as: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Message(given_as)
