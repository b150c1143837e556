"""The direct host's management API, as TorchServe has it, REST and gRPC; its health; the page of its metrics.

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
import time
from collections.abc import Callable
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError, Message
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route

from torchserve_dag.archives import mar
from torchserve_dag.archives.archive import ModelVersion, UnusableArchiveError, copy, read_archive
from torchserve_dag.archives.protocol import why_not_hosted
from torchserve_dag.clients import KeyFile
from torchserve_dag.clients.models import version_key
from torchserve_dag.direct import grpc
from torchserve_dag.direct import http as direct_http
from torchserve_dag.direct.app import DirectApp
from torchserve_dag.direct.open_inference import grpc as open_inference
from torchserve_dag.front_door.door import Door, Traffic
from torchserve_dag.front_door.envoy_config import FROM_PORT, HEALTH_CHECK
from torchserve_dag.front_door.splits import ServedVersion
from torchserve_dag.runtime.protos import inference_pb2, management_pb2
from torchserve_dag.runtime.worker.protocol import ServiceResponse
from torchserve_dag.server.connect import MANAGEMENT
from torchserve_dag.server.errors import ServerError
from torchserve_dag.server.hosted import MAX_WORKERS, Hosted, HostedFile, HostedVersion, hosted_version
from torchserve_dag.server.properties import read as read_properties
from torchserve_dag.server.state import State
from torchserve_dag.stack.workers import VersionSight, Workers

logger = logging.getLogger(__name__)

SERVICE = "/org.pytorch.serve.grpc.management.ManagementAPIsService/"
PING = "/org.pytorch.serve.grpc.inference.InferenceAPIsService/Ping"
SERVING, NOT_SERVING = b"\x08\x01", b"\x08\x02"
"""The two HealthCheckResponses of grpc.health.v1: its field 1 is the status."""
PAGE = 100
IDLE_S = 86_400
MAX_BODY = 2**30
"""In bytes, of a call that no model answers: Envoy has read it, up to its own limit."""
POLL_S = 0.1


class _CallError(Exception):
    """A management call that fails, with its HTTP status and TorchServe's name for the failure."""

    def __init__(self, status: HTTPStatus, kind: str, message: str) -> None:
        super().__init__(message)
        self.status, self.kind = status, kind


