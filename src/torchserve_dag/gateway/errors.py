"""Failures in the form that OpenAI's API has for them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from torchserve_dag.runtime.messages import Failure

_NAMES_FIELD = re.compile(r"(?:The JSON does not fit: )?([a-z_]+(?:\[\d+\]|\.\w+)*): ", re.ASCII)
_CODES = {
    HTTPStatus.UNAUTHORIZED: "invalid_api_key",
    HTTPStatus.NOT_FOUND: "model_not_found",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_exceeded",
}


class ApiError(Exception):
    """Why a request has no answer, or an answer no end."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """`param`: the field of the request that is wrong. `headers`: of the answer."""
        super().__init__(message)
        self.status, self.message, self.param = int(status), message, param
        self.code = code or _CODES.get(HTTPStatus(self.status))
        self.headers = headers or {}

    @classmethod
    def of(cls, failure: Failure, headers: Mapping[str, str] | None = None) -> ApiError:
        """A model's failure; one that begins with a field's name is about that field."""
        named = _NAMES_FIELD.match(failure.message) if failure.status < HTTPStatus.INTERNAL_SERVER_ERROR else None
        code = None if failure.type == "InputError" or failure.status in _CODES else failure.type
        return cls(failure.status, failure.message, param=named and named[1], code=code, headers=headers)

    @property
    def type(self) -> str:
        if self.status == HTTPStatus.TOO_MANY_REQUESTS:
            return "rate_limit_error"
        return "server_error" if self.status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"

    def fields(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}
