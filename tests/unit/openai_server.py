"""A small server that answers as OpenAI's API does, with the faults that a prompt asks for."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.engines.written import until

KEY = "sk-secret-of-the-tests"
WORDS = ["Paris", " is", " the", " capital", "."]
USAGE = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12, "prompt_tokens_details": {"cached_tokens": 3}}


class OpenAiServer:
    """Runs in a thread of its own, on a free port. What a prompt says is what happens: see `_answer`."""

    def __init__(self) -> None:
        self.fault: str | None = None
        """What happens to every request, whatever its prompt says; none where it is empty."""
        self.words = WORDS
        """What it answers."""
        self.bodies: list[dict[str, Any]] = []
        """The requests that came."""
        self.headers: list[dict[str, str]] = []
        self.times: Counter[str] = Counter()
        """How often each prompt came."""
        self.open = 0
        """Streams that their client has not left."""
        self.most_open = 0
        routes = [Route(f"/v1/{path}", self._answer, methods=["POST"]) for path in ("chat/completions", "completions")]
        config = uvicorn.Config(Starlette(routes=routes), port=0, log_level="critical", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self) -> OpenAiServer:
        self._thread.start()
        until(lambda: self._server.started)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(10)

    @property
    def url(self) -> str:
        port = self._server.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}/v1"

    async def _answer(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers) | {"x-port": str(request.client and request.client.port)})
        prompt = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        prompt = prompt if self.fault is None else self.fault
        self.times[prompt] += 1
        refused = self._refuse(request, prompt)
        if refused is not None:
            return refused
        if prompt == "whole":
            message = {"role": "assistant", "content": "".join(self.words)}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            return JSONResponse({"model": "capital-2", "choices": [choice], "usage": USAGE})
        if prompt == "no answer":
            await asyncio.sleep(60)
        return StreamingResponse(self._events(prompt, chat="messages" in body), media_type="text/event-stream")

    def _refuse(self, request: Request, prompt: str) -> Response | None:
        first, sent = self.times[prompt] == 1, request.headers.get("authorization")
        wrong = prompt == "needs a key" and sent != f"Bearer {KEY}"
        faults: list[tuple[bool, Response]] = [
            (wrong, _error(401, f"Incorrect API key provided: {sent}")),
            (prompt == "repeats the key", _error(400, f"You sent {sent}")),
            (prompt == "busy once" and first, _error(429, "Slow down.", {"retry-after": "0.2"})),
            (prompt == "busy for long", _error(429, "Slow down.", {"retry-after": "3600"})),
            (prompt == "broken once" and first, _error(500, "Sorry.")),
            (prompt == "always broken", _error(500, "Sorry.")),
            (prompt == "too long", _error(400, "This model's maximum context length is 8192 tokens.")),
            (prompt == "moved", RedirectResponse("http://127.0.0.1:9/elsewhere", 307)),
        ]
        return next((response for holds, response in faults if holds), None)

    async def _events(self, prompt: str, *, chat: bool) -> AsyncIterator[str]:
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            if chat:
                yield _event({"delta": {"role": "assistant", "content": ""}})
            for place, word in enumerate(self.words):
                if place == 2 and prompt == "stops in the middle":
                    return
                if place == 2 and prompt == "silent in the middle":
                    await asyncio.sleep(60)
                if place == 2 and prompt == "breaks in the middle":
                    raise ConnectionResetError
                if place == 2 and prompt == "only comments":
                    for _ in range(600):
                        yield ": ping\n\n"
                        await asyncio.sleep(0.05)
                if place == 2 and prompt == "an error in the middle":
                    yield f"data: {json.dumps({'error': {'message': 'Out of memory.', 'code': 500}})}\n\n"
                    return
                yield _event({"delta": {"content": word}} if chat else {"text": word})
            while prompt == "without end":
                yield _event({"delta": {"content": "!"}})
                await asyncio.sleep(0.01)
            yield _event({"delta": {}, "finish_reason": "stop"} if chat else {"text": "", "finish_reason": "stop"})
            yield f"data: {json.dumps({'model': 'capital-2', 'choices': [], 'usage': USAGE})}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            self.open -= 1


def _event(choice: dict[str, Any]) -> str:
    return f"data: {json.dumps({'model': 'capital-2', 'choices': [{'index': 0, **choice}]})}\n\n"


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": {"message": message, "type": "x"}}, status, headers)
