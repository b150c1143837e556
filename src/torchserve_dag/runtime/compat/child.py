"""The program of an unedited handler's process: it loads the handler, and answers batches until its worker ends.

The handler has what TorchServe gives it: the main thread, its archive's files as the working directory and first on the
path, and nothing of the worker's. So this file and what it imports are quick to import, and know no torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import inspect
import io
import json
import logging
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from http import HTTPStatus
from pathlib import Path
from types import ModuleType
from typing import Any

from torchserve_dag.runtime import logs
from torchserve_dag.runtime.compat.context import Context
from torchserve_dag.runtime.compat.link import ANSWER, CHUNK, FAILED, FAULT, LOADED, receive, send
from torchserve_dag.runtime.compat.wire import WireRequest, WireResponse, read_requests, write_responses

logger = logging.getLogger(__name__)

Handle = Callable[[Any, Any], Any]

_STATUSES = range(HTTPStatus.BAD_REQUEST, 600)
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve the worker's socket, whose descriptor is this program's argument, until the worker closes it."""
    _end_with_worker()
    with socket.socket(fileno=int(sys.argv.pop())) as link, contextlib.suppress(ConnectionError):
        _serve(link)


def _serve(link: socket.socket) -> None:
    logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.INFO)  # as TorchServe's worker does
    logging.getLogger().handlers[0].setFormatter(logs.Formatter())
    message = receive(link)
    if message is None:
        return
    settings = json.loads(message[1])
    folder = Path(settings["folder"])
    _live_in(folder)
    if "functions" in settings:
        send(link, LOADED, json.dumps(checked(settings["module"], settings["functions"])).encode())
        return
    context = Context(settings["name"], folder, settings["gpu"], settings["batch"])
    try:
        handle = load(settings["handler"], folder, context)
    except BaseException as error:
        logger.exception("%s cannot be loaded", settings["name"])
        why = str(error) if type(error) is RuntimeError else f"loading it raised {type(error).__name__}: {error}"
        send(link, FAILED, why.encode("utf-8", "replace"))
        sys.exit(1)
    context.cl_socket = _Chunks(link)
    send(link, LOADED)
    while (message := receive(link)) is not None:
        requests, _ = read_requests(message[1])
        send(link, ANSWER, answer(settings["name"], handle, context, requests))


def _end_with_worker() -> None:
    """End with the thread that started this process, however its process ends."""
    with contextlib.suppress(AttributeError, OSError):  # only Linux has it; elsewhere the closed socket ends the loop
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _live_in(folder: Path) -> None:
    """Make `folder` the working directory and the first of the path, as TorchServe does."""
    os.chdir(folder)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    # What comes before is for finding this program. The worker's own archive is not for the handler.
    sys.path[:] = sys.path[sys.path.index(str(folder)) :]
    os.environ["PYTHONPATH"] = os.environ["PYTHONPATH"].partition(os.pathsep)[2]
    for name in list(sys.modules):  # an archive of ours as a node has a copy of its own
        if name.partition(".")[0] == "torchserve_dag":
            del sys.modules[name]


class _Chunks:
    """What TorchServe's `send_intermediate_predict_response` takes for the socket of TorchServe."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link

    def sendall(self, message: bytes) -> None:
        send(self._link, CHUNK, bytes(message))


# Loading, by the rules of TorchServe's ts/model_loader.py.


def load(handler: str, folder: Path, context: Context) -> Handle:
    """The function that TorchServe calls for each batch, of a loaded handler. Raises whatever loading raises.

    `handler`: what a manifest names, a module with a function `handle`, or with one class that has `initialize` and
    `handle`, its own or one of TorchServe's; `MODULE:FUNCTION` for another function.
    """
    file, _, function = handler.partition(":")
    module = _module(folder, file)
    function = function or "handle"
    owner: Any = None
    if hasattr(module, function):
        handle: Handle = getattr(module, function)
    else:
        kind = entry_class(module)
        if kind is None:
            raise RuntimeError(f"{module.__name__}.py has neither a function {function} nor exactly one class")
        owner = kind()
        handle = owner.handle
    if inspect.iscoroutinefunction(handle):
        raise RuntimeError(f"{function} is a coroutine, and TorchServe's workflows cannot run one")
    if owner is None:
        handle(None, context)
    else:
        owner.initialize(context)
    return handle


def _module(folder: Path, file: str) -> ModuleType:
    """The module that a manifest names: the archive's own, or one of TorchServe's handlers."""
    name = file.removesuffix(".py").rpartition("/")[2]
    if (folder / f"{name}.py").is_file():
        return importlib.import_module(name)
    try:
        return importlib.import_module(f"ts.torch_handler.{name}")
    except ModuleNotFoundError as error:
        if error.name == f"ts.torch_handler.{name}":
            raise RuntimeError(f"it holds no {name}.py, and TorchServe has no handler of that name") from None
        raise RuntimeError(f"its handler is TorchServe's {name}, which cannot be imported here: {error}") from error


def entry_class(module: ModuleType) -> type | None:
    """The class that TorchServe uses where a module has no function of the handler's name: the module's only class."""
    members = vars(module).values()
    classes = [member for member in members if inspect.isclass(member) and member.__module__ == module.__name__]
    return classes[0] if len(classes) == 1 else None


def checked(name: str, functions: list[str]) -> dict[str, Any]:
    """What is wrong with a workflow's Python file: why it cannot be imported, or which functions it lacks."""
    try:
        module = importlib.import_module(name)
    except SyntaxError as error:
        return {"what": f"not valid Python: {error.msg}", "line": error.lineno}
    except BaseException as error:  # noqa: BLE001 (whatever a file raises when it is imported)
        file = str(Path.cwd() / f"{name}.py")
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        what = f"importing it raised {type(error).__name__}: {error}"
        alone = isinstance(error, ModuleNotFoundError)
        return {"what": what, "line": lines[-1] if lines else None, "needs_a_file": alone}
    return {"missing": [function for function in functions if not _can_run(module, function)]}