class Management:
    """What the management API does. Each method raises _CallError."""

    def __init__(self, state: State, workers: Workers) -> None:
        self._state, self._workers, self._file, self._door = state, workers, HostedFile(state), Door(state)

    def listed(self, limit: int, page: int) -> dict[str, Any]:
        names = sorted({one.hosted.model for one in self._workers.sight()})
        limit = min(max(1, limit), PAGE)
        shown = names[page : page + limit]
        urls = {one.hosted.model: one.hosted.archive for one in self._workers.sight() if one.default}
        found: dict[str, Any] = {"models": [{"modelName": name, "modelUrl": urls.get(name, "")} for name in shown]}
        return {"nextPageToken": str(page + limit), **found} if page + limit < len(names) else found

    def described(self, name: str, version: str | None, *, customized: bool) -> list[dict[str, Any]]:
        """Of the default version; of one, or of `all`."""
        every = [one for one in self._workers.sight() if one.hosted.model == name]
        if not every:
            raise _CallError(HTTPStatus.NOT_FOUND, "ModelNotFoundException", f"Model not found: {name}")
        if version != "all":
            every = [one for one in every if (one.hosted.version == version if version else one.default)]
        if not every:
            message = f"Model version: {version} does not exist for model: {name}"
            raise _CallError(HTTPStatus.NOT_FOUND, "ModelVersionNotFoundException", message)
        every.sort(key=lambda one: version_key(one.hosted.version))
        return [self._description(one, customized=customized) for one in every]

    def take(self, file: str) -> str:
        """Copy an archive from the project's store; the file name of the server's copy."""
        record = self._state.record()
        path = Path(record.store if record else "") / file
        if "/" in file or not path.is_file():
            message = f"{file} is not in {path.parent}: name a file of the model store."
            raise _CallError(HTTPStatus.NOT_FOUND, "ModelNotFoundException", message)
        try:
            return copy(read_archive(path), self._state.archives).path.name
        except UnusableArchiveError as error:
            raise _CallError(HTTPStatus.BAD_REQUEST, "InvalidModelException", f"{file} {error}.") from None

    async def route_when_ready(self, key: ModelVersion) -> None:
        """Have Envoy route requests to a version that was registered at a port, once it has a worker."""
        try:
            await self.settled(key)
        except _CallError as error:
            logger.warning("%s", error)
            return
        info = next(one for one in self._workers.sight() if one.hosted.key == key).hosted
        path = self._state.archives / info.archive
        served = ServedVersion(*key, float(info.timeout_s), mar.is_ours(path), mar.is_asynchronous(path))
        default = self._file.read().defaults.get(key[0], key[1])

        def change(now: Traffic) -> Traffic:
            others = tuple(one for one in now.served if (one.model, one.version) != key)
            return replace(now, served=(*others, served), defaults={key[0]: default, **now.defaults})

        await asyncio.to_thread(self._route, change)

    def _route(self, change: Callable[[Traffic], Traffic]) -> None:
        try:
            self._door.change(change)
        except (ServerError, OSError) as error:
            raise _CallError(HTTPStatus.SERVICE_UNAVAILABLE, "ServiceUnavailableException", str(error)) from None

    def register(self, file: str, workers: int | None = None) -> tuple[ModelVersion, str]:
        """Serve one of the server's copies of archives. Returns the version, and what to say."""
        path = self._state.archives / file
        if "/" in file or not path.is_file():
            message = f"{file} is not among the server's copies of archives: use torchserve-dag serve NAME/VERSION."
            raise _CallError(HTTPStatus.NOT_FOUND, "ModelNotFoundException", message)
        try:
            archive = read_archive(path)
        except UnusableArchiveError as error:
            raise _CallError(HTTPStatus.BAD_REQUEST, "InvalidModelException", f"{file} {error}.") from None
        if why := why_not_hosted(path):
            raise _CallError(HTTPStatus.BAD_REQUEST, "InvalidModelException", why)
        one = hosted_version(archive, read_properties(self._state.config))
        if workers is not None:
            one = replace(one, workers=min(workers, MAX_WORKERS))
        if self._file.read().of(one.key):
            message = f"Model version {one.version} is already registered for model {one.model}"
            raise _CallError(HTTPStatus.CONFLICT, "ConflictStatusException", message)
        self._change(lambda now: _with(now, one))
        return one.key, f'Model "{one.model}" Version: {one.version} registered with {one.workers} initial workers'

    def unregister(self, name: str, version: str | None) -> str:
        one = self._one(name, version)
        others = [other.version for other in self._file.read().versions if other.model == name and other != one]
        if self._file.read().defaults.get(name) == one.version and others:
            message = f"Cannot remove default version for model {name}"
            raise _CallError(HTTPStatus.FORBIDDEN, "InvalidModelVersionException", message)
        self._route(lambda now: replace(now, served=tuple(v for v in now.served if (v.model, v.version) != one.key)))
        self._change(lambda now: _without(now, one))
        return f'Model "{name}" unregistered'

    def scale(self, name: str, version: str | None, workers: int) -> ModelVersion:
        one = self._one(name, version)
        if not 0 <= workers <= MAX_WORKERS:
            message = f"A version has 0 to {MAX_WORKERS} workers, not {workers}."
            raise _CallError(HTTPStatus.BAD_REQUEST, "BadRequestException", message)
        self._change(lambda now: _with(now, replace(one, workers=workers)))
        return one.key

    def set_default(self, name: str, version: str) -> str:
        self._one(name, version)
        self._change(lambda now: replace(now, defaults={**now.defaults, name: version}))
        self._route(lambda now: replace(now, defaults={**now.defaults, name: version}))
        return f'Default version successfully updated for model "{name}" to "{version}"'

    def restart(self, name: str, version: str | None) -> str:
        one = self._one(name, version)
        self._workers.restart(one.key)
        return f"{name}/{one.version}: its workers are replaced one by one"

    async def settled(self, key: ModelVersion) -> None:
        """Wait until a version has the workers that it is to have."""
        while found := next((o for o in await asyncio.to_thread(self._workers.sight) if o.hosted.key == key), None):
            ready = sum(worker.stage == "ready" for worker in found.workers)
            if found.failure:
                message = f"The workers of {'/'.join(key)} do not start: {found.failure}"
                raise _CallError(HTTPStatus.INTERNAL_SERVER_ERROR, "InternalServerException", message)
            if ready == found.hosted.workers == len(found.workers):
                return
            await asyncio.sleep(POLL_S)

    def why_unhealthy(self) -> str:
        """Which versions have no worker that is ready; empty if none."""
        missing = [
            "/".join(one.hosted.key)
            for one in self._workers.sight()
            if one.hosted.workers and not any(worker.stage == "ready" for worker in one.workers)
        ]
        return f"no worker is ready of {', '.join(missing)}" if missing else ""

    def _one(self, name: str, version: str | None) -> HostedVersion:
        hosted = self._file.read()
        if not any(one.model == name for one in hosted.versions):
            raise _CallError(HTTPStatus.NOT_FOUND, "ModelNotFoundException", f"Model not found: {name}")
        wanted = version or hosted.defaults.get(name, "")
        one = hosted.of((name, wanted))
        if one is None:
            message = f"Model version: {wanted} does not exist for model: {name}"
            raise _CallError(HTTPStatus.NOT_FOUND, "ModelVersionNotFoundException", message)
        return one

    def _change(self, change: Callable[[Hosted], Hosted]) -> None:
        try:
            self._file.change(change)
        except ServerError as error:
            raise _CallError(HTTPStatus.SERVICE_UNAVAILABLE, "ServiceUnavailableException", str(error)) from None

    def _description(self, seen: VersionSight, *, customized: bool) -> dict[str, Any]:
        one = seen.hosted
        fields = {
            "modelName": one.model,
            "modelVersion": one.version,
            "modelUrl": one.archive,
            "runtime": "python",
            "minWorkers": one.workers,
            "maxWorkers": one.workers,
            "batchSize": one.batch_size,
            "maxBatchDelay": one.max_batch_delay_ms,
            "responseTimeout": one.timeout_s,
            "startupTimeout": one.startup_s,
            "loadedAtStartup": False,
            "workers": [
                {
                    "id": worker.id,
                    "startTime": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(worker.since)),
                    "status": "READY"
                    if worker.stage == "ready"
                    else "UNLOADING"
                    if worker.stage == "leaving"
                    else "LOADING",
                    "memoryUsage": round(worker.memory_mb * 2**20),
                    "pid": worker.pid,
                    "gpu": worker.gpu is not None,
                    "gpuUsage": "N/A",
                }
                for worker in seen.workers
            ],
            "jobQueueStatus": self._queue(one),
            "failure": seen.failure,
        }
        if customized:
            fields["customizedMetadata"] = self._metadata(one)
        return fields

    def _queue(self, one: HostedVersion) -> dict[str, int]:
        inside = sum(said["inside"] for worker in self._workers.ready(one.key) if (said := worker.ask("state")))
        return {"remainingCapacity": max(0, one.queue - inside), "pendingRequests": inside}

    def _metadata(self, one: HostedVersion) -> Any:
        try:
            return mar.read_json(self._state.archives / one.archive, mar.BUILD)
        except (OSError, KeyError, ValueError, mar.BadArchiveError):
            return {}


