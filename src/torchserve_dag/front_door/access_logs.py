"""The access logs and metrics of requests, and Envoy's conditions on a request that has ended."""

from __future__ import annotations

from pathlib import Path

from torchserve_dag.front_door.backend import Resource
from torchserve_dag.front_door.dynamic_files import SAMPLING, from_file
from torchserve_dag.front_door.envoy_config import TYPES
from torchserve_dag.runtime.data.options import MAX_REQUEST_ID
from torchserve_dag.runtime.data.options import TOKEN as TOKEN_NAME

REQUESTS_LOG, FEEDBACK_LOG, REFUSED_LOG = "requests.log", "feedback.log", "refused.log"
REFUSED_PER_S = 10
"""How many refused requests a second are written to `refused.log`; all are counted."""
REQUEST_ID = f"%REQUEST_HEADER(x-request-id):{MAX_REQUEST_ID}%"


def access_logs(folder: Path, logs: Path) -> list[Resource]:
    """A line of JSON for each request of a token; feedback, and refused requests, have log files of their own.

    What a client chose is cut, and whoever has no token writes no more than REFUSED_PER_S lines a second, elsewhere: so
    nobody can have the lines of others rotated away.
    """
    common = {
        "time": "%START_TIME%",
        "request_id": REQUEST_ID,
        "protocol": "%PROTOCOL%",
        "method": "%REQUEST_HEADER(:method):32%",
        "path": "%PATH(NQ):256%",
        "status": "%RESPONSE_CODE%",
        "grpc_status": "%GRPC_STATUS_NUMBER%",
        "duration_ms": "%DURATION%",
        "received_bytes": "%BYTES_RECEIVED%",
        "token": f"%REQUEST_HEADER({TOKEN_NAME})%",
        "client": "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%",
        "flags": "%RESPONSE_FLAGS%",
        "details": "%RESPONSE_CODE_DETAILS%",
    }
    request = {
        **common,
        "model": "%REQUEST_HEADER(x-door-model):256%",
        "version": "%RESPONSE_HEADER(x-model-version)%",
        "first": "%REQUEST_HEADER(x-door-first)%",
        "route": "%ROUTE_NAME%",
        "grpc_failure": "%DYNAMIC_METADATA(door:failure)%",
        "tries": "%UPSTREAM_REQUEST_ATTEMPT_COUNT%",
        "cancels": "%REQUEST_HEADER(x-cancel):128%",
        "sent_bytes": "%BYTES_SENT%",
        "traceparent": "%REQUEST_HEADER(traceparent):64%",
    }
    feedback = {
        "time": "%START_TIME%",
        "request_id": "%DYNAMIC_METADATA(feedback:request_id)%",
        "score": "%DYNAMIC_METADATA(feedback:score)%",
        "token": f"%REQUEST_HEADER({TOKEN_NAME})%",
    }
    is_feedback = has_header({"name": ":path", "string_match": {"exact": "/feedback"}})
    refused = [_admitted(so=False), {"not_health_check_filter": {}}]
    count = {
        "stat": {"name": "count", "tags": [{"name": "status", "value_format": "%RESPONSE_CODE%"}]},
        "value_fixed": 1,
    }
    return [
        {"filter": _admitted(so=True), **_file_log(logs / REQUESTS_LOG, request)},
        {"filter": all_of(is_feedback, has_status(202)), **_file_log(logs / FEEDBACK_LOG, feedback)},
        {"filter": all_of(*refused), **stats("refused", counters=[count])},
        {"filter": all_of(*refused, _sampled(folder)), **_file_log(logs / REFUSED_LOG, common)},
    ]


def _admitted(*, so: bool) -> Resource:
    """Whether the token and its rate limit let a request pass."""
    matcher = {"filter": "door", "path": [{"key": "admitted"}], "value": {"bool_match": so}}
    return {"metadata_filter": {"matcher": matcher, "match_if_key_not_found": not so}}


def _sampled(folder: Path) -> Resource:
    return {
        "extension_filter": {
            "name": "envoy.access_loggers.extension_filters.process_ratelimit",
            "typed_config": {
                "@type": f"{TYPES}extensions.access_loggers.filters.process_ratelimit.v3.ProcessRateLimitFilter",
                "dynamic_config": {"resource_name": "refused", "config_source": from_file(folder / SAMPLING)},
            },
        }
    }


def sampling() -> list[Resource]:
    """What SAMPLING holds: Envoy takes the rate of its log from a file only."""
    bucket = {
        "@type": f"{TYPES}type.v3.TokenBucket",
        "max_tokens": REFUSED_PER_S,
        "tokens_per_fill": REFUSED_PER_S,
        "fill_interval": "1s",
    }
    return [{"@type": f"{TYPES}service.discovery.v3.Resource", "name": "refused", "version": "1", "resource": bucket}]


def _file_log(path: Path, fields: Resource) -> Resource:
    return {
        "name": "envoy.access_loggers.file",
        "typed_config": {
            "@type": f"{TYPES}extensions.access_loggers.file.v3.FileAccessLog",
            "path": str(path),
            "log_format": {"json_format": fields},
        },
    }


def stats(prefix: str, **what: list[Resource]) -> Resource:
    """A log that writes nothing, and counts or times in Envoy's metrics."""
    kind = f"{TYPES}extensions.access_loggers.stats.v3.Config"
    return {
        "name": "envoy.access_loggers.stats",
        "typed_config": {"@type": kind, "stats_scope": {"prefix": prefix}, **what},
    }


def has_status(code: int, op: str = "EQ") -> Resource:
    value = {"default_value": code, "runtime_key": "front_door.status"}
    return {"status_code_filter": {"comparison": {"op": op, "value": value}}}


def has_header(match: Resource) -> Resource:
    return {"header_filter": {"header": match}}


def any_of(*filters: Resource) -> Resource:
    return {"or_filter": {"filters": list(filters)}}


def all_of(*filters: Resource) -> Resource:
    return {"and_filter": {"filters": list(filters)}}
