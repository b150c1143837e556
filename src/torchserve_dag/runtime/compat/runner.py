"""An unedited TorchServe handler in this process: rows and a context in, its answers out.

The handler is what a `.mar` names: a module with a function `handle`, or with one class that has `initialize`
and `handle`, its own or one of TorchServe's; or a function of a workflow's Python file.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import io
import json
import logging
import shutil
import sys
import tempfile
import weakref
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from torchserve_dag.runtime.compat.context import Context
from torchserve_dag.runtime.compat.modules import FolderModules
from torchserve_dag.runtime.data import codec
from torchserve_dag.runtime.messages import Failure, InputError, Text

logger = logging.getLogger(__name__)

Handle = Callable[[Any, Any], Any]

_NOT_OF_WORKFLOWS = {"explain", "describe"}
"""Headers that TorchServe adds to requests for a model, and not to those for a workflow."""


@dataclass(frozen=True, slots=True)
class Row:
    """A request as TorchServe hands it to a handler: its body as `body`, or the parts of a form by their names."""

    values: Mapping[str, Any]
    """Bytes, or decoded data; a message is encoded for the handler."""
    headers: Mapping[str, Any] = field(default_factory=dict)
    """The request's headers, and for each part a mapping with its `content-type`."""

    @classmethod
    def received(cls, values: Mapping[str, Any], headers: Mapping[str, Any]) -> Row:
        """The row that TorchServe sent to a worker, with JSON and text decoded, as TorchServe does by default."""
        decoded = {key: _decoded(value, headers.get(key)) for key, value in values.items()}
        return cls(decoded, {key: value for key, value in headers.items() if key not in _NOT_OF_WORKFLOWS})


class TorchServeRunner:
    """Runs items through one handler: a Row as it is, a message as the `body` of a row."""

    one_at_a_time = True
    """Such handlers keep state between their stages, so a handler must not run two batches at the same time."""

    def __init__(self, name: str, handle: Handle, context: Context, gives: Any) -> None:
        self.name = name
        self.context = context
        self._handle = handle
        self._gives = gives

    @classmethod
    def of_function(cls, name: str, file: Path, function: str) -> TorchServeRunner:
        """A function of a workflow's Python file. Raises RuntimeError where it cannot be loaded."""
        modules = modules_of(file)
        context = Context(name, file.parent, None, 1)
        return cls._load(name, file, modules, lambda: modules.module(file.stem), function, context, bytes)

    @classmethod
    def of_archive(cls, name: str, archive: Path, gpu: int | None, batch: int, *, gives: Any = Any) -> TorchServeRunner:
        """A finished `.mar`, or a folder with what is in one. Raises RuntimeError where it cannot be loaded.

        `gives`: the type of each answer. Any: the data of its JSON, or else its bytes; bytes: the body that TorchServe
        passes to the next node.
        """
        folder = archive if archive.is_dir() else _unpacked(archive, name)
        context = Context(name, folder, gpu, batch)
        file, _, function = str((context.manifest or {})["model"]["handler"]).partition(":")
        modules = FolderModules(folder)
        runner = cls._load(
            name, archive, modules, lambda: _module(folder, modules, file), function or "handle", context, gives
        )
        if folder != archive:
            weakref.finalize(runner, shutil.rmtree, folder, ignore_errors=True)
        return runner

    @classmethod
    def _load(
        cls,
        name: str,
        source: Path,
        modules: FolderModules,
        module: Callable[[], ModuleType],
        function: str,
        context: Context,
        gives: Any,
    ) -> TorchServeRunner:
        try:
            with modules.loading():
                handle = _entry(module(), function, context)
        except Exception as error:
            modules.close()
            what = str(error) if type(error) is RuntimeError else f"loading it raised {type(error).__name__}: {error}"
            raise RuntimeError(f"{source.name}: {what}") from error
        runner = cls(name, handle, context, gives)
        weakref.finalize(runner, modules.close)
        return runner

    def __call__(self, items: Sequence[Any]) -> list[Any]:
        rows = [item if isinstance(item, Row) else Row({"body": item}) for item in items]
        answers = self._run(rows)
        # TorchServe would fail the whole batch; here each row is tried again by itself, once.
        if isinstance(answers, Failure):
            answers = [answers] if len(rows) == 1 else [self._alone(row) for row in rows]
        return [answer if isinstance(answer, Failure) else self._message(answer) for answer in answers]

    def _alone(self, row: Row) -> bytes | Failure:
        answers = self._run([row])
        return answers if isinstance(answers, Failure) else answers[0]

    def _run(self, rows: list[Row]) -> list[bytes | Failure] | Failure:
        """The answers, or the failure of the whole batch."""
        self.context.begin([row.headers for row in rows])
        try:
            answers = self._handle([_copied(row) for row in rows], self.context)
            if isinstance(answers, list) and len(answers) == len(rows):
                return [self._answer(i, answer) for i, answer in enumerate(answers)]
        except BaseException as error:  # also SystemExit, which would end the lane that runs the handler
            logger.exception("%s raised", self.name)
            return self._raised(error)
        return self._failure(f"{self.name} must answer with a list as long as its batch, {len(rows)}.")

    def _answer(self, index: int, answer: Any) -> bytes | Failure:
        body = as_bytes(answer)
        status, _ = self.context.get_response_status(index)
        if status < HTTPStatus.BAD_REQUEST:
            return body
        ours = codec.failure_in(body)  # an archive of ours answers with a complete failure
        text = body.decode("utf-8", "replace")[:500]
        return replace(ours, node=self.name) if ours else self._failure(text, status)

    def _raised(self, error: BaseException) -> Failure:
        util = sys.modules.get("ts.utils.util")  # if it is not imported, none of its exceptions was raised
        if util and isinstance(error, util.PredictionException) and error.error_code in _STATUSES:
            return self._failure(str(error.message), error.error_code)
        if isinstance(error, MemoryError) or "CUDA" in str(error):  # TorchServe's own rule
            return self._failure(f"{self.name} ran out of memory; the log says where.", HTTPStatus.INSUFFICIENT_STORAGE)
        return self._failure(f"{self.name} failed; the log says why.")

    def _failure(self, what: str, status: int = HTTPStatus.INTERNAL_SERVER_ERROR) -> Failure:
        return Failure(status, what, "HandlerError", self.name)

    def _message(self, body: bytes) -> Any:
        try:
            return codec.decode_answer(self._gives, body)
        except InputError as error:
            return self._failure(f"{self.name} did not answer with {codec.describe(self._gives)}. {error.message}")


