"""The calls to a model that one request makes: with the headers of the client that routes and limits go by."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

from torchserve_dag.gateway.call import ModelAnswer, ModelsSocket
from torchserve_dag.gateway.errors import ApiError
from torchserve_dag.gateway.models import ModelName
from torchserve_dag.runtime.data import plain
from torchserve_dag.runtime.data.options import (
    ARRIVED,
    CANCEL,
    CANCEL_KEY,
    OUTPUTS,
    PIECES,
    REQUEST_ID,
    TOKEN,
    WITH_USAGE,
)
from torchserve_dag.runtime.messages import Chat, Prompt, Text

_OWN = frozenset({"host", "connection", "keep-alive", "te", "trailer", "upgrade", "expect", "authorization"})
_OF_BODY = frozenset({"content-length", "content-type", "content-encoding", "transfer-encoding", "accept-encoding"})
_OPTIONS = frozenset({OUTPUTS, PIECES, CANCEL, CANCEL_KEY, ARRIVED, WITH_USAGE})
_PREFIXES = ("x-door-", "x-envoy-", "x-forwarded-", "x-stainless-", "proxy-")
_cancelling: set[asyncio.Task[None]] = set()


def passed_on(headers: Mapping[str, str]) -> dict[str, str]:
    """Of a client's headers, in lower case, those for the model's call: by any of them `routes.yaml` may choose."""
    dropped = _OWN | _OF_BODY | _OPTIONS
    kept = {name: value for name, value in headers.items() if name not in dropped and not name.startswith(_PREFIXES)}
    return kept | {name: headers[name] for name in (TOKEN,) if name in headers}


class ModelCalls:
    """Calls one model, for one request."""

    def __init__(self, socket: ModelsSocket, model: ModelName, headers: Mapping[str, str], *, cancels: bool) -> None:
        """`headers` are the client's. `cancels`: whether a call that is left has to be cancelled by its key, for
        TorchServe does not see that its connection is closed.
        """
        self.request_id = headers.get(REQUEST_ID) or uuid.uuid4().hex
        self.answered_by = model.name
        """The model with the version that answered."""
        self._socket, self._model, self._cancels = socket, model, cancels
        self._headers = passed_on(headers) | {REQUEST_ID: self.request_id, WITH_USAGE: "true"}

    @asynccontextmanager
    async def call(self, message: Chat | Prompt | Text) -> AsyncIterator[ModelAnswer]:
        """The answer to a message; leaving the block cancels what is not done. Raises ApiError."""
        if self._model.adapter and not isinstance(message, Text):
            message = replace(message, adapter=self._model.adapter)
        headers = {**self._headers, "content-type": "application/json"}
        key = {CANCEL_KEY: uuid.uuid4().hex} if self._cancels else {}
        try:
            async with self._socket.call(self._model.path, headers | key, plain.to_json(message)) as answer:
                if version := answer.headers.get("x-model-version"):
                    self.answered_by = self._model.answered_by(version)
                yield answer
        except (asyncio.CancelledError, GeneratorExit):
            if key:
                task = asyncio.ensure_future(self._cancel(headers | {CANCEL: key[CANCEL_KEY]}))
                _cancelling.add(task)
                task.add_done_callback(_cancelling.discard)
            raise

    async def _cancel(self, headers: Mapping[str, str]) -> None:
        with suppress(ApiError):
            async with self._socket.call(self._model.path, headers, b"{}") as answer:
                await answer.whole()