def _can_run(module: ModuleType, name: str) -> bool:
    """Whether TorchServe finds something to call: a function of that name, or else the file's only class."""
    if hasattr(module, name):
        function = getattr(module, name)
        return callable(function) and not inspect.isclass(function)
    kind = entry_class(module)
    return hasattr(kind, "handle") and hasattr(kind, "initialize")


# Answering, by the rules of TorchServe's ts/service.py and ts/protocol/otf_message_handler.py.


def answer(name: str, handle: Handle, context: Context, requests: list[WireRequest]) -> bytes:
    """The message with the answers of a batch; if the whole batch failed, with that failure's status and sentence."""
    context.begin(requests)
    try:
        answers = handle([_row(request) for request in requests], context)
    except BaseException as error:  # noqa: BLE001 (also SystemExit: it is the batch that failed)
        status, what = _failure(name, error)
        fault = logs.report(logger, error, f"{name} raised", line=False)
        return write_responses([], status, f"{what}{FAULT}{fault}")
    if not isinstance(answers, list) or len(answers) != len(requests):
        what = f"{name} must answer with a list as long as its batch, {len(requests)}."
        return write_responses([], HTTPStatus.INTERNAL_SERVER_ERROR, what)
    return write_responses([_response(name, context, i, request.id, answers[i]) for i, request in enumerate(requests)])


def _row(request: WireRequest) -> dict[str, Any]:
    return {key: decoded(value, request.headers.get(key)) for key, value in request.row.items()}


def decoded(value: bytes, about: Any) -> Any:
    """A part of a request as TorchServe decodes it by its content type; as it is where it cannot be decoded."""
    media = about.get("content-type", "") if isinstance(about, Mapping) else ""
    with contextlib.suppress(ValueError):
        if media == "application/json":
            return json.loads(value.decode("utf-8"))
        if media.startswith("text"):
            return value.decode("utf-8")
    return bytearray(value)


def as_bytes(answer: Any) -> bytes:
    """An answer as TorchServe sends it: tensors saved, text encoded, the rest as JSON."""
    if isinstance(answer, bytes | bytearray):
        return bytes(answer)
    if isinstance(answer, str):
        return answer.encode()
    torch = sys.modules.get("torch")  # where it is not imported, there are no tensors
    if torch and isinstance(answer, torch.Tensor):
        buffer = io.BytesIO()
        torch.save(answer, buffer)
        return buffer.getvalue()
    return json.dumps(answer, indent=2).encode()


def _response(name: str, context: Context, index: int, wire_id: str, answer: Any) -> WireResponse:
    try:
        status = context.get_response_status(index)[0]
        return WireResponse(wire_id, int(status), body=as_bytes(answer))
    except Exception as error:  # noqa: BLE001 (a handler's object may raise anything)
        logs.report(logger, error, f"{name} gave an answer that cannot be written")
        what = f"{name} gave an answer that cannot be written: {type(answer).__name__}."
        return WireResponse(wire_id, HTTPStatus.INTERNAL_SERVER_ERROR, body=what.encode())


def _failure(name: str, error: BaseException) -> tuple[int, str]:
    util = sys.modules.get("ts.utils.util")  # if it is not imported, none of its exceptions was raised
    if util and isinstance(error, util.PredictionException) and error.error_code in _STATUSES:
        return int(error.error_code), str(error.message)
    if isinstance(error, MemoryError) or "CUDA" in str(error):  # TorchServe's own rule
        return HTTPStatus.INSUFFICIENT_STORAGE, f"{name} ran out of memory."
    return HTTPStatus.INTERNAL_SERVER_ERROR, f"{name} failed."


if __name__ == "__main__":
    main()
