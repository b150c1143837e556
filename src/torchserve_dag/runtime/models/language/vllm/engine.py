"""The engine `vllm`: vLLM's own server beside the worker, asked over a private Unix socket with OpenAI's JSON."""

from __future__ import annotations

import time
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchserve_dag.runtime.data import plain
from torchserve_dag.runtime.handler import EngineLoad, Reply
from torchserve_dag.runtime.messages import Chat, InputError, OverloadedError, Prompt, TextChunk
from torchserve_dag.runtime.models.language.answer_loop import AnswerLoop
from torchserve_dag.runtime.models.language.engine import Cancel
from torchserve_dag.runtime.models.language.openai_json import (
    DONE,
    ChunkReader,
    EventReader,
    UpstreamError,
    body_of,
    failure_of,
    parse,
    path_of,
)
from torchserve_dag.runtime.models.language.settings import LanguageSettings
from torchserve_dag.runtime.models.language.vllm import unix_http
from torchserve_dag.runtime.models.language.vllm.arguments import command
from torchserve_dag.runtime.models.language.vllm.server import VllmServer

if TYPE_CHECKING:  # it imports torch
    from torchserve_dag.runtime.compute.placement import Placement

SUPPORTS = frozenset(
    {
        *("n", "presence_penalty", "frequency_penalty", "logit_bias", "response_format", "adapter"),
        *("tools", "tool_choice", "parallel_tool_calls", "logprobs", "top_logprobs", "echo"),
    }
)
MOST_WAITING = 1_000
"""Answers that wait for a place."""
COUNT_S = 60.0
"""The longest wait for the tokens of a prompt."""
HANGS_AFTER_S = 60.0
LOAD_S = 1.0
"""How long what `/metrics` said is taken to be true."""
STARTS_AGAIN = "vllm is being started again; try again in a minute."
ENDED = "vllm ended while it wrote this answer; it is being started again. Try again in a minute."

DEAD = "EngineCore encountered an issue"
"""What vLLM's server answers, before it ends, where another of its processes has ended."""


def load(folder: Path, settings: LanguageSettings, placement: Placement) -> VllmEngine:
    """Start vLLM with a model, and wait until it is loaded. Raises ValueError, ImportError."""
    server = VllmServer(settings.model, command(folder, settings, placement))
    try:
        return VllmEngine(server, server.wait(), settings)
    except BaseException:
        server.close()
        raise


@dataclass(frozen=True, slots=True)
class Counters:
    """What vLLM's `/metrics` says of now, and the tokens that it has computed so far."""

    load: EngineLoad
    tokens: float


