"""The HTTP side of the direct host's management API, REST and gRPC; its health; the page of its metrics.

The keeper answers on a Unix socket: our own commands ask there, and Envoy passes on what comes to the management ports.
Every management call needs the management key of `key_file.json`.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import os
import threading
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from google.protobuf.message import DecodeError, Message
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route

from torchserve_dag.archives.archive import ModelVersion
from torchserve_dag.clients import KeyFile
from torchserve_dag.direct import grpc
from torchserve_dag.direct import http as direct_http
from torchserve_dag.direct.app import DirectApp
from torchserve_dag.direct.open_inference import grpc as open_inference
from torchserve_dag.front_door.envoy_config import FROM_PORT, HEALTH_CHECK
from torchserve_dag.runtime.protos import inference_pb2, management_pb2
from torchserve_dag.runtime.worker.protocol import ServiceResponse
from torchserve_dag.server.connect import MANAGEMENT
from torchserve_dag.server.properties import read as read_properties
from torchserve_dag.server.state import State
from torchserve_dag.stack.management import PAGE, CallError, Management

logger = logging.getLogger(__name__)

SERVICE = "/org.pytorch.serve.grpc.management.ManagementAPIsService/"
PING = f"{grpc.SERVICE}Ping"
SERVING, NOT_SERVING = b"\x08\x01", b"\x08\x02"
"""The two HealthCheckResponses of grpc.health.v1: its field 1 is the status."""
MAX_BODY = 2**30
"""In bytes, of a call that no model answers: Envoy has read it, up to its own limit."""


class ManagementApp:
    """Routes management calls, with Starlette; `app` is an ASGI application."""

    def __init__(self, state: State, management: Management, metrics_page: Callable[[], str]) -> None:
        self._state, self._does, self._metrics_page = state, management, metrics_page
        self._routing: set[asyncio.Task[None]] = set()
        name, version = "/models/{name}", "/models/{name}/{version}"
        nobody = DirectApp(lambda _name, _version: None, MAX_BODY, management.why_unhealthy)
        self.app = Starlette(
            routes=[
                Route("/ping", self._ping),
                Route("/metrics", self._metrics),
                Route("/models", self._list, methods=["GET"]),
                Route("/models", self._register, methods=["POST"]),
                *(Route(path, self._describe, methods=["GET"]) for path in (name, version)),
                *(Route(path, self._scale, methods=["PUT"]) for path in (name, version)),
                *(Route(path, self._unregister, methods=["DELETE"]) for path in (name, version)),
                Route(version + "/set-default", self._set_default, methods=["PUT"]),
                *(Route(path + "/restart", self._restart, methods=["POST"]) for path in (name, version)),
                Route(PING, self._grpc_ping, methods=["POST"]),
                Route(HEALTH_CHECK, self._grpc_health, methods=["POST"]),
                Route(SERVICE + "{call}", self._grpc, methods=["POST"]),
                # What the Open Inference Protocol asks of a server, and of models that it does not have.
                Route("/v2", nobody),
                *(Mount(path, nobody) for path in ("/v2", open_inference.SERVICE.rstrip("/"))),
            ],
            exception_handlers={CallError: _failed, HTTPException: _not_found, Exception: _broken},
        )

    def _check_model_api(self, request: Request) -> None:
        """Whether a call may register or unregister: at the ports, only if `enable_model_api` says so."""
        if FROM_PORT in request.headers:
            enabled = read_properties(self._state.config).get("enable_model_api", "false").lower() == "true"
            if not enabled:
                message = "enable_model_api of config.properties is false: use torchserve-dag serve, or retire."
                raise CallError(HTTPStatus.METHOD_NOT_ALLOWED, "MethodNotAllowedException", message)

    def _check_key(self, request: Request) -> None:
        try:
            key = KeyFile.read(self._state.key_file).management
        except (OSError, ValueError):
            key = ""
        given = request.headers.get("authorization", "")
        if not key or not hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
            message = "Token Authorization failed. Token either incorrect, expired, or not provided correctly"
            raise CallError(HTTPStatus.BAD_REQUEST, "InvalidKeyException", message)

    async def _ping(self, _: Request) -> Response:
        why = await asyncio.to_thread(self._does.why_unhealthy)
        return JSONResponse({"status": "Unhealthy", "why": why} if why else {"status": "Healthy"}, 503 if why else 200)

    async def _metrics(self, _: Request) -> Response:
        return PlainTextResponse(await asyncio.to_thread(self._metrics_page), media_type="text/plain; version=0.0.4")

    async def _list(self, request: Request) -> Response:
        self._check_key(request)
        limit, page = _number(request, "limit", PAGE), _number(request, "next_page_token", 0)
        return JSONResponse(await asyncio.to_thread(self._does.listed, limit or PAGE, page or 0))

    async def _describe(self, request: Request) -> Response:
        self._check_key(request)
        name, version = request.path_params["name"], request.path_params.get("version")
        customized = request.query_params.get("customized", "").lower() == "true"
        return JSONResponse(await asyncio.to_thread(lambda: self._does.described(name, version, customized=customized)))

    async def _register(self, request: Request) -> Response:
        self._check_key(request)
        self._check_model_api(request)
        workers = _number(request, "initial_workers", None)
        file = request.query_params.get("url", "")
        if FROM_PORT in request.headers:
            key, said = await self._register_from_store(file, workers)
        else:
            key, said = await asyncio.to_thread(self._does.register, file, workers)
        return await self._done(request, key, said)

    async def _register_from_store(self, file: str, workers: int | None) -> tuple[ModelVersion, str]:
        copied = await asyncio.to_thread(self._does.take, file)
        key, said = await asyncio.to_thread(self._does.register, copied, workers)
        task = asyncio.create_task(self._does.route_when_ready(key))
        self._routing.add(task)
        task.add_done_callback(self._routing.discard)
        return key, said

    async def _scale(self, request: Request) -> Response:
        self._check_key(request)
        name, version = request.path_params["name"], request.path_params.get("version")
        workers = _number(request, "min_worker", 1)
        key = await asyncio.to_thread(self._does.scale, name, version, 1 if workers is None else workers)
        return await self._done(request, key, "Processing worker updates...")

    async def _done(self, request: Request, key: ModelVersion, said: str) -> Response:
        """The answer to a call that changes workers: at once, or when they are as they are to be."""
        if request.query_params.get("synchronous", "").lower() != "true":
            return JSONResponse({"status": said}, HTTPStatus.ACCEPTED)
        await self._does.settled(key)
        return JSONResponse({"status": said})

    async def _unregister(self, request: Request) -> Response:
        self._check_key(request)
        self._check_model_api(request)
        name, version = request.path_params["name"], request.path_params.get("version")
        return JSONResponse({"status": await asyncio.to_thread(self._does.unregister, name, version)})

    async def _set_default(self, request: Request) -> Response:
        self._check_key(request)
        name, version = request.path_params["name"], request.path_params["version"]
        return JSONResponse({"status": await asyncio.to_thread(self._does.set_default, name, version)})

    async def _restart(self, request: Request) -> Response:
        self._check_key(request)
        name, version = request.path_params["name"], request.path_params.get("version")
        return JSONResponse({"status": await asyncio.to_thread(self._does.restart, name, version)}, HTTPStatus.ACCEPTED)

    # gRPC, as Envoy's bridge passes it on: see direct/grpc.py.

    async def _grpc_ping(self, _: Request) -> Response:
        why = await asyncio.to_thread(self._does.why_unhealthy)
        health = json.dumps({"status": "Unhealthy", "why": why} if why else {"status": "Healthy"})
        return _message(inference_pb2.TorchServeHealthResponse(health=health))

    async def _grpc_health(self, _: Request) -> Response:
        why = await asyncio.to_thread(self._does.why_unhealthy)
        return _grpc_response(NOT_SERVING if why else SERVING)

    async def _grpc(self, request: Request) -> Response:
        try:
            self._check_key(request)
            if request.path_params["call"] in {"RegisterModel", "UnregisterModel"}:
                self._check_model_api(request)
            said = await self._call(request.path_params["call"], grpc.message_in(await request.body()))
        except CallError as error:
            return _grpc_failure(error.status, error.kind, str(error))
        except (grpc.NotGrpcError, DecodeError) as error:
            return _grpc_failure(HTTPStatus.BAD_REQUEST, "BadRequestException", str(error))
        return _message(management_pb2.ManagementResponse(msg=said if isinstance(said, str) else json.dumps(said)))

    async def _call(self, call: str, message: bytes) -> Any:
        does = self._does
        match call:
            case "ListModels":
                listing = management_pb2.ListModelsRequest.FromString(message)
                return await asyncio.to_thread(does.listed, listing.limit or PAGE, listing.next_page_token)
            case "DescribeModel":
                asked = management_pb2.DescribeModelRequest.FromString(message)
                return await asyncio.to_thread(
                    lambda: does.described(asked.model_name, asked.model_version or None, customized=asked.customized)
                )
            case "RegisterModel":
                new = management_pb2.RegisterModelRequest.FromString(message)
                key, said = await self._register_from_store(new.url, new.initial_workers or None)
                if new.synchronous:
                    await does.settled(key)
                return said
            case "ScaleWorker":
                scaled = management_pb2.ScaleWorkerRequest.FromString(message)
                name, version = scaled.model_name, scaled.model_version or None
                key = await asyncio.to_thread(does.scale, name, version, scaled.min_worker or 1)
                if scaled.synchronous:
                    await does.settled(key)
                return "Processing worker updates..."
            case "SetDefault":
                chosen = management_pb2.SetDefaultRequest.FromString(message)
                return await asyncio.to_thread(does.set_default, chosen.model_name, chosen.model_version)
            case "UnregisterModel":
                gone = management_pb2.UnregisterModelRequest.FromString(message)
                return await asyncio.to_thread(does.unregister, gone.model_name, gone.model_version or None)
        raise CallError(HTTPStatus.NOT_IMPLEMENTED, "Unimplemented", f"There is no call {call[:100]} here.")


def serve(state: State, management: Management, metrics_page: Callable[[], str]) -> None:
    """Serve the management API on its socket, in a thread of this process."""
    path = state.direct / MANAGEMENT
    state.direct.mkdir(mode=0o700, parents=True, exist_ok=True)
    app = ManagementApp(state, management, metrics_page).app

    def run() -> None:
        try:
            direct_http.run(
                direct_http.serve(app, direct_http.listen_at(path), drains_on=(), idle_s=direct_http.BEHIND_ENVOY_S)
            )
        except Exception:
            logger.exception("the management API has ended, and with it this keeper: the watcher starts another")
            os._exit(1)

    threading.Thread(target=run, name="management", daemon=True).start()


def _number(request: Request, name: str, default: int | None) -> int | None:
    text = request.query_params.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit()):
        raise CallError(HTTPStatus.BAD_REQUEST, "BadRequestException", f'{name} is "{text[:40]}": give a whole number.')
    return int(text)


def _failure(status: int, kind: str, message: str) -> dict[str, Any]:
    return {"code": status, "type": kind, "message": message}


async def _failed(_: Request, error: Exception) -> Response:
    if not isinstance(error, CallError):
        raise error
    return JSONResponse(_failure(error.status, error.kind, str(error)), error.status)


async def _not_found(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else HTTPStatus.NOT_FOUND
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        message = f"{request.method} has no meaning here."
        return JSONResponse(_failure(status, "MethodNotAllowedException", message), status)
    message = "Requested resource is not found, please refer to API document."
    return JSONResponse(_failure(HTTPStatus.NOT_FOUND, "ResourceNotFoundException", message), HTTPStatus.NOT_FOUND)


async def _broken(_: Request, error: Exception) -> Response:
    logger.error("a management call failed", exc_info=error)
    message = f"The keeper failed ({type(error).__name__}): keeper.log says why."
    status = HTTPStatus.INTERNAL_SERVER_ERROR
    return JSONResponse(_failure(status, "InternalServerException", message), status)


def _message(message: Message) -> Response:
    return _grpc_response(message.SerializeToString())


def _grpc_response(message: bytes) -> Response:
    return Response(grpc.framed(message), media_type=grpc.CONTENT_TYPE)


def _grpc_failure(status: int, kind: str, message: str) -> Response:
    response = ServiceResponse(json.dumps(_failure(status, kind, message)).encode(), status=status)
    return Response(b"", status, grpc.failure_headers(response), grpc.CONTENT_TYPE)
