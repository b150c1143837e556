"""One request's answer on its way to TorchServe, in the form that its client's protocol wants."""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus

from torchserve_dag.runtime.messages import Failure
from torchserve_dag.runtime.worker.reply import Reply, failed_piece, reply
from torchserve_dag.runtime.worker.torchserve.wire import NEXT, Told, write_answers


@dataclass(slots=True)
class Call:
    """What TorchServe (0.12.0) makes of an answer in asynchronous mode, and why they are as they are:

    - It forgets a request only at an answer with `ts_stream_next: false`.
    - Over REST that header makes chunks of the answers, and the one with `false` brings no status line.
    - Over REST a status of 400 or more closes the connection behind its status line: chunks would be lost.
    - Over gRPC each answer is a message. A second one to Predictions ends the worker.
    """

    id: str
    rest: bool
    request_id: str
    """What the client, and the log, call it."""
    began: bool = False
    """Whether a piece of the answer is out."""

    def piece(self, found: Reply) -> bytes:
        """What passes on a piece that is not the last."""
        self.began = True
        return write_answers([self._told(found, "true")])

    def last(self, found: Reply) -> bytes:
        """What ends the call: all of its answer, or what is left of it."""
        if self.began or not self.rest:
            return write_answers([self._told(found, "false")])
        whole = self._told(found, "true" if found.status < HTTPStatus.BAD_REQUEST else None)
        return write_answers([whole, self._told(Reply(b""), "false")])

    def end(self) -> bytes:
        """What ends a call whose pieces are all out."""
        return self.last(Reply(b""))

    def failure(self, failure: Failure) -> bytes:
        """What ends the call without an answer, or with no more of it."""
        return self.last(
            Reply(failed_piece(failure, self.request_id)) if self.began else reply(failure, self.request_id)
        )

    def _told(self, found: Reply, more: str | None) -> Told:
        headers = {"content-type": found.content_type, **found.headers, **({NEXT: more} if more else {})}
        return Told(self.id, found.status, found.phrase, found.content_type, headers, found.body)
