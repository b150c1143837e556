"""The REST clients, on httpx."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from urllib.parse import quote

import httpx

from torchserve_dag.clients import flows
from torchserve_dag.clients.client import AsyncClient, Client
from torchserve_dag.clients.deadline import Deadline
from torchserve_dag.clients.errors import connection_lost, deadline_exceeded, error_from_http, unreachable
from torchserve_dag.clients.flows import (
    PAGE,
    Call,
    Cancel,
    Describe,
    Feedback,
    ListModels,
    Ping,
    Predict,
    Register,
    SetDefault,
    Unregister,
)
from torchserve_dag.clients.pieces import Sieve
from torchserve_dag.clients.tokens import bearer

INFERENCE = "http://127.0.0.1:8080"
MANAGEMENT = "http://127.0.0.1:8081"
MAX_PORT = 65535
LIMITS = httpx.Limits(max_connections=256, max_keepalive_connections=256)
# trust_env=False below: a proxy that is set for the web is not the way to a model server.


class _Port(NamedTuple):
    """One of a server's two ports, and the header that it wants to see."""

    address: str
    headers: dict[str, str]


class _Ports:
    def __init__(self, inference: str, management: str, token: str | None, management_token: str | None) -> None:
        self._inference = _Port(_address(inference), bearer(token))
        self._management = _Port(_address(management), bearer(management_token))

    def request(self, call: Call, deadline: Deadline) -> httpx.Request:
        """A call as HTTP."""
        port, method, path = self._management, "GET", ""
        headers: dict[str, str] = {}
        body: dict[str, Any] = {}
        match call:
            case Predict() | Cancel():
                port, method, path = self._inference, "POST", f"/predictions/{_path(call.name, call.version)}"
                headers, body = _content(call)
                headers |= {**call.options.route_by, **call.asks(deadline.left())}
            case Ping():
                port, path = self._inference, "/ping"
            case ListModels():
                path = f"/models?limit={PAGE}&next_page_token={call.page}"
            case Describe():
                path = f"/models/{_path(call.name, call.version)}{'?customized=true' if call.customized else ''}"
            case SetDefault():
                method, path = "PUT", f"/models/{_path(call.name, call.version)}/set-default"
            case Register():
                # TorchServe waits for the workers in a thread that answers others, whose requests hang meanwhile.
                method, path = "POST", f"/models?synchronous=false&url={quote(call.archive, safe='')}"
            case Unregister():
                method, path = "DELETE", f"/models/{_path(call.name, call.version)}"
            case Feedback():
                port, method, path = self._inference, "POST", "/feedback"
                body = {"json": {"request_id": call.request_id, "score": call.score}}
        extensions = {"timeout": _TimeLeft(deadline)}
        return httpx.Request(method, port.address + path, headers=port.headers | headers, extensions=extensions, **body)


class RestClient(Client):
    """The client over REST. `transport` is httpx's: for TLS of your own, a socket, or a fake in a test.

    Raises ValueError where an address is none.
    """

    def __init__(
        self,
        inference: str = INFERENCE,
        management: str = MANAGEMENT,
        *,
        token: str | None = None,
        management_token: str | None = None,
        timeout: float = 30.0,
        retries: int = 2,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        super().__init__(timeout, retries)
        self._ports = _Ports(inference, management, token, management_token)
        self._http = httpx.Client(transport=transport, limits=LIMITS, trust_env=False)

    def feedback(self, request_id: str, score: float, *, timeout: float | None = None) -> None:
        """Tell the front door how good the answer to a request was; `Options.request_id` names it beforehand."""
        return self._run(flows.feedback(request_id, score), timeout)

    def close(self) -> None:
        self._http.close()

    def _send(self, call: Call, deadline: Deadline) -> bytes:
        return b"".join(self._stream(call, deadline))

    def _stream(self, call: Call, deadline: Deadline) -> Generator[bytes, None, None]:
        request = self._ports.request(call, deadline)
        with _translated(request, deadline):
            response = self._http.send(request, stream=True)
            try:
                if not response.is_success:
                    raise _error(response, response.read())
                sieve = Sieve()
                for chunk in response.iter_bytes():
                    yield from sieve.sift(chunk)
                    deadline.left()
                yield sieve.held
            finally:
                response.close()


class AsyncRestClient(AsyncClient):
    """The asyncio client over REST. Raises ValueError where an address is none."""

    def __init__(
        self,
        inference: str = INFERENCE,
        management: str = MANAGEMENT,
        *,
        token: str | None = None,
        management_token: str | None = None,
        timeout: float = 30.0,
        retries: int = 2,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        super().__init__(timeout, retries)
        self._ports = _Ports(inference, management, token, management_token)
        self._http = httpx.AsyncClient(transport=transport, limits=LIMITS, trust_env=False)

    async def feedback(self, request_id: str, score: float, *, timeout: float | None = None) -> None:
        """As RestClient.feedback."""
        return await self._run(flows.feedback(request_id, score), timeout)

    async def close(self) -> None:
        await self._http.aclose()

    async def _send(self, call: Call, deadline: Deadline) -> bytes:
        return b"".join([piece async for piece in self._stream(call, deadline)])

    async def _stream(self, call: Call, deadline: Deadline) -> AsyncGenerator[bytes, None]:
        request = self._ports.request(call, deadline)
        with _translated(request, deadline):
            response = await self._http.send(request, stream=True)
            try:
                if not response.is_success:
                    raise _error(response, await response.aread())
                sieve = Sieve()
                async for chunk in response.aiter_bytes():
                    for piece in sieve.sift(chunk):
                        yield piece
                    deadline.left()
                yield sieve.held
            finally:
                await response.aclose()


class _TimeLeft(dict[str, float]):
    """httpx's timeouts, which hold for one step each, as a deadline for all: each step asks, and gets what is left."""

    def __init__(self, deadline: Deadline) -> None:
        super().__init__()
        self._deadline = deadline

    def get(self, key: str, default: Any = None) -> float:  # noqa: ARG002 (httpcore asks so)
        return self._deadline.left()


def _address(text: str) -> str:
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        url = httpx.URL()
    if url.scheme not in {"http", "https"} or not url.host or (url.port or 0) > MAX_PORT:
        raise ValueError(f'"{text}" is not an address; write http://HOST:PORT')
    return text.rstrip("/")


def _path(name: str, version: str | None) -> str:
    return quote(name, safe="") + (f"/{quote(version, safe='')}" if version else "")


def _content(call: Predict | Cancel) -> tuple[dict[str, str], dict[str, Any]]:
    """The headers and the body. A message alone is the body; with parameters, all are parts of a form, for
    TorchServe does not hand a query to the handler.
    """
    if not call.parameters:
        return {"Content-Type": call.body.content_type}, {"content": call.body.content}
    parts: dict[str, Any] = {"body": ("body", call.body.content, call.body.content_type)}
    return {}, {"files": parts | {key: (None, value) for key, value in call.parameters.items()}}


@contextmanager
def _translated(request: httpx.Request, deadline: Deadline) -> Iterator[None]:
    address = f"{request.url.scheme}://{request.url.netloc.decode()}"
    try:
        yield
    except httpx.TimeoutException:
        raise deadline_exceeded(deadline.timeout_s) from None
    except (httpx.ConnectError, httpx.ProxyError) as error:
        raise unreachable(address, error) from None
    except (httpx.NetworkError, httpx.RemoteProtocolError) as error:
        raise connection_lost(address, error) from None


def _error(response: httpx.Response, body: bytes) -> Exception:
    return error_from_http(response.status_code, body, response.headers.get("x-request-id"))
