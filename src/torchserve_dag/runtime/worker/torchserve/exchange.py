"""A request's responses on their way to TorchServe, in the form that its client's protocol wants.

A chunk comes from the engine (`engine/streaming.py`), is encoded by the service (`Pending.send_chunk`), and is sent by
`asynchronous.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from http import HTTPStatus
from http.client import responses as PHRASES  # noqa: N812 (a table)

from torchserve_dag.runtime.compat.wire import NEXT, WireResponse, write_responses
from torchserve_dag.runtime.messages import Failure
from torchserve_dag.runtime.worker.protocol import ServiceResponse
from torchserve_dag.runtime.worker.response import write_failure, write_failure_after_chunks


@dataclass(slots=True)
class Exchange:
    """An unanswered request in asynchronous mode. How TorchServe (0.12.0) treats its responses:

    - It forgets a request only at a response with `ts_stream_next: false`.
    - Over REST that header makes chunks of the responses, and the response with `false` sends no status line.
    - Over REST a status of 400 or more closes the connection after the first response: chunks would be lost.
    - Over gRPC each response is a message. A second one to Predictions ends the worker.
    """

    id: str
    rest: bool
    request_id: str
    """The request's id for the client, and in the log."""
    began: bool = False
    """Whether a chunk of the answer has been sent."""

    def chunk(self, body: bytes, content_type: str) -> bytes:
        """The message with a chunk; more will follow."""
        self.began = True
        return write_responses([wire_response(self.id, ServiceResponse(body, content_type), more=True)])

    def last(self, response: ServiceResponse) -> bytes:
        """The message that ends the exchange: the whole response, or after chunks the rest of it."""
        if self.began:  # over REST the status is sent already
            response = replace(response, status=HTTPStatus.OK)
        if self.began or not self.rest:
            return write_responses([wire_response(self.id, response, more=False)])
        whole = wire_response(self.id, response, more=True if response.status < HTTPStatus.BAD_REQUEST else None)
        return write_responses([whole, wire_response(self.id, ServiceResponse(b""), more=False)])

    def failure(self, failure: Failure) -> bytes:
        """The message that ends the exchange with a failure, before or after chunks."""
        write = write_failure_after_chunks if self.began else write_failure
        return self.last(write(failure, self.request_id))


def wire_response(wire_id: str, response: ServiceResponse, *, more: bool | None) -> WireResponse:
    """A service's response for the wire. `more`: whether more chunks will follow; None sends no such header."""
    headers = {"content-type": response.content_type, **response.headers}
    if more is not None:
        headers[NEXT] = "true" if more else "false"
    phrase = PHRASES.get(response.status, "Failed")
    return WireResponse(wire_id, response.status, phrase, response.content_type, headers, response.body)
