"""A batch's answers in messages of bounded size, as TorchServe's front end takes them."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchserve_dag.runtime.compat.wire import NEXT, WireResponse, read_response_heads
from torchserve_dag.runtime.worker.response import MAX_BYTES
from torchserve_dag.runtime.worker.torchserve import batch_messages as module
from torchserve_dag.runtime.worker.torchserve.batch_messages import batch_messages

KINDS = ("rest", "failed", "unary", "stream")


def response(name: str, kind: str, size: int) -> WireResponse:
    headers = {} if kind in {"rest", "failed"} else {NEXT: "false"}
    return WireResponse(name, 500 if kind == "failed" else 200, headers=headers, body=b"x" * size)


@dataclass
class FrontEnd:
    """TorchServe's BatchAggregator, RestJob and GRPCJob of 0.12.0: which jobs are complete, and when the batch is."""

    kinds: dict[str, str]
    complete: dict[str, int] = field(default_factory=dict)
    """The bytes that each client got."""
    got: dict[str, int] = field(default_factory=dict)
    done: bool = False

    def take(self, responses: list[WireResponse]) -> None:
        assert not self.done, "the rest would be read as another batch's answers"
        for one in responses:
            kind, goes_on = self.kinds[one.id], one.headers.get(NEXT)
            assert one.id not in self.complete, "a second answer ends the worker, or is lost"
            assert not (kind == "failed" and goes_on), "a failure closes its connection"
            self.got[one.id] = self.got.get(one.id, 0) + len(one.body)
            if kind == "unary" or goes_on != "true":
                self.complete[one.id] = self.got[one.id]
        self.done = not any(one.headers.get(NEXT) == "true" for one in responses)


@given(st.lists(st.tuples(st.sampled_from(KINDS), st.sampled_from([1, 100, MAX_BYTES // 3, MAX_BYTES])), min_size=1))
def test_every_client_has_its_whole_answer_and_only_the_last_message_ends_the_batch(
    batch: list[tuple[str, int]],
) -> None:
    batch = [(kind, min(size, 300) if kind == "failed" else size) for kind, size in batch]
    named = {str(i): kind for i, (kind, _) in enumerate(batch)}
    messages: list[list[WireResponse]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "write_responses", lambda found: messages.append(list(found)) or b"")
        streams = {name for name, kind in named.items() if kind == "stream"}
        list(batch_messages([response(str(i), *one) for i, one in enumerate(batch)], streams))
    front = FrontEnd(named)
    for message in messages:
        front.take(message)

    assert front.done
    assert front.complete == {str(i): size for i, (_, size) in enumerate(batch)}
    for message in messages:
        assert sum(len(one.body) for one in message if one.body and len(one.body) > 300) <= MAX_BYTES + 300


def test_a_batch_of_ordinary_answers_is_one_message() -> None:
    (message,) = batch_messages([response(str(i), "rest", 1000) for i in range(16)], ())
    heads, _ = read_response_heads(bytearray(message))

    assert [name for name, _ in heads.more] == [str(i) for i in range(16)]


def test_sixteen_large_answers_are_sixteen_messages() -> None:
    messages = list(batch_messages([response(str(i), "rest", 6_000_000) for i in range(16)], ()))

    assert len(messages) == 16
    assert max(map(len, messages)) < MAX_BYTES
