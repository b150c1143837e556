"""The clients' methods, plain and asyncio; `rest.py` and `grpc.py` bring the calls to the server."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Generator, Mapping
from types import TracebackType
from typing import Any, TypeVar, overload

from torchserve_dag.clients import flows
from torchserve_dag.clients.deadline import Deadline, may_repeat, pauses
from torchserve_dag.clients.errors import ServingError, error_in
from torchserve_dag.clients.flows import Call, Flow
from torchserve_dag.clients.models import ModelInfo

T = TypeVar("T")
ClientType = TypeVar("ClientType", bound="Client")
AsyncClientType = TypeVar("AsyncClientType", bound="AsyncClient")


class Settings:
    """What all clients share: how long a call may take, and how often it may be sent again."""

    def __init__(self, timeout: float, retries: int) -> None:
        if timeout <= 0 or retries < 0:
            raise ValueError(f"timeout is more than 0 and retries at least 0, not {timeout} and {retries}")
        self.timeout = timeout
        self.retries = retries

    def _deadline(self, timeout: float | None) -> Deadline:
        return Deadline(self.timeout if timeout is None else timeout)


class Client(Settings, ABC):
    """Calls a server's models. Threads may share one: its connections are kept and used again.

        with RestClient() as client:
            found = client.predict("yolo_detector", Path("photo.jpg"), answer=Objects)

    Every method raises ServingError, or one of its kinds, where there is no answer (see `errors`), and takes
    a `timeout` in seconds, which holds for the whole call, retries and pauses included.
    """

    @overload
    def predict(
        self, name: str, message: Any, version: str | None = None, *, answer: type[T],
        parameters: Mapping[str, str] | None = None, timeout: float | None = None,
    ) -> T: ...  # fmt: skip
    @overload
    def predict(
        self, name: str, message: Any, version: str | None = None, *, answer: None = None,
        parameters: Mapping[str, str] | None = None, timeout: float | None = None,
    ) -> Any: ...  # fmt: skip
    def predict(
        self, name: str, message: Any, version: str | None = None, *, answer: type[T] | None = None,
        parameters: Mapping[str, str] | None = None, timeout: float | None = None,
    ) -> T | Any:  # fmt: skip
        """A model's or a workflow's answer to one message.

        `message` is bytes, a Path, a Photo, a Text, or any dataclass or plain data, sent as JSON. `answer` is
        the message to make of the answer's body; without it you get the data of its JSON, or its bytes where
        it is none. `parameters` reach the handler beside the message.
        """
        call = flows.prediction(name, message, version, parameters)
        return self._run(flows.predict(call, answer), timeout)

    def stream(
        self, name: str, message: Any, version: str | None = None, *,
        parameters: Mapping[str, str] | None = None, timeout: float | None = None,
    ) -> Generator[bytes, None, None]:  # fmt: skip
        """A streaming model's answer, piece by piece as it comes; the timeout holds for the whole of it.

        Only for handlers that stream: over gRPC, TorchServe 0.12.0 ends the worker of one that does not.
        """
        call = flows.prediction(name, message, version, parameters)
        deadline = self._deadline(timeout)
        for pause in pauses(self.retries):
            begun = False
            try:
                for piece in self._stream(call, deadline):
                    _raise_failure(piece)
                    begun = True
                    yield piece
            except ServingError as error:
                if begun or not may_repeat(call, error, pause, deadline):
                    raise
            else:
                return
            time.sleep(pause or 0)

    def ready(self, name: str | None = None, version: str | None = None, *, timeout: float | None = None) -> bool:
        """Whether the server, or a model of it, can answer now. False too where nothing listens, or the model
        is unknown: it may be about to come. Raises Unauthorized, which waiting does not mend.
        """
        return self._run(flows.ready(name, version), timeout)

    def models(self, *, timeout: float | None = None) -> list[ModelInfo]:
        """Every model that the server has, with its versions and workers."""
        return self._run(flows.models(), timeout)

    def describe(self, name: str, version: str | None = None, *, timeout: float | None = None) -> dict[str, Any]:
        """What TorchServe says of one version; `customizedMetadata` holds what its handler says of itself."""
        return self._run(flows.describe(name, version), timeout)

    def set_default(self, name: str, version: str, *, timeout: float | None = None) -> None:
        """Let `version` answer, from now on, where a call names no version."""
        return self._run(flows.set_default(name, version), timeout)

    @abstractmethod
    def close(self) -> None:
        """Give the connections back."""

    def __enter__(self: ClientType) -> ClientType:  # noqa: PYI019 (typing.Self is newer than Python 3.10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def _send(self, call: Call, deadline: Deadline) -> bytes:
        """The answer's body."""

    @abstractmethod
    def _stream(self, call: Call, deadline: Deadline) -> Generator[bytes, None, None]:
        """The answer's body, piece by piece."""

    def _run(self, flow: Flow[T], timeout: float | None) -> T:
        deadline = self._deadline(timeout)
        try:
            call = next(flow)
            while True:
                try:
                    body = self._repeat(call, deadline)
                except ServingError as error:
                    call = flow.throw(error)
                else:
                    call = flow.send(body)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]

    def _repeat(self, call: Call, deadline: Deadline) -> bytes:
        for pause in pauses(self.retries):
            try:
                return _raise_failure(self._send(call, deadline))
            except ServingError as error:
                if not may_repeat(call, error, pause, deadline):
                    raise
            time.sleep(pause or 0)
        raise AssertionError("the last pause ends the loop")


