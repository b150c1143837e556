"""The REST clients, on httpx."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import httpx

from torchserve_dag.clients import flows
from torchserve_dag.clients.bodies import UNKNOWN
from torchserve_dag.clients.chunks import FailureFilter
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
from torchserve_dag.clients.settings import Port
from torchserve_dag.runtime.data.parts import Body

LIMITS = httpx.Limits(max_connections=256, max_keepalive_connections=256)
# trust_env=False below: the environment's proxy is for the web, not for model servers.


@dataclass(eq=False)
class RestClient(Client):
    """The client over REST."""

    protocol = "rest"

    transport: httpx.BaseTransport | None = field(default=None, kw_only=True)
    """A transport of httpx, for tests without a server."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._http = httpx.Client(transport=self.transport, verify=self._verify(), limits=LIMITS, trust_env=False)

    def feedback(self, request_id: str, score: float, *, timeout: float | None = None) -> None:
        """Tell the front door how good the answer to a request was; name it beforehand with `Options.request_id`."""
        return self._run(flows.feedback(request_id, score), timeout)

    def close(self) -> None:
        self._http.close()

    def _send(self, call: Call, deadline: Deadline) -> bytes:
        return b"".join(self._stream(call, deadline))

    def _stream(self, call: Call, deadline: Deadline) -> Generator[bytes, None, None]:
        request = _request(call, self._port(call), deadline, self.server_name)
        with _translated(request, deadline):
            response = self._http.send(request, stream=True)
            try:
                if not response.is_success:
                    raise _error(response, response.read())
                body = FailureFilter()
                for chunk in response.iter_bytes():
                    yield from body.feed(chunk)
                    deadline.left()
                yield body.held
            finally:
                response.close()


@dataclass(eq=False)
class AsyncRestClient(AsyncClient):
    """The asyncio client over REST."""

    protocol = "rest"

    transport: httpx.AsyncBaseTransport | None = field(default=None, kw_only=True)
    """A transport of httpx, for tests without a server."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._http = httpx.AsyncClient(transport=self.transport, verify=self._verify(), limits=LIMITS, trust_env=False)

    async def feedback(self, request_id: str, score: float, *, timeout: float | None = None) -> None:
        """As RestClient.feedback."""
        return await self._run(flows.feedback(request_id, score), timeout)

    async def close(self) -> None:
        await self._http.aclose()

    async def _send(self, call: Call, deadline: Deadline) -> bytes:
        return b"".join([chunk async for chunk in self._stream(call, deadline)])

    async def _stream(self, call: Call, deadline: Deadline) -> AsyncGenerator[bytes, None]:
        request = _request(call, self._port(call), deadline, self.server_name)
        with _translated(request, deadline):
            response = await self._http.send(request, stream=True)
            try:
                if not response.is_success:
                    raise _error(response, await response.aread())
                body = FailureFilter()
                async for chunk in response.aiter_bytes():
                    for passed in body.feed(chunk):
                        yield passed
                    deadline.left()
                yield body.held
            finally:
                await response.aclose()


def _request(call: Call, port: Port, deadline: Deadline, server_name: str | None) -> httpx.Request:
    """A call as HTTP."""
    method, path = "GET", ""
    headers: dict[str, str] = {}
    body: dict[str, Any] = {}
    match call:
        case Predict() | Cancel():
            method, path = "POST", f"/predictions/{_path(call.name, call.version)}"
            headers, body = _content(call)
            headers |= {**call.options.route_by, **call.asks(deadline.left())}
        case Ping():
            path = "/ping"
        case ListModels():
            path = f"/models?limit={PAGE}&next_page_token={call.page}"
        case Describe():
            path = f"/models/{_path(call.name, call.version)}{'?customized=true' if call.customized else ''}"
        case SetDefault():
            method, path = "PUT", f"/models/{_path(call.name, call.version)}/set-default"
        case Register():
            # Synchronously, TorchServe would wait for the workers in a thread that other requests need.
            method, path = "POST", f"/models?synchronous=false&url={quote(call.archive, safe='')}"
        case Unregister():
            method, path = "DELETE", f"/models/{_path(call.name, call.version)}"
        case Feedback():
            method, path = "POST", "/feedback"
            body = {"json": {"request_id": call.request_id, "score": call.score}}
    extensions: dict[str, Any] = {"timeout": _TimeLeft(deadline)}
    if server_name:
        extensions["sni_hostname"] = server_name
    url, headers = port.address.text + path, port.authorization | headers
    return httpx.Request(method, url, headers=headers, extensions=extensions, **body)


class _TimeLeft(dict[str, float]):
    """Gives httpx the time left as each step's timeout, so that the whole request has one limit: httpx has none."""

    def __init__(self, deadline: Deadline) -> None:
        super().__init__()
        self._deadline = deadline

    def get(self, key: str, default: Any = None) -> float:  # noqa: ARG002 (httpcore asks so)
        return self._deadline.left()


def _path(name: str, version: str | None) -> str:
    return quote(name, safe="") + (f"/{quote(version, safe='')}" if version else "")


def _content(call: Predict | Cancel) -> tuple[dict[str, str], dict[str, Any]]:
    """The headers and the body. A whole message alone is the body; with parameters all are parts of a form, because
    TorchServe hands no query to the handler.
    """
    if isinstance(call.body, Body) and not call.parameters:
        return {"Content-Type": call.body.content_type or UNKNOWN}, {"content": call.body.content}
    parts = {
        name: (name, part.content, part.content_type) if part.content_type else (None, part.content)
        for name, part in call.parts().items()
    }
    return {}, {"files": parts}


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
