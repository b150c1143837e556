"""Messages between two processes: whole, in order, and without waiting for the other end."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from torchserve_dag.runtime.models.language.process.message_socket import MessageSocket

Ends = tuple[MessageSocket, MessageSocket, socket.socket]


@pytest.fixture
def ends() -> Iterator[Ends]:
    """Two ends, and the socket of the first."""
    left, right = socket.socketpair()
    with left, right:
        yield MessageSocket(left), MessageSocket(right), left


def test_messages_come_whole_and_in_order(ends: Ends) -> None:
    left, right, _ = ends
    left.send({"answer": 1})
    left.send("text")
    right.send(("other", "way"))

    assert right.receive() == [{"answer": 1}, "text"]
    assert right.receive() == []
    assert left.receive() == [("other", "way")]


def test_a_message_larger_than_the_socket_waits_for_room_and_holds_up_nobody(ends: Ends) -> None:
    left, right, _ = ends
    photo = bytes(range(256)) * 20_000
    left.send(photo)
    left.send("after it")
    received = []
    assert left.unsent > 1 << 20
    while len(received) < 2:
        received += right.receive()
        left.wait(1)

    assert received == [photo, "after it"]
    assert not left.unsent


def test_what_was_sent_before_the_end_is_received_before_the_end_is_told(ends: Ends) -> None:
    left, right, left_socket = ends
    left.send("last")
    left_socket.close()

    assert right.receive() == ["last"]
    with pytest.raises(EOFError):
        right.receive()
    right.send("to nobody")
    assert not right.unsent


def test_half_a_message_is_no_message(ends: Ends) -> None:
    left, right, left_socket = ends
    left_socket.send(b"\0" * 7)

    assert right.receive() == []
    left_socket.close()
    with pytest.raises(EOFError):
        right.receive()
    assert not left.unsent
