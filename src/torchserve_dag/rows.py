"""A TorchServe handler, unedited, in this process: rows and a context in, its answers out.

The handler is a function of rows and a context, or what a `.mar` holds: a module with such a function
named `handle`, or with one class that has `initialize` and `handle`.
"""

from __future__ import annotations

import inspect
import io
import json
import logging
import shutil
import sys
import tempfile
import threading
import weakref
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from typing import Any

import torch
import yaml

from torchserve_dag import codec
from torchserve_dag.messages import Failure
from torchserve_dag.project import import_file

logger = logging.getLogger(__name__)

Handle = Callable[[Any, Any], Any]


class Context:
    """What a TorchServe handler may ask of its context."""

    def __init__(self, name: str, folder: Path, gpu: int | None, batch: int) -> None:
        manifest = folder / "MAR-INF" / "MANIFEST.json"
        self.manifest: dict[str, Any] = json.loads(manifest.read_text("utf-8")) if manifest.is_file() else {}
        config = folder / str(self.manifest.get("model", {}).get("configFile", ""))
        self.model_yaml_config: dict[str, Any] = yaml.safe_load(config.read_text("utf-8")) if config.is_file() else {}
        self.model_name = name
        self.system_properties: dict[str, Any] = {"model_dir": str(folder), "gpu_id": gpu, "batch_size": batch}
        self.metrics = _NoMetrics()
        self.statuses: dict[int, int] = {}

    def get_request_id(self, idx: int = 0) -> str:
        return str(idx)

    def get_request_header(self, idx: int, key: str) -> str | None:  # noqa: ARG002 (TorchServe's signature)
        return None

    def get_all_request_header(self, idx: int) -> dict[str, str]:  # noqa: ARG002
        return {}

    def set_response_status(self, code: int = 200, phrase: str = "", idx: int = 0) -> None:  # noqa: ARG002
        self.statuses[idx] = code

    def set_response_content_type(self, idx: int, value: str) -> None: ...

    def set_response_header(self, idx: int, key: str, value: str) -> None: ...


class _NoMetrics:
    """Takes every metric that a handler adds, and keeps none."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


class RowsRunner:
    """Runs rows through one handler, one batch at a time: such handlers keep state between their stages."""

    def __init__(self, name: str, handle: Handle, context: Context, retries: int = 0) -> None:
        self.name = name
        self.handle = handle
        self.context = context
        self.retries = retries
        self._one_at_a_time = threading.Lock()

    @classmethod
    def of_function(cls, name: str, function: Handle, folder: Path, retries: int) -> RowsRunner:
        context = Context(name, folder, None, 1)
        function(None, context)  # TorchServe calls it so, once, at load
        return cls(name, function, context, retries)

    @classmethod
    def of_archive(cls, name: str, archive: Path, gpu: int | None, batch: int, retries: int) -> RowsRunner:
        """A finished `.mar`. Raises RuntimeError where it holds no handler."""
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-"))
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(folder)
        context = Context(name, folder, gpu, batch)
        file, _, function = str(context.manifest["model"]["handler"]).partition(":")
        with _importable(folder):
            path = folder / f"{file.removesuffix('.py')}.py"
            if not path.is_file():
                raise RuntimeError(f"{archive.name}: it holds no {path.name}; write a handler of your own into it")
            module = import_file(path)
            if hasattr(module, function or "handle"):
                handle: Handle = getattr(module, function or "handle")
                handle(None, context)
            else:
                classes = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
                if len(classes) != 1:
                    raise RuntimeError(f"{archive.name}: {file} has {len(classes)} classes, where one is meant")
                handler: Any = classes[0]()
                handler.initialize(context)
                handle = handler.handle
        runner = cls(name, handle, context, retries)
        weakref.finalize(runner, shutil.rmtree, folder, ignore_errors=True)
        return runner

    def __call__(self, rows: Sequence[Any]) -> list[Any]:
        with self._one_at_a_time:
            return self._run([_row(row) for row in rows], self.retries)

    def _run(self, rows: list[dict[str, Any]], retries: int) -> list[Any]:
        self.context.statuses.clear()
        try:
            answers = self.handle(rows, self.context)
            if isinstance(answers, list) and len(answers) == len(rows):
                return [self._answer(i, answer) for i, answer in enumerate(answers)]
            what = f"must answer with a list as long as its batch, {len(rows)}"
        except BaseException:  # as in runner.py
            logger.exception("%s raised", self.name)
            what = "failed; the log says why"
        if len(rows) > 1:  # TorchServe would fail them all; here each is tried alone
            return [answer for row in rows for answer in self._run([row], retries)]
        if retries > 0:
            return self._run(rows, retries - 1)
        return [self._failure(what)]

    def _answer(self, index: int, answer: Any) -> bytes | Failure:
        status = self.context.statuses.get(index, HTTPStatus.OK)
        if status >= HTTPStatus.BAD_REQUEST:
            ours = codec.failure_in(as_bytes(answer))  # an archive of ours says it in full
            return replace(ours, node=self.name) if ours else Failure(status, _said(answer), "HandlerError", self.name)
        return as_bytes(answer)

    def _failure(self, what: str) -> Failure:
        return Failure(HTTPStatus.INTERNAL_SERVER_ERROR, f"{self.name} {what}.", "HandlerError", self.name)


def as_bytes(answer: Any) -> bytes:
    """An answer as TorchServe puts it on an edge: tensors saved, text encoded, the rest as JSON."""
    if isinstance(answer, bytes | bytearray):
        return bytes(answer)
    if isinstance(answer, str):
        return answer.encode()
    if isinstance(answer, torch.Tensor):
        buffer = io.BytesIO()
        torch.save(answer, buffer)
        return buffer.getvalue()
    return json.dumps(answer, indent=2).encode()


def _row(row: Any) -> dict[str, Any]:
    """TorchServe hands a handler bytearrays, and handlers rely on it."""
    return {key: bytearray(value) if isinstance(value, bytes) else value for key, value in row.items()}


def _said(answer: Any) -> str:
    return as_bytes(answer).decode("utf-8", "replace")[:500]


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """TorchServe puts a model's folder on the path, so its files import each other by their bare names.

    There each model has a process of its own; here the next archive's `model.py` must not be this one's.
    """
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file and Path(file).parent == folder and Path(file).stem == name:
                del sys.modules[name]
