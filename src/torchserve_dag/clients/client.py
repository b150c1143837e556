"""The clients' methods, plain and asyncio; `rest.py` and `grpc.py` bring the calls to the server."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Generator, Mapping
from contextlib import aclosing, closing, suppress
from types import TracebackType
from typing import Any, TypeVar, overload

from torchserve_dag.clients import flows
from torchserve_dag.clients.deadline import Deadline, may_repeat, pauses
from torchserve_dag.clients.errors import ServingError, error_in
from torchserve_dag.clients.flows import Call, Flow, Predict
from torchserve_dag.clients.models import ModelInfo
from torchserve_dag.clients.pieces import Pieces
from torchserve_dag.runtime.data.options import Options

T = TypeVar("T")
ClientType = TypeVar("ClientType", bound="Client")
AsyncClientType = TypeVar("AsyncClientType", bound="AsyncClient")
CANCEL_S = 2.0
"""How long calling a stream off may take."""


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
        parameters: Mapping[str, str] | None = None, options: Options | None = None, timeout: float | None = None,
    ) -> T: ...  # fmt: skip
    @overload
    def predict(
        self, name: str, message: Any, version: str | None = None, *, answer: None = None,
        parameters: Mapping[str, str] | None = None, options: Options | None = None, timeout: float | None = None,
    ) -> Any: ...  # fmt: skip
    def predict(
        self, name: str, message: Any, version: str | None = None, *, answer: type[T] | None = None,
        parameters: Mapping[str, str] | None = None, options: Options | None = None, timeout: float | None = None,
    ) -> T | Any:  # fmt: skip
        """A model's or a workflow's answer to one message.

        `message` is bytes, a Path, a Photo, a Text, or any dataclass or plain data, sent as JSON. `answer` is
        the message to make of the answer's body; without it you get the data of its JSON, or its bytes where
        it is none. `parameters` reach the handler beside the message; `options` are for the server itself.
        Where they name `outputs`, the answer holds each by its name: a dict, or a dataclass with these fields.
        """
        call = flows.prediction(name, message, version, parameters, options, answer)
        return self._run(flows.predict(call, answer), timeout)

    @overload
    def stream(
        self, name: str, message: Any, version: str | None = None, *, answer: type[T],
        parameters: Mapping[str, str] | None = None, options: Options | None = None, timeout: float | None = None,
    ) -> Generator[T, None, None]: ...  # fmt: skip
    @overload
    def stream(
        self, name: str, message: Any, version: str | None = None, *, answer: None = None,
        parameters: Mapping[str, str] | None = None, options: Options | None = None, timeout: float | None = None,
    ) -> Generator[bytes, None, None]: ...  # fmt: skip
    def stream(
        self, name: str, message: Any, version: str | None = None, *, answer: type[T] | None = None,
        parameters: Mapping[str, str] | None = None, options: Options | None = None, timeout: float | None = None,
    ) -> Generator[Any, None, None]:  # fmt: skip
        """A streaming model's answer, piece by piece as it comes; the timeout holds for the whole of it.

        Without `answer` these are bytes, cut as the network likes; with it, a message of each line of JSON, or
        Text, of as much as has come. Only for models that stream: over gRPC, TorchServe 0.12.0 ends the worker
        of one that does not, unless it is ours.

        A stream that is left before its end is called off: its model gets one more call, with the `cancel_key`
        and the body `{}`, which a model that is not ours takes for a prediction. To leave it at a known moment,
        write `with contextlib.closing(client.stream(…)) as pieces:`.
        """
        call = flows.streamed(flows.prediction(name, message, version, parameters, options, answer))
        pieces = Pieces(answer)
        try:
            with closing(self._repeat_stream(call, self._deadline(timeout))) as chunks:
                for chunk in chunks:
                    yield from pieces.read(chunk)
                yield from pieces.end()
        except BaseException as error:
            self._cancel(call, error)
            raise

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

    def register(self, archive: str, *, timeout: float | None = None) -> None:
        """Let the server take an archive of its model store, and start its workers; it is ready later (`models`).

        TorchServe takes it only where its `enable_model_api` is set.
        """
        return self._run(flows.register(archive), timeout)

    def unregister(self, name: str, version: str, *, timeout: float | None = None) -> None:
        """Let the server end a version's workers, with what is inside them; not the default version's."""
        return self._run(flows.unregister(name, version), timeout)

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

    def _repeat_stream(self, call: Predict, deadline: Deadline) -> Generator[bytes, None, None]:
        for pause in pauses(self.retries):
            begun = False
            try:
                with closing(self._stream(call, deadline)) as chunks:
                    for chunk in chunks:
                        _raise_failure(chunk)
                        begun = True
                        yield chunk
            except ServingError as error:
                if begun or not may_repeat(call, error, pause, deadline):
                    raise
            else:
                return
            time.sleep(pause or 0)

    def _cancel(self, call: Predict, error: BaseException) -> None:
        cancel = flows.cancellation(call, error)
        if cancel:
            with suppress(Exception):
                self._send(cancel, Deadline(CANCEL_S))


class AsyncClient(Settings, ABC):
    """Client, for asyncio: the same methods, messages and exceptions.

        async with AsyncRestClient() as client:
            found = await client.predict("yolo_detector", Path("photo.jpg"), answer=Objects)

    Make one for each event loop.
    """

    @overload
    async def predict(
        self, name: str, message: Any, version: str | None = None, *, answer: type[T],
        parameters: Mapping[str, str] | None = None, options: Options | None = None, timeout: float | None = None,
    ) -> T: ...  # fmt: skip
    @overload
    async def predict(
        self, name: str, message: Any, version: str | None = None, *, answer: None = None,
        parameters: Mapping[str, str] | None = None, options: Options | None = None, timeout: float | None = None,
    ) -> Any: ...  # fmt: skip
    async def predict(
        self, name: str, message: Any, version: str | None = None, *, answer: type[T] | None = None,
        parameters: Mapping[str, str] | None = None, options: Options | None = None, timeout: float | None = None,
    ) -> T | Any:  # fmt: skip
        """As Client.predict."""
        call = flows.prediction(name, message, version, parameters, options, answer)
        return await self._run(flows.predict(call, answer), timeout)

    @overload
    def stream(
        self, name: str, message: Any, version: str | None = None, *, answer: type[T],
        parameters: Mapping[str, str] | None = None, options: Options | None = None, timeout: float | None = None,
    ) -> AsyncGenerator[T, None]: ...  # fmt: skip
    @overload
    def stream(
        self, name: str, message: Any, version: str | None = None, *, answer: None = None,
        parameters: Mapping[str, str] | None = None, options: Options | None = None, timeout: float | None = None,
    ) -> AsyncGenerator[bytes, None]: ...  # fmt: skip
    async def stream(
        self, name: str, message: Any, version: str | None = None, *, answer: type[T] | None = None,
        parameters: Mapping[str, str] | None = None, options: Options | None = None, timeout: float | None = None,
    ) -> AsyncGenerator[Any, None]:  # fmt: skip
        """As Client.stream: `async for piece in client.stream(…)`; its `closing` is `contextlib.aclosing`."""
        call = flows.streamed(flows.prediction(name, message, version, parameters, options, answer))
        pieces = Pieces(answer)
        try:
            async with aclosing(self._repeat_stream(call, self._deadline(timeout))) as chunks:
                async for chunk in chunks:
                    for piece in pieces.read(chunk):
                        yield piece
                for piece in pieces.end():
                    yield piece
        except BaseException as error:
            await self._cancel(call, error)
            raise

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

    async def register(self, archive: str, *, timeout: float | None = None) -> None:
        """As Client.register."""
        return await self._run(flows.register(archive), timeout)

    async def unregister(self, name: str, version: str, *, timeout: float | None = None) -> None:
        """As Client.unregister."""
        return await self._run(flows.unregister(name, version), timeout)

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

    async def _repeat_stream(self, call: Predict, deadline: Deadline) -> AsyncGenerator[bytes, None]:
        for pause in pauses(self.retries):
            begun = False
            try:
                async with aclosing(self._stream(call, deadline)) as chunks:
                    async for chunk in chunks:
                        _raise_failure(chunk)
                        begun = True
                        yield chunk
            except ServingError as error:
                if begun or not may_repeat(call, error, pause, deadline):
                    raise
            else:
                return
            await asyncio.sleep(pause or 0)

    async def _cancel(self, call: Predict, error: BaseException) -> None:
        cancel = flows.cancellation(call, error)
        if cancel:
            with suppress(Exception):
                await self._send(cancel, Deadline(CANCEL_S))


def _raise_failure(body: bytes) -> bytes:
    """The body, where it is an answer. Over gRPC a failure comes as one."""
    error = error_in(body)
    if error:
        raise error
    return body
