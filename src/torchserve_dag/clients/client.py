"""The clients' methods, plain and asyncio; `rest.py` and `grpc.py` send the calls to the server."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Generator, Mapping
from contextlib import aclosing, closing, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar, overload

from torchserve_dag.clients import flows
from torchserve_dag.clients.chunks import MessageReader
from torchserve_dag.clients.deadline import Deadline, may_repeat, pauses
from torchserve_dag.clients.errors import ServingError, error_in
from torchserve_dag.clients.flows import Call, Flow, Predict
from torchserve_dag.clients.models import ModelInfo
from torchserve_dag.clients.settings import Settings
from torchserve_dag.runtime.data.options import Options

T = TypeVar("T")
ClientType = TypeVar("ClientType", bound="Client")
AsyncClientType = TypeVar("AsyncClientType", bound="AsyncClient")
CANCEL_S = 2.0
"""How long the request that cancels a stream may take."""


@dataclass(eq=False)
class Client(Settings, ABC):
    """Calls a server's models. Threads may share a client, which reuses its connections.

        with RestClient("https://host:8443", token=token, ca="front_door.pem") as client:
            objects = client.predict("yolo_detector", Path("photo.jpg"), answer=Objects)

    Every method raises ServingError, or a subclass of it, if there is no answer (see `errors`), and has a
    `timeout` in seconds for the whole call, retries and pauses included.
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
        the type to read the answer's body as; without it you get the data of its JSON, or its bytes if it is
        not JSON. `parameters` reach the handler beside the message; `options` are for the server itself. If they
        name `outputs`, the answer holds the result of each of these nodes: a dict, or a dataclass with these fields.
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
        """A streaming model's answer, chunk by chunk as it arrives; the timeout holds for the whole answer.

        Without `answer` the chunks are bytes, cut where the network cuts them; with it, a message for each line of
        JSON, or Text with what has arrived. Only for models that stream: over gRPC, TorchServe 0.12.0 ends the
        worker of a model that does not, unless `torchserve-dag build` made its archive.

        A stream that you stop reading early is cancelled: its model gets one more request, with the `cancel_key` and
        the body `{}`. A handler that does not know the key treats it as a prediction. To cancel at a known
        moment, write `with contextlib.closing(client.stream(…)) as chunks:`.
        """
        call = flows.streamed(flows.prediction(name, message, version, parameters, options, answer))
        reader = MessageReader(answer)
        try:
            with closing(self._repeat_stream(call, self._deadline(timeout))) as chunks:
                for chunk in chunks:
                    yield from reader.read(chunk)
                yield from reader.end()
        except BaseException as error:
            self._cancel(call, error)
            raise

    def ready(self, name: str | None = None, version: str | None = None, *, timeout: float | None = None) -> bool:
        """Whether the server, or one of its models, can answer now. Also false if nothing listens, or if the model
        is unknown, since either may be starting. Raises Unauthorized and TlsFailed, because waiting does not help.
        """
        return self._run(flows.ready(name, version), timeout)

    def models(self, *, timeout: float | None = None) -> list[ModelInfo]:
        """Every model that the server has, with its versions and workers."""
        return self._run(flows.models(), timeout)

    def describe(self, name: str, version: str | None = None, *, timeout: float | None = None) -> dict[str, Any]:
        """TorchServe's description of one version; `customizedMetadata` holds what its handler adds to it."""
        return self._run(flows.describe(name, version), timeout)

    def set_default(self, name: str, version: str, *, timeout: float | None = None) -> None:
        """Make `version` the default, which answers requests that name no version."""
        return self._run(flows.set_default(name, version), timeout)

    def register(self, archive: str, *, timeout: float | None = None) -> None:
        """Load an archive from the server's model store and start its workers; `models` says when they are ready.

        TorchServe accepts this only if its `enable_model_api` is set.
        """
        return self._run(flows.register(archive), timeout)

    def unregister(self, name: str, version: str, *, timeout: float | None = None) -> None:
        """End a version's workers with the requests in them. TorchServe refuses this for the default version."""
        return self._run(flows.unregister(name, version), timeout)

    @abstractmethod
    def close(self) -> None:
        """Close the connections."""

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
        """The answer's body, chunk by chunk."""

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
                    raise self._explained(call, error) from None
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
                if begun:
                    raise
                if not may_repeat(call, error, pause, deadline):
                    raise self._explained(call, error) from None
            else:
                return
            time.sleep(pause or 0)

    def _cancel(self, call: Predict, error: BaseException) -> None:
        cancel = flows.cancellation(call, error)
        if cancel:
            with suppress(Exception):
                self._send(cancel, Deadline(CANCEL_S))


@dataclass(eq=False)
class AsyncClient(Settings, ABC):
    """Client, for asyncio: the same methods, messages and exceptions.

        async with AsyncRestClient("https://host:8443", token=token, ca="front_door.pem") as client:
            objects = await client.predict("yolo_detector", Path("photo.jpg"), answer=Objects)

    Each event loop needs a client of its own.
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
        """As Client.stream: `async for chunk in client.stream(…)`; its `closing` is `contextlib.aclosing`."""
        call = flows.streamed(flows.prediction(name, message, version, parameters, options, answer))
        reader = MessageReader(answer)
        try:
            async with aclosing(self._repeat_stream(call, self._deadline(timeout))) as chunks:
                async for chunk in chunks:
                    for message_read in reader.read(chunk):
                        yield message_read
                for message_read in reader.end():
                    yield message_read
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
        """Close the connections."""

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
        """The answer's body, chunk by chunk."""

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
                    raise await asyncio.to_thread(self._explained, call, error) from None
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
                if begun:
                    raise
                if not may_repeat(call, error, pause, deadline):
                    raise await asyncio.to_thread(self._explained, call, error) from None
            else:
                return
            await asyncio.sleep(pause or 0)

    async def _cancel(self, call: Predict, error: BaseException) -> None:
        cancel = flows.cancellation(call, error)
        if cancel:
            with suppress(Exception):
                await self._send(cancel, Deadline(CANCEL_S))


def _raise_failure(body: bytes) -> bytes:
    """The body, unless it contains a failure, which arrives over gRPC as an ordinary answer: raises that."""
    error = error_in(body)
    if error:
        raise error
    return body