def _with(now: Hosted, one: HostedVersion) -> Hosted:
    others = tuple(other for other in now.versions if other.key != one.key)
    defaults = now.defaults if one.model in now.defaults else {**now.defaults, one.model: one.version}
    return replace(now, versions=(*others, one), defaults=defaults)


def _without(now: Hosted, one: HostedVersion) -> Hosted:
    others = tuple(other for other in now.versions if other.key != one.key)
    defaults = {name: version for name, version in now.defaults.items() if (name, version) != one.key}
    return replace(now, versions=others, defaults=defaults)


class ManagementApp:
    """The HTTP side of the management API, an ASGI application."""

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
            exception_handlers={_CallError: _failed, HTTPException: _not_found, Exception: _broken},
        )

    def _check_model_api(self, request: Request) -> None:
        """Whether a call may register or unregister: at the ports, only if `enable_model_api` says so."""
        if FROM_PORT in request.headers:
            enabled = read_properties(self._state.config).get("enable_model_api", "false").lower() == "true"
            if not enabled:
                message = "enable_model_api of config.properties is false: use torchserve-dag serve, or retire."
                raise _CallError(HTTPStatus.METHOD_NOT_ALLOWED, "MethodNotAllowedException", message)

    def _check_key(self, request: Request) -> None:
        try:
            key = KeyFile.read(self._state.key_file).management
        except (OSError, ValueError):
            key = ""
        given = request.headers.get("authorization", "")
        if not key or not hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
            message = "Token Authorization failed. Token either incorrect, expired, or not provided correctly"
            raise _CallError(HTTPStatus.BAD_REQUEST, "InvalidKeyException", message)

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
        except _CallError as error:
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
        raise _CallError(HTTPStatus.NOT_IMPLEMENTED, "Unimplemented", f"There is no call {call[:100]} here.")


def serve(state: State, management: Management, metrics_page: Callable[[], str]) -> None:
    """Serve the management API on its socket, in a thread of this process."""
    path = state.direct / MANAGEMENT
    state.direct.mkdir(mode=0o700, parents=True, exist_ok=True)
    app = ManagementApp(state, management, metrics_page).app

    def run() -> None:
        try:
            # Envoy closes idle connections first, and so never sends a call over one that is just being closed.
            direct_http.run(direct_http.serve(app, direct_http.listen_at(path), drains_on=(), idle_s=IDLE_S))
        except Exception:
            logger.exception("the management API has ended, and with it this keeper: the watcher starts another")
            os._exit(1)

    threading.Thread(target=run, name="management", daemon=True).start()


def _number(request: Request, name: str, default: int | None) -> int | None:
    text = request.query_params.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit()):
        raise _CallError(
            HTTPStatus.BAD_REQUEST, "BadRequestException", f'{name} is "{text[:40]}": give a whole number.'
        )
    return int(text)


def _failure(status: int, kind: str, message: str) -> dict[str, Any]:
    return {"code": status, "type": kind, "message": message}


async def _failed(_: Request, error: Exception) -> Response:
    if not isinstance(error, _CallError):
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
