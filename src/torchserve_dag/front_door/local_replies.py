"""The answers that the front door itself gives, in the format of TorchServe's own."""

from __future__ import annotations

from typing import Any, NamedTuple

from torchserve_dag.front_door.access_logs import REQUEST_ID, all_of, any_of, has_header, has_status
from torchserve_dag.front_door.backend import Resource, overwrite
from torchserve_dag.front_door.envoy_config import V1
from torchserve_dag.front_door.http_filters import PING, too_large
from torchserve_dag.front_door.settings import MAX_HEADERS, Limits
from torchserve_dag.front_door.tokens import ONLY_V1

GRPC_STATUS = {413: "8", 504: "4"}
"""HTTP status → gRPC status, where Envoy's own mapping differs: RESOURCE_EXHAUSTED and DEADLINE_EXCEEDED."""


class Refusal(NamedTuple):
    """The answer to a request that is not admitted."""

    status: int
    kind: str
    message: str


REVOKED = Refusal(403, "InvalidKeyException", "This token was revoked: ask for another.")
WRONG_KEY = Refusal(
    400,
    "InvalidKeyException",
    "Token Authorization failed. Token either incorrect, expired, or not provided correctly: give the inference key "
    "of key_file.json, as Authorization: Bearer KEY.",
)
"""TorchServe's own status and first words."""


LIMITED = Refusal(
    403,
    "InvalidKeyException",
    "This token calls language models at /v1 only, for its limits are counted there.",
)
_V1: Resource = {"name": ":path", "string_match": {"prefix": f"{V1}/"}}
_GRPC = has_header({"name": "content-type", "string_match": {"prefix": "application/grpc"}})


def local_replies(limits: Limits, max_body: int, refusal: Refusal = REVOKED) -> Resource:
    """The front door's own answers, in TorchServe's JSON format; over gRPC the message alone."""
    why = "%RESPONSE_CODE_DETAILS%"
    seconds = f"its headers within {limits.headers_s:g} s, all of it within {limits.body_s:g} s"
    larger = f"The body is larger than the {max_body:,} bytes that the server accepts (its max_request_size)."
    sentences = {
        400: ("BadRequestException", f"This is no request that the front door understands ({why})."),
        401: ("InvalidKeyException", "A valid token is needed, as Authorization: Bearer TOKEN (%LOCAL_REPLY_BODY%)."),
        403: (refusal.kind, refusal.message),
        404: ("ResourceNotFoundException", f"There is nothing here ({why}): ask /predictions/NAME."),
        408: ("RequestTimeout", f"The request did not come in time: {seconds}."),
        413: ("TooLarge", larger),
        429: ("Overloaded", "This token exceeds its requests per second; try later."),
        431: (
            "HeadersTooLarge",
            f"The headers are larger than {limits.headers_kib} KiB together, or more than {MAX_HEADERS}.",
        ),
        502: ("InternalError", f"The server's answer could not be read ({why})."),
        503: ("Overloaded", "No server can answer now; try later (%LOCAL_REPLY_BODY%)."),
        504: ("DeadlineExceeded", "There was no answer in time."),
    }
    upgrade = any_of(
        has_header({"name": "upgrade", "present_match": True}),
        has_header({"name": ":method", "string_match": {"exact": "CONNECT"}}),
    )
    ping = all_of(*(has_header(match) for match in PING))
    length = all_of(has_header(too_large(max_body)), {"response_flag_filter": {"flags": ["LH"]}})
    refused = {"filter": "refused", "path": [{"key": "type"}], "value": {"present_match": True}}
    message, kind = "%DYNAMIC_METADATA(refused:message)%", "%DYNAMIC_METADATA(refused:type)%"
    claim = {"filter": "envoy.filters.http.jwt_authn", "path": [{"key": "token"}, {"key": ONLY_V1}]}
    limited = {"matcher": {**claim, "value": {"bool_match": True}}, "match_if_key_not_found": False}
    elsewhere = all_of({"metadata_filter": limited}, has_status(403), has_header({**_V1, "invert_match": True}))
    mappers = [
        {"filter": all_of(ping, has_status(200)), **_body({"status": "Healthy"})},
        {"filter": all_of(ping, has_status(503)), **_body({"status": "Unhealthy"})},
        {"filter": all_of(elsewhere, _GRPC), **_text(LIMITED.message)},
        {"filter": elsewhere, **_body(_failure(LIMITED.kind, LIMITED.message))},
        {
            "filter": {"metadata_filter": {"matcher": refused, "match_if_key_not_found": False}},
            **_body(_failure(kind, message)),
        },
        *_both(length, "TooLarge", larger, status_code=413),
        {
            "filter": all_of(upgrade, has_status(403)),
            "status_code": 501,
            **_body(
                _failure("NotImplemented", "No connection can be upgraded or tunnelled here: send a plain request.")
            ),
        },
    ]
    # What http1_server_abort_dispatch refuses is 500, and nothing else of Envoy's own is, but for an answer too large.
    later = [overwrite("retry-after", "1")]
    failed = f"The front door could not pass this request on; try later ({why})."
    mappers += _both(has_status(500), "Overloaded", failed, status_code=503, headers_to_add=later)
    for code, (kind, message) in sentences.items():
        headers = later if code == 503 else []  # noqa: PLR2004 (429 has its own)
        as_grpc = [overwrite("grpc-status", GRPC_STATUS[code])] if code in GRPC_STATUS else []
        grpc = all_of(has_status(code), _GRPC)
        mappers.append({"filter": grpc, "headers_to_add": [*headers, *as_grpc], **_text(message)})
        status = {"status_code": refusal.status} if code == 403 else {}  # noqa: PLR2004
        mappers += _both(has_status(code), kind, message, headers_to_add=headers, **status)
    return {"mappers": mappers}


def _both(when: Resource, kind: str, message: str, **more: Any) -> list[Resource]:
    """The mapper for OpenAI's API, whose errors have another form, and that for all else over REST."""
    v1 = all_of(when, has_header(_V1))
    code = more.get("status_code", "%RESPONSE_CODE%")
    as_v1 = {"error": {"message": message, "type": kind, "param": None, "code": kind}}
    return [{"filter": v1, **more, **_body(as_v1)}, {"filter": when, **more, **_body(_failure(kind, message, code))}]


def _failure(kind: str, message: str, code: int | str = "%RESPONSE_CODE%") -> Resource:
    return {"code": code, "type": kind, "message": message, "request_id": REQUEST_ID}


def _text(message: str) -> Resource:
    return {"body_format_override": {"text_format_source": {"inline_string": message}}}


def _body(fields: Resource) -> Resource:
    return {"body_format_override": {"json_format": fields}}
