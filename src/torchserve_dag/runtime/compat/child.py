"""The program of an unedited handler's process: it loads the handler, and answers batches until its worker ends.

The handler has what TorchServe gives it: the main thread, its archive's files as the working directory and first on the
path, and nothing of the worker's. So this file and what it imports are quick to import, and know no torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import inspect
import json
import logging
import os
import signal
import socket
import sys
import traceback
from http import HTTPStatus
from pathlib import Path
from types import ModuleType
from typing import Any

from torchserve_dag.runtime import logs
from torchserve_dag.runtime.compat.context import Context
from torchserve_dag.runtime.compat.entry_point import (
    Handle,
    as_bytes,
    decoded_row,
    entry_class,
    failure_in_prediction,
    is_out_of_memory,
    load,
)
from torchserve_dag.runtime.compat.link import ANSWER, CHUNK, FAILED, FAULT, LOADED, receive, send
from torchserve_dag.runtime.compat.wire import WireRequest, WireResponse, read_requests, write_responses

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve the worker's socket, whose descriptor is this program's argument, until the worker closes it."""
    end_with_worker()
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


def end_with_worker() -> None:
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


def answer(name: str, handle: Handle, context: Context, requests: list[WireRequest]) -> bytes:
    """The message with the answers of a batch; if the whole batch failed, with that failure's status and sentence."""
    context.begin(requests)
    try:
        answers = handle([decoded_row(request) for request in requests], context)
    except BaseException as error:  # noqa: BLE001 (also SystemExit: it is the batch that failed)
        status, what = _failure(name, error)
        fault = logs.report(logger, error, f"{name} raised", line=False)
        return write_responses([], status, f"{what}{FAULT}{fault}")
    if not isinstance(answers, list) or len(answers) != len(requests):
        what = f"{name} must answer with a list as long as its batch, {len(requests)}."
        return write_responses([], HTTPStatus.INTERNAL_SERVER_ERROR, what)
    return write_responses([_response(name, context, i, request.id, answers[i]) for i, request in enumerate(requests)])


def _response(name: str, context: Context, index: int, wire_id: str, answer: Any) -> WireResponse:
    try:
        status = context.get_response_status(index)[0]
        return WireResponse(wire_id, int(status), body=as_bytes(answer))
    except Exception as error:  # noqa: BLE001 (a handler's object may raise anything)
        logs.report(logger, error, f"{name} gave an answer that cannot be written")
        what = f"{name} gave an answer that cannot be written: {type(answer).__name__}."
        return WireResponse(wire_id, HTTPStatus.INTERNAL_SERVER_ERROR, body=what.encode())


def _failure(name: str, error: BaseException) -> tuple[int, str]:
    if said := failure_in_prediction(error):
        return said
    if is_out_of_memory(error):
        return HTTPStatus.INSUFFICIENT_STORAGE, f"{name} ran out of memory."
    return HTTPStatus.INTERNAL_SERVER_ERROR, f"{name} failed."


if __name__ == "__main__":
    main()