class VllmEngine:
    """A LanguageEngine whose answers vLLM's server writes."""

    supports = SUPPORTS

    def __init__(self, server: VllmServer, socket: Path, settings: LanguageSettings) -> None:
        """Raises ValueError if the server does not say how long its model's context is."""
        self.room, self.context = settings.room, _context(socket)
        self._server, self._settings = server, settings
        self._answers = AnswerLoop("vllm answers")
        self._progress = time.monotonic()
        """When it last wrote or computed something, or got something to do."""
        self._seen: tuple[float, Counters] = (-LOAD_S, Counters(EngineLoad(), 0))
        """When `/metrics` was last read, and what it said."""

    def count(self, request: Chat | Prompt) -> int:
        body = self._counted(request)
        try:
            status, answer = unix_http.ask(self._socket(), "/tokenize", body, COUNT_S)
        except TimeoutError:
            raise OverloadedError(f"vllm did not count the prompt's tokens within {COUNT_S:g} s.") from None
        except OSError:
            raise OverloadedError(STARTS_AGAIN) from None
        if status != HTTPStatus.OK:
            raise failure_of(status, answer)
        return int(parse(answer)["count"])

    def start(self, request: Chat | Prompt, most_tokens: int, reply: Reply[TextChunk]) -> Cancel:
        self._check_tools(request)
        body = body_of(request, self._name(request), most_tokens)
        if not self._answers:
            self._progress = time.monotonic()
        answer = self._answer(self._socket(), request, body, reply)
        return self._answers.start(answer, reply, self.room + MOST_WAITING)

    def load_now(self) -> EngineLoad:
        return self._counters().load

    def hangs(self) -> bool:
        if not self._answers or self._server.socket is None:
            return False
        if time.monotonic() - self._progress > HANGS_AFTER_S:
            self._counters()  # a long prompt is computed without an answer's chunks
        return time.monotonic() - self._progress > HANGS_AFTER_S

    def close(self) -> None:
        self._answers.close()
        self._server.close()

    def _socket(self) -> Path:
        socket = self._server.socket
        if socket is None:
            raise OverloadedError(STARTS_AGAIN)
        return socket

    def _name(self, request: Chat | Prompt) -> str:
        """The model's name at the server, or an adapter's."""
        adapters = self._settings.adapters
        if request.adapter is None:
            return self._settings.model
        if request.adapter not in adapters:
            known = plain.did_you_mean(request.adapter, list(adapters)) or "it has none"
            raise InputError(f'adapter: the model has no adapter "{request.adapter}"; {known}', HTTPStatus.NOT_FOUND)
        return request.adapter

    def _check_tools(self, request: Chat | Prompt) -> None:
        """Without a parser of the model's own form of calls, vLLM calls no tool, not even a prescribed one."""
        asked = isinstance(request, Chat) and request.tools and request.tool_choice != "none"
        if asked and not self._settings.options.get("tool_call_parser"):
            raise InputError(
                "tools: its handler does not say in which form this model calls them; "
                "leave them out, or name a tool_call_parser in the options of its settings."
            )

    def _counted(self, request: Chat | Prompt) -> dict[str, Any]:
        body: dict[str, Any] = plain.flatten(request)
        return {name: body[name] for name in ("messages", "prompt", "tools") if name in body} | {
            "model": self._name(request)
        }

    async def _answer(
        self, socket: Path, request: Chat | Prompt, body: dict[str, Any], reply: Reply[TextChunk]
    ) -> None:
        """Give the chunks of an answer. Raises InputError."""
        reader = ChunkReader("vllm", request.n or 1)
        try:
            async with unix_http.post(socket, f"/v1/{path_of(request)}", body) as answer:
                if answer.status == HTTPStatus.OK:
                    await self._read(answer, reader, reply)
                    _give(reader.end(), reply)
                    return
                error = failure_of(answer.status, await answer.body())
        except UpstreamError as ended:
            error = ended
        except (OSError, EOFError):
            raise OverloadedError(ENDED) from None
        if DEAD in error.message:
            raise OverloadedError(ENDED)
        raise error

    async def _read(self, answer: unix_http.UnixAnswer, reader: ChunkReader, reply: Reply[TextChunk]) -> None:
        events = EventReader()
        async for part in answer.parts():
            self._progress = time.monotonic()
            for data in events.read(part):
                if data == DONE:
                    return
                _give(reader.read(parse(data)), reply)

    def _counters(self) -> Counters:
        """What `/metrics` says; at most a second old."""
        read, last = self._seen
        socket = self._server.socket
        if socket is None:
            return Counters(EngineLoad(len(self._answers)), last.tokens)
        if time.monotonic() - read < LOAD_S:
            return last
        try:
            now = counters(unix_http.ask(socket, "/metrics")[1].decode("utf-8", "replace"))
        except (OSError, ValueError):
            now = Counters(EngineLoad(len(self._answers)), last.tokens)
        if now.tokens != last.tokens:
            self._progress = time.monotonic()
        self._seen = (time.monotonic(), now)
        return now


def counters(page: str) -> Counters:
    """What a page of vLLM's metrics says. Raises ValueError."""
    found: dict[str, float] = {}
    for line in page.splitlines():
        if line.startswith("vllm:"):
            name, _, value = line.replace("{", " ", 1).partition(" ")
            found[name] = found.get(name, 0.0) + float(value.rpartition(" ")[2])
    running, waiting = found.get("vllm:num_requests_running", 0), found.get("vllm:num_requests_waiting", 0)
    load = EngineLoad(int(running), int(waiting), found.get("vllm:kv_cache_usage_perc"))
    return Counters(load, found.get("vllm:iteration_tokens_total_sum", 0.0))


def _give(chunks: list[TextChunk], reply: Reply[TextChunk]) -> None:
    for chunk in chunks:
        reply.chunk(chunk)


def _context(socket: Path) -> int:
    try:
        _, answer = unix_http.ask(socket, "/v1/models")
        return int(parse(answer)["data"][0]["max_model_len"])
    except (OSError, InputError, LookupError, TypeError) as error:
        raise ValueError(f"vllm does not say how long its model's context is ({error})") from None
