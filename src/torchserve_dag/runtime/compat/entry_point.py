"""What TorchServe's worker does with a handler: loads it, decodes its rows, encodes its answers, reads its exceptions.

By the rules of TorchServe's own files, which are named below. This file is quick to import, and knows no torch.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import json
import sys
from collections.abc import Callable, Mapping
from http import HTTPStatus
from pathlib import Path
from types import ModuleType
from typing import Any

from torchserve_dag.runtime.compat.context import Context
from torchserve_dag.runtime.compat.wire import WireRequest

Handle = Callable[[Any, Any], Any]

_STATUSES = range(HTTPStatus.BAD_REQUEST, 600)


# ts/model_loader.py


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
        raise RuntimeError(f"{function} is a coroutine, which only TorchServe's asynchronous mode runs")
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


# ts/service.py and ts/protocol/otf_message_handler.py


def decoded_row(request: WireRequest) -> dict[str, Any]:
    """A request as a handler reads it."""
    return {key: decoded(value, request.headers.get(key)) for key, value in request.row.items()}


def decoded(value: bytes, about: Any) -> Any:
    """A part of a request as TorchServe decodes it by its content type; as it is where it cannot be decoded."""
    media = about.get("content-type", "") if isinstance(about, Mapping) else ""
    with contextlib.suppress(ValueError, RecursionError):
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


def failure_in_prediction(error: BaseException) -> tuple[int, str] | None:
    """The status and the message of a PredictionException of TorchServe's, by which a handler refuses its batch."""
    util = sys.modules.get("ts.utils.util")  # if it is not imported, none of its exceptions was raised
    if util and isinstance(error, util.PredictionException) and error.error_code in _STATUSES:
        return int(error.error_code), str(error.message)
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether TorchServe takes an exception for a lack of memory: 507."""
    return isinstance(error, MemoryError) or "CUDA" in str(error)