class AsyncClient(Settings, ABC):
    """Client, for asyncio: the same methods, messages and exceptions.

        async with AsyncRestClient() as client:
            found = await client.predict("yolo_detector", Path("photo.jpg"), answer=Objects)

    Make one for each event loop.
    """

    @overload
    async def predict(
        self, name: str, message: Any, version: str | None = None, *, answer: type[T],
        parameters: Mapping[str, str] | None = None, timeout: float | None = None,
    ) -> T: ...  # fmt: skip
    @overload
    async def predict(
        self, name: str, message: Any, version: str | None = None, *, answer: None = None,
        parameters: Mapping[str, str] | None = None, timeout: float | None = None,
    ) -> Any: ...  # fmt: skip
    async def predict(
        self, name: str, message: Any, version: str | None = None, *, answer: type[T] | None = None,
        parameters: Mapping[str, str] | None = None, timeout: float | None = None,
    ) -> T | Any:  # fmt: skip
        """As Client.predict."""
        call = flows.prediction(name, message, version, parameters)
        return await self._run(flows.predict(call, answer), timeout)

    async def stream(
        self, name: str, message: Any, version: str | None = None, *,
        parameters: Mapping[str, str] | None = None, timeout: float | None = None,
    ) -> AsyncGenerator[bytes, None]:  # fmt: skip
        """As Client.stream: `async for piece in client.stream(…)`."""
        call = flows.prediction(name, message, version, parameters)
        deadline = self._deadline(timeout)
        for pause in pauses(self.retries):
            begun = False
            try:
                async for piece in self._stream(call, deadline):
                    _raise_failure(piece)
                    begun = True
                    yield piece
            except ServingError as error:
                if begun or not may_repeat(call, error, pause, deadline):
                    raise
            else:
                return
            await asyncio.sleep(pause or 0)

    async def ready(self, name: str | None = None, version: str | None = None, *, timeout: float | None = None) -> bool:
        """As Client.ready."""
        return await self._run(flows.ready(name, version), timeout)

    async def models(self, *, timeout: float | None = None) -> list[ModelInfo]:
        """As Client.models."""
        return await self._run(flows.models(), timeout)

    async def describe(self, name: str, version: str | None = None, *, timeout: float | None = None) -> dict[str, Any]:
        """As Client.describe."""
        return await self._run(flows.describe(name, version), timeout)

    async def set_default(self, name: str, version: str, *, timeout: float | None = None) -> None:
        """As Client.set_default."""
        return await self._run(flows.set_default(name, version), timeout)

    @abstractmethod
    async def close(self) -> None:
        """Give the connections back."""

    async def __aenter__(self: AsyncClientType) -> AsyncClientType:  # noqa: PYI019
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @abstractmethod
    async def _send(self, call: Call, deadline: Deadline) -> bytes:
        """The answer's body."""

    @abstractmethod
    def _stream(self, call: Call, deadline: Deadline) -> AsyncGenerator[bytes, None]:
        """The answer's body, piece by piece."""

    async def _run(self, flow: Flow[T], timeout: float | None) -> T:
        deadline = self._deadline(timeout)
        try:
            call = next(flow)
            while True:
                try:
                    body = await self._repeat(call, deadline)
                except ServingError as error:
                    call = flow.throw(error)
                else:
                    call = flow.send(body)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]

    async def _repeat(self, call: Call, deadline: Deadline) -> bytes:
        for pause in pauses(self.retries):
            try:
                return _raise_failure(await self._send(call, deadline))
            except ServingError as error:
                if not may_repeat(call, error, pause, deadline):
                    raise
            await asyncio.sleep(pause or 0)
        raise AssertionError("the last pause ends the loop")


def _raise_failure(body: bytes) -> bytes:
    """The body, where it is an answer. Over gRPC a failure comes as one."""
    error = error_in(body)
    if error:
        raise error
    return body
