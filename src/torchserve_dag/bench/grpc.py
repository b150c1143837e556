"""Requests over gRPC: TorchServe's Predictions."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import grpc
import grpc.aio

from torchserve_dag.bench.sender import LOST, TOO_LATE, UNREACHABLE, Answer, Done, Sender
from torchserve_dag.clients.grpc import OPTIONS
from torchserve_dag.clients.settings import bearer
from torchserve_dag.runtime.data.codec import failure_in
from torchserve_dag.runtime.protos.inference_pb2 import PredictionsRequest
from torchserve_dag.runtime.protos.inference_pb2_grpc import InferenceAPIsServiceStub

_OWN_CONNECTION = ("grpc.use_local_subchannel_pool", 1)  # without it, equal channels share one connection
_STATUS = {
    grpc.StatusCode.UNAVAILABLE: HTTPStatus.SERVICE_UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED: HTTPStatus.TOO_MANY_REQUESTS,
}


class GrpcSender(Sender):
    """A few connections that take requests in turn. A failure in an answer's body counts as a failure."""

    def __init__(
        self,
        target: str,
        model: str,
        version: str,
        token: str | None,
        bodies: Sequence[bytes],
        limit_s: float,
        connections: int,
    ) -> None:
        self._channels = [grpc.aio.insecure_channel(target, (*OPTIONS, _OWN_CONNECTION)) for _ in range(connections)]
        self._stubs = [InferenceAPIsServiceStub(channel) for channel in self._channels]
        self._requests = [
            PredictionsRequest(model_name=model, model_version=version, input={"data": body}) for body in bodies
        ]
        self._metadata = tuple(bearer(token).items())
        self._limit_s = limit_s
        self._sent = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def send(self, body: int, done: Done) -> None:
        self._sent += 1
        stub = self._stubs[self._sent % len(self._stubs)]
        task = asyncio.get_running_loop().create_task(self._send(stub, body, done))
        self._tasks.add(task)  # the event loop itself keeps only weak references to tasks
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        for channel in self._channels:
            await channel.close()

    async def _send(self, stub: InferenceAPIsServiceStub, body: int, done: Done) -> None:
        try:
            reply = await stub.Predictions(self._requests[body], timeout=self._limit_s, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            done(_failed(error))
        else:
            content = bytes(reply.prediction)
            failure = failure_in(content)
            done(Answer(failure.status if failure else HTTPStatus.OK, content))


def _failed(error: Any) -> Answer:
    code, said = error.code(), error.details() or ""
    text, content = said.lower(), said.encode()
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return Answer(0, reason=TOO_LATE)
    if code is grpc.StatusCode.UNAVAILABLE and "connect" in text:
        return Answer(0, content, UNREACHABLE)
    if code is grpc.StatusCode.UNAVAILABLE and ("socket" in text or "goaway" in text):
        return Answer(0, content, LOST)
    if "has no worker to serve" in text:  # TorchServe's full queue: INTERNAL here, 503 over REST
        return Answer(HTTPStatus.SERVICE_UNAVAILABLE, content)
    return Answer(_STATUS.get(code, HTTPStatus.INTERNAL_SERVER_ERROR), content, code.name)
