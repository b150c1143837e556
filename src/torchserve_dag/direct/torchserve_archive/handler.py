"""A batch through an unedited handler: rows in; bodies, statuses and headers out, as TorchServe's worker has them.

The rules are those of TorchServe's `ts/service.py` and `ts/protocol/otf_message_handler.py`, with one difference: an
answer that cannot be written fails its own request, where there it fails the whole batch.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from torchserve_dag.direct.torchserve_archive.request import ForeignRequest
from torchserve_dag.runtime import logs
from torchserve_dag.runtime.compat.context import Context
from torchserve_dag.runtime.compat.entry_point import (
    Handle,
    as_bytes,
    decoded_row,
    failure_in_prediction,
    is_out_of_memory,
)
from torchserve_dag.runtime.compat.wire import NEXT, WireRequest, read_responses
from torchserve_dag.runtime.messages import Failure
from torchserve_dag.runtime.worker.protocol import ServiceRequest, ServiceResponse
from torchserve_dag.runtime.worker.row import row_of

logger = logging.getLogger(__name__)

RAISED = "InternalServerException"
"""TorchServe's type of every failure in a worker."""
_OF_A_PREDICTION = {"explain": "False", "url_path": ""}
"""What TorchServe adds to the headers of a request to `/predictions/NAME`, whatever its client sent."""
_OF_THE_HOST = frozenset({"content-type", "content-length", "transfer-encoding", "connection", "x-request-id", NEXT})
"""Headers of a response that are not written as the handler set them: the host has them, or the response itself."""
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
_STATUSES = range(200, 600)
_WITHOUT_A_BODY = {HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED}


class ForeignHandler:
    """A loaded handler. It is called on one thread only."""

    def __init__(self, name: str, handle: Handle, context: Context) -> None:
        self._name, self._handle, self._context = name, handle, context
        # The variable by which TorchServe tells its workers of `decode_input_request` in config.properties.
        self._decodes = os.environ.get("TS_DECODE_INPUT_REQUEST", "true") == "true"

    def answer(self, batch: Sequence[ForeignRequest], chunk_sent: Callable[[], None]) -> int:
        """Answer all requests of a batch. Returns how many failed.

        `chunk_sent` is called after each chunk of their answers. Raises what is no Exception, such as SystemExit.
        """
        by_id: dict[str, ForeignRequest] = {}
        for place, request in enumerate(batch):  # clients choose ids, so two requests may have the same
            id_ = request.request.id
            while id_ in by_id:
                id_ += f"-{place}"
            by_id[id_] = request
        requests = [_wire_request(id_, request.request) for id_, request in by_id.items()]
        self._context.begin(requests)
        self._context.cl_socket = _Chunks(by_id, chunk_sent)
        try:
            answers = self._handle([self._row(request) for request in requests], self._context)
        except Exception as error:  # noqa: BLE001 (whatever a handler raises)
            return self._fail(batch, self._failure(error))
        if not isinstance(answers, list):
            return self._fail(batch, _failure("Invalid model predict output"))
        if len(answers) != len(batch):
            return self._fail(batch, _failure("number of batch response mismatched"))
        responses = [self._response(place, answer) for place, answer in enumerate(answers)]
        for request, response in zip(batch, responses, strict=True):
            if isinstance(response, Failure):
                self._fail([request], response)
            else:
                request.answer(response)
        return sum(response.status >= HTTPStatus.BAD_REQUEST for response in responses)

    def _row(self, request: WireRequest) -> dict[str, Any]:
        return decoded_row(request) if self._decodes else {key: bytearray(part) for key, part in request.row.items()}

    def _failure(self, error: Exception) -> Failure:
        """The failure of a batch whose handler raised."""
        if said := failure_in_prediction(error):
            return _failure(said[1], said[0])
        fault = logs.report(logger, error, f"{self._name} raised", line=False)
        if is_out_of_memory(error):
            return _failure("Out of resources", HTTPStatus.INSUFFICIENT_STORAGE, fault)
        return _failure("Prediction failed", fault=fault)

    def _fail(self, requests: Sequence[ForeignRequest], failure: Failure) -> int:
        fault = f" (fault {failure.fault})" if failure.fault else ""
        for request in requests:
            logger.error("request %s: %s: %s%s", request.request.id, self._name, failure.message, fault)
            request.fail(failure)
        return len(requests)

    def _response(self, place: int, answer: Any) -> ServiceResponse | Failure:
        """What the handler gave and set for the request at this place of its batch."""
        try:
            body = as_bytes(answer)
        except Exception as error:  # noqa: BLE001 (a handler's object may raise anything)
            fault = logs.report(logger, error, f"{self._name} gave an answer that cannot be written", line=False)
            return _failure("Unsupported model output data type.", fault=fault)
        status = self._context.get_response_status(place)[0]
        given = self._context.get_response_headers(place)
        wrong = next((name for name, value in given.items() if not _fits_http(name, value)), None)
        if status not in _STATUSES or wrong is not None:
            what = f"the status {status}" if wrong is None else f"the header {wrong!r}"
            return _failure(f"The handler set {what}, which HTTP does not carry.", HTTPStatus.INTERNAL_SERVER_ERROR)
        headers = {name.lower(): value for name, value in given.items()}
        own = {name: value for name, value in headers.items() if name not in _OF_THE_HOST}
        body = b"" if status in _WITHOUT_A_BODY else body
        return ServiceResponse(body, headers.get("content-type", ""), int(status), own)


class _Chunks:
    """What TorchServe's `send_intermediate_predict_response` takes for the socket of TorchServe."""

    def __init__(self, requests: Mapping[str, ForeignRequest], sent: Callable[[], None]) -> None:
        self._requests, self._sent = requests, sent

    def sendall(self, message: bytes) -> None:
        for response in read_responses(bytearray(message))[2]:
            if request := self._requests.get(response.id):  # a thread of the handler's may be late
                kind = response.content_type
                request.send_chunk(response.body, kind if _VALUE.fullmatch(kind) else "")
        self._sent()


def _wire_request(id_: str, request: ServiceRequest) -> WireRequest:
    """A request as TorchServe sends it. A compressed body stays compressed, as it does there."""
    row = row_of(request)
    return WireRequest(id_, dict(row.values), {**row.headers, **_OF_A_PREDICTION})


def _failure(message: str, status: int = HTTPStatus.SERVICE_UNAVAILABLE, fault: str = "") -> Failure:
    return Failure(status, message, RAISED, fault=fault)


def _fits_http(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, str) and bool(_NAME.fullmatch(name) and _VALUE.fullmatch(value))
