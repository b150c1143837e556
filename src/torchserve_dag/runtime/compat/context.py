"""The context that a TorchServe handler reads from, and sets statuses and headers in."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from torchserve_dag.runtime.compat.wire import WireRequest


class Context:
    """TorchServe's `ts.context.Context` without TorchServe."""

    def __init__(self, name: str, folder: Path, gpu: int | None, batch: int) -> None:
        manifest = folder / "MAR-INF" / "MANIFEST.json"
        self.manifest: dict[str, Any] | None = json.loads(manifest.read_text("utf-8")) if manifest.is_file() else None
        config = (self.manifest or {}).get("model", {}).get("configFile")
        self.model_yaml_config: dict[str, Any] = yaml.safe_load((folder / config).read_text("utf-8")) if config else {}
        self.model_name = name
        self.system_properties: dict[str, Any] = {
            "model_dir": str(folder),
            "gpu_id": gpu,
            "batch_size": batch,
            "server_name": "MMS",
            "server_version": "0.12.0",
            "limit_max_image_pixels": True,
        }
        self.metrics: Any = _NoMetrics()
        self.stopping_criteria = None
        self.header_key_sequence_id = _sequence_key("id")
        self.header_key_sequence_start = _sequence_key("start")
        self.header_key_sequence_end = _sequence_key("end")
        self.cl_socket: Any = None
        """Where `send_intermediate_predict_response` sends chunks to, by `sendall`."""
        self.begin([])

    def begin(self, requests: Sequence[WireRequest]) -> None:
        """Begin a batch, and forget the last batch."""
        self.request_processor = [RequestProcessor(request.headers) for request in requests]
        self.request_ids = {i: request.id for i, request in enumerate(requests)}

    def get_request_id(self, idx: int = 0) -> str | None:
        return self.request_ids.get(idx)

    def get_request_header(self, idx: int, key: str) -> Any:
        return self.request_processor[idx].get_request_property(key)

    def get_all_request_header(self, idx: int) -> dict[str, Any]:
        return self.request_processor[idx].get_request_properties()

    def get_sequence_id(self, idx: int) -> Any:
        return self.get_request_header(idx, self.header_key_sequence_id)

    def get_response_status(self, idx: int) -> tuple[int, str | None]:
        processor = self.request_processor[idx]
        return processor.get_response_status_code(), processor.get_response_status_phrase()

    def set_response_status(self, code: int = 200, phrase: str = "", idx: int = 0) -> None:
        self.request_processor[idx].report_status(code, phrase)

    def set_all_response_status(self, code: int = 200, phrase: str = "") -> None:
        for processor in self.request_processor:
            processor.report_status(code, phrase)

    def get_response_headers(self, idx: int) -> dict[str, str]:
        return self.request_processor[idx].get_response_headers()

    def set_response_header(self, idx: int, key: str, value: str) -> None:
        self.request_processor[idx].add_response_property(key, value)

    def get_response_content_type(self, idx: int) -> str | None:
        return self.get_response_headers(idx).get("content-type")

    def set_response_content_type(self, idx: int, value: str) -> None:
        self.set_response_header(idx, "content-type", value)


class RequestProcessor:
    """A request of a batch: its headers, and the status and headers that the handler sets for the answer."""

    def __init__(self, headers: dict[str, Any]) -> None:
        self._headers = headers
        self._status: tuple[int, str | None] = (200, None)
        self._response: dict[str, str] = {}

    def get_request_property(self, key: str) -> Any:
        """A header by its name, which a proxy or a server in front of this may have written in lower case."""
        return self._headers.get(key, self._headers.get(key.lower()))

    def get_request_properties(self) -> dict[str, Any]:
        return self._headers

    def report_status(self, code: int, reason_phrase: str | None = None) -> None:
        self._status = (code, reason_phrase)

    def get_response_status_code(self) -> int:
        return self._status[0]

    def get_response_status_phrase(self) -> str | None:
        return self._status[1]

    def add_response_property(self, key: str, value: str) -> None:
        self._response[key] = value

    def get_response_headers(self) -> dict[str, str]:
        return self._response

    def get_response_header(self, key: str) -> str | None:
        return self._response.get(key)


class _NoMetrics:
    """Accepts every metric that a handler creates or adds to, and records nothing."""

    def __getattr__(self, name: str) -> _NoMetrics:
        return self

    def __call__(self, *_: Any, **__: Any) -> _NoMetrics:
        return self


def _sequence_key(what: str) -> str:
    name = f"ts_request_sequence_{what}"
    return os.environ.get(name.upper(), name)
