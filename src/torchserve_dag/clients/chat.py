"""A chat with a language model, over OpenAI's API behind the front door: its answer in parts, as they are written."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import httpx

from torchserve_dag.clients.errors import (
    NO_MODEL,
    ServingError,
    connection_lost,
    deadline_exceeded,
    error_from_http,
    error_of,
    unexpected_answer,
    unreachable,
)
from torchserve_dag.clients.settings import Settings, bearer

CONNECT_S = 10.0
MAX_EVENT = 2**20
"""In bytes, the longest line of a stream."""


@dataclass(frozen=True, slots=True)
class ChatPart:
    """The next part of an answer."""

    text: str = ""
    finish_reason: str | None = None
    """Of the last part with text: `stop`, or `length` where the answer was cut at its limit."""
    usage: dict[str, Any] = field(default_factory=dict)
    """At the very end: `prompt_tokens`, `completion_tokens`, …"""


@dataclass(eq=False)
class ChatClient(Settings):
    """A client of `/v1/chat/completions`. `timeout` is the longest wait for the next part of an answer."""

    protocol = "rest"

    def __post_init__(self) -> None:
        super().__post_init__()
        timeout = httpx.Timeout(self.timeout, connect=min(self.timeout, CONNECT_S))
        self._http = httpx.Client(verify=self._verify(), timeout=timeout, trust_env=False)

    def __enter__(self) -> ChatClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def answer(
        self, model: str, messages: Sequence[dict[str, str]], **sampling: float | None
    ) -> Generator[ChatPart, None, None]:
        """What a model goes on with. Closed before its end, it cancels the answer. Raises ServingError."""
        body: dict[str, Any] = {name: value for name, value in sampling.items() if value is not None}
        body |= {"model": model, "messages": list(messages), "stream": True, "stream_options": {"include_usage": True}}
        extensions = {"sni_hostname": self.server_name} if self.server_name else {}
        url = f"{self._inference.text}/v1/chat/completions"
        request = self._http.build_request("POST", url, json=body, headers=bearer(self.token), extensions=extensions)
        with self._translated():
            response = self._http.send(request, stream=True)
            try:
                if not response.is_success:
                    raise _error(response, response.read())
                yield from self._parts(response)
            finally:
                response.close()

    def _parts(self, response: httpx.Response) -> Iterator[ChatPart]:
        for line in _lines(response):
            kind, _, data = line.partition(b":")
            if kind != b"data":
                continue
            if data.strip() == b"[DONE]":
                return
            event = json.loads(data)
            if "error" in event:
                raise _in_openai_form(event["error"], HTTPStatus.INTERNAL_SERVER_ERROR, None)
            (choice, *_) = event.get("choices") or [{}]
            text = (choice.get("delta") or {}).get("content") or ""
            yield ChatPart(text, choice.get("finish_reason"), event.get("usage") or {})
        raise connection_lost(self._inference, "the answer has no end")

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except httpx.TimeoutException:
            raise deadline_exceeded(self.timeout) from None
        except httpx.ConnectError as error:
            raise unreachable(self._inference, error) from None
        except httpx.TransportError as error:
            raise connection_lost(self._inference, error) from None
        except (ValueError, AttributeError, TypeError) as error:
            raise unexpected_answer(f"{self._inference} sent no chat: {error}.") from None


def _lines(response: httpx.Response) -> Iterator[bytes]:
    """The lines of a response, as they come. Raises ValueError for one without an end."""
    rest = b""
    for chunk in response.iter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
        if len(rest) > MAX_EVENT:
            raise ValueError(f"a line of more than {MAX_EVENT:,} bytes")


def _error(response: httpx.Response, body: bytes) -> ServingError:
    """The exception for a refusal: in OpenAI's form, or the front door's own."""
    request_id = response.headers.get("x-request-id")
    try:
        error = json.loads(body)["error"]
        return _in_openai_form(error, response.status_code, request_id)
    except (ValueError, KeyError, TypeError, AttributeError):
        return error_from_http(response.status_code, body, request_id)


def _in_openai_form(error: dict[str, Any], status: int, request_id: str | None) -> ServingError:
    kind = NO_MODEL if error.get("code") == "model_not_found" else ""
    return error_of(status, kind, str(error["message"]), request_id=request_id)
