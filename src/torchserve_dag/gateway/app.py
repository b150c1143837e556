"""OpenAI's API as an ASGI application: the paths below `/v1`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from torchserve_dag.direct.leaving import while_client_stays
from torchserve_dag.front_door.backend import MODELS
from torchserve_dag.front_door.tokens import Token, TokenStore
from torchserve_dag.gateway import chat, completions, embeddings, estimate, fields, moderations, responses
from torchserve_dag.gateway.answering import TextResponse
from torchserve_dag.gateway.call import ModelsSocket
from torchserve_dag.gateway.calls import ModelCalls
from torchserve_dag.gateway.errors import ApiError
from torchserve_dag.gateway.form import Form
from torchserve_dag.gateway.limits import Spending
from torchserve_dag.gateway.models import Kind, Models
from torchserve_dag.gateway.process import Gateway
from torchserve_dag.gateway.text_calls import AnswerT, ask_each
from torchserve_dag.runtime.data.options import TOKEN
from torchserve_dag.runtime.messages import Chat, Embedding, Moderation, Prompt, Text, Usage
from torchserve_dag.server.state import State

logger = logging.getLogger(__name__)

USED = "used_tokens.sqlite3"
_EMBEDDING: Kind = "embedding"
_MODERATION: Kind = "moderation"


class GatewayApp:
    """Answers what Envoy passes on; `app` is an ASGI application."""

    def __init__(self, state: State) -> None:
        folder = Gateway(state).socket.parent
        self._models, self._spending = Models(state), Spending(folder / USED)
        self._tokens = TokenStore(state.front_door)
        self._socket = ModelsSocket(state.front_door / MODELS)
        self.app = Starlette(
            routes=[
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/completions", self._complete, methods=["POST"]),
                Route("/v1/responses", self._respond, methods=["POST"]),
                Route("/v1/embeddings", self._embed, methods=["POST"]),
                Route("/v1/moderations", self._moderate, methods=["POST"]),
                Route("/v1/models", self._list, methods=["GET"]),
                Route("/v1/models/{model:path}", self._describe, methods=["GET"]),
            ],
            exception_handlers={ApiError: _failed, HTTPException: _not_found, Exception: _broken},
        )

    async def _chat(self, request: Request) -> Response:
        data = await _fields(request)
        model, stream = fields.model_in(data), fields.take(data, "stream", bool, default=False)
        form = chat.ChatForm(include_usage=fields.include_usage(data, stream=stream))
        return self._text(request, model, "chat", [chat.read(data)], form, stream=stream)

    async def _complete(self, request: Request) -> Response:
        data = await _fields(request)
        model, stream = fields.model_in(data), fields.take(data, "stream", bool, default=False)
        form = completions.CompletionForm(include_usage=fields.include_usage(data, stream=stream))
        return self._text(request, model, "completion", completions.read(data), form, stream=stream)

    async def _respond(self, request: Request) -> Response:
        data = await _fields(request)
        model, stream = fields.model_in(data), fields.take(data, "stream", bool, default=False)
        fields.take(data, "stream_options", dict, {})
        form = responses.ResponseForm(dict(data))
        return self._text(request, model, "chat", [responses.read(data)], form, stream=stream)

    def _text(
        self,
        request: Request,
        model: str,
        kind: Kind,
        messages: Sequence[Chat | Prompt],
        form: Form,
        *,
        stream: bool,
    ) -> Response:
        token = self._token(request)
        calls = self._calls(request, model, kind, token)
        tokens = sum(estimate.prompt_tokens(one) + estimate.answer_tokens(one) for one in messages)
        return TextResponse(calls, messages, form, self._spending.reserve(token, tokens), stream=stream)

    async def _embed(self, request: Request) -> Response:
        data = await _fields(request)
        model = fields.model_in(data)
        asked = embeddings.read(data)
        token = self._token(request)
        calls = self._calls(request, model, _EMBEDDING, token)
        vectors, usage, limits = await self._ask_each(request, calls, token, Embedding, asked.input)
        whole = embeddings.whole(calls.answered_by, vectors, usage, asked.encoding_format)
        return JSONResponse(whole, headers=limits)

    async def _moderate(self, request: Request) -> Response:
        data = await _fields(request)
        token = self._token(request)
        model = fields.model_in(data) if "model" in data else self._models.only(_MODERATION, token)
        texts = moderations.read(data)
        calls = self._calls(request, model, _MODERATION, token)
        verdicts, _, limits = await self._ask_each(request, calls, token, Moderation, texts)
        return JSONResponse(moderations.whole(calls.request_id, calls.answered_by, verdicts), headers=limits)

    async def _ask_each(
        self, request: Request, calls: ModelCalls, token: Token | None, kind: type[AnswerT], texts: Sequence[Text]
    ) -> tuple[list[AnswerT], Usage, Mapping[str, str]]:
        """The texts' answers, what they have cost, and the headers that say what is left. Raises ApiError."""
        reservation = self._spending.reserve(token, sum(map(estimate.prompt_tokens, texts)))
        tokens = 0
        try:
            found = await while_client_stays(request.receive, ask_each(calls, kind, texts))
            if found is None:
                raise ClientDisconnect
            answers, usage, tokens = found
        finally:
            if reservation:
                reservation.settle(tokens)
        return answers, usage, reservation.headers() if reservation else {}

    async def _list(self, request: Request) -> Response:
        token = self._token(request)
        models = [self._models.described(name, token) for name in self._models.names(token)]
        return JSONResponse({"object": "list", "data": models})

    async def _describe(self, request: Request) -> Response:
        return JSONResponse(self._models.described(request.path_params["model"], self._token(request)))

    def _token(self, request: Request) -> Token | None:
        """The token of a request; None at the host's own ports, which need none. Raises ApiError."""
        name = request.headers.get(TOKEN)
        if name is None:
            return None
        token = self._tokens.find(name)
        if token is None:  # it was revoked a moment ago
            raise ApiError(HTTPStatus.FORBIDDEN, "This token was revoked: ask for another.")
        return token

    def _calls(self, request: Request, model: str, kind: Kind, token: Token | None) -> ModelCalls:
        """Raises ApiError."""
        found = self._models.find(model, kind, token)
        return ModelCalls(self._socket, found, request.headers, cancels=not self._models.sees_clients_leave)


async def _fields(request: Request) -> dict[str, Any]:
    if (encoding := request.headers.get("content-encoding", "identity")) != "identity":
        message = f"The content encoding {encoding[:40]} is not read here: send plain JSON."
        raise ApiError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, message)
    return fields.read_json(await request.body())


async def _failed(_: Request, error: Exception) -> Response:
    if not isinstance(error, ApiError):
        raise error
    return JSONResponse(error.fields(), error.status, error.headers)


async def _not_found(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else HTTPStatus.NOT_FOUND
    known = "chat/completions, completions, responses, embeddings, moderations and models"
    message = f"{request.method} {request.url.path[:100]} is not here; below /v1 there are {known}."
    return JSONResponse(ApiError(status, message, code="unknown_url").fields(), status)


async def _broken(_: Request, error: Exception) -> Response:
    logger.error("a request failed", exc_info=error)
    failure = ApiError(
        HTTPStatus.INTERNAL_SERVER_ERROR, f"The gateway failed ({type(error).__name__}): its log says why."
    )
    return JSONResponse(failure.fields(), failure.status)