_STATUSES = range(HTTPStatus.BAD_REQUEST, 600)


def as_bytes(answer: Any) -> bytes:
    """An answer as TorchServe passes it to the next node: tensors saved, text encoded, the rest as JSON."""
    if isinstance(answer, bytes | bytearray):
        return bytes(answer)
    if isinstance(answer, str):
        return answer.encode()
    if isinstance(answer, torch.Tensor):
        buffer = io.BytesIO()
        torch.save(answer, buffer)
        return buffer.getvalue()
    return json.dumps(answer, indent=2).encode()


def modules_of(file: Path) -> FolderModules:
    """The modules that a workflow's Python file may import by their bare names.

    In an unpacked `.war` all files belong to the workflow; elsewhere other files belong to other workflows.
    """
    return FolderModules(file.parent, None if (file.parent / "WAR-INF").is_dir() else {file.stem})


def entry_class(module: ModuleType) -> type | None:
    """The class that TorchServe uses where a module has no function of the handler's name: the module's only class."""
    members = vars(module).values()
    classes = [member for member in members if inspect.isclass(member) and member.__module__ == module.__name__]
    return classes[0] if len(classes) == 1 else None


def _entry(module: ModuleType, function: str, context: Context) -> Handle:
    """The function that TorchServe calls for each batch; the handler is loaded here."""
    handler: Any = None
    if hasattr(module, function):
        handle: Handle = getattr(module, function)
    else:
        kind = entry_class(module)
        if kind is None:
            raise RuntimeError(
                f"{module.__name__.rpartition('.')[2]}.py has neither a function {function} nor exactly one class"
            )
        handler = kind()
        handle = handler.handle
    if inspect.iscoroutinefunction(handle):
        raise RuntimeError(f"{function} is a coroutine, and TorchServe's workflows cannot run one")
    if handler is None:
        handle(None, context)
    else:
        handler.initialize(context)
    return handle


def _module(folder: Path, modules: FolderModules, file: str) -> ModuleType:
    """The module that an archive's manifest names: its own, or one of TorchServe's handlers."""
    name = file.removesuffix(".py")
    if (folder / f"{name}.py").is_file():
        return modules.module(name)
    try:
        return importlib.import_module(f"ts.torch_handler.{name}")
    except ModuleNotFoundError as error:
        if error.name == f"ts.torch_handler.{name}":
            raise RuntimeError(f"it holds no {name}.py, and TorchServe has no handler of that name") from None
        raise RuntimeError(f"its handler is TorchServe's {name}, which cannot be imported here: {error}") from error


def _unpacked(archive: Path, name: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-"))
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(folder)
    return folder


def _decoded(value: Any, about: Any) -> Any:
    """A part of a request, decoded by its own content type; a part that cannot be decoded stays as it is."""
    media = about.get("content-type", "") if isinstance(about, Mapping) else ""
    if not isinstance(value, bytes | bytearray):
        return value
    try:
        if media == "application/json":
            return json.loads(value.decode("utf-8"))
        if media.startswith("text"):
            return value.decode("utf-8")
    except ValueError:
        pass
    return value


def _copied(row: Row) -> dict[str, Any]:
    """The row as the handler gets it: a copy, which it may change, with bytearrays for bytes, as handlers expect."""
    return {key: _body(value) for key, value in row.values.items()}


def _body(value: Any) -> Any:
    if isinstance(value, bytes | bytearray):
        return bytearray(value)
    if value is None or isinstance(value, str | int | float | list | dict):
        return copy.deepcopy(value)
    if isinstance(value, Text):
        return bytearray(value.text.encode())
    body, content_type = codec.encode(value)
    return json.loads(body) if content_type == "application/json" else bytearray(body)
