"""Envoy's static configuration: listeners, HTTP filters, access logs, overload limits."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

from torchserve_dag.front_door.envoy_config import (
    HEALTH,
    INFLATE,
    TOKENS_FILTER,
    TOKENS_KIND,
    TYPES,
    UNPACK,
    script,
)
from torchserve_dag.front_door.settings import FrontDoor, Limits
from torchserve_dag.front_door.tokens import ISSUER
from torchserve_dag.runtime.data.options import MAX_REQUEST_ID, TOKEN
from torchserve_dag.server.ports import host_and_port

Config = dict[str, Any]

ADMIN = "admin.sock"
"""The socket of the admin interface, relative to Envoy's working directory: an absolute path may be too long."""
ROUTES, CLUSTERS, CERTIFICATE = "routes.json", "clusters.json", "certificate.json"
ACCEPTED = "accepted_tokens.json"
"""Apart from the routes, so that a revocation waits for nothing else."""
SAMPLING = "sampling.json"
REQUESTS_LOG, FEEDBACK_LOG, REFUSED_LOG = "requests.log", "feedback.log", "refused.log"

HEAP_BYTES = 2 * 2**30
"""What Envoy may use: from 70 % of it the largest streams are reset, and near it nothing new is taken."""
TRACKED_POWER = 18
"""Streams that hold 2^18 bytes (256 KiB) or more are counted by size, and may be reset."""
SPARE_FILES = 1024
"""File descriptors reserved for connections to TorchServe and for logs."""
UNREAD_BYTES = 64 * 2**20
"""What a client may leave unread of an answer. It is held here, where the largest stream can be reset, and not in
TorchServe, which keeps everything that Envoy does not take and ends when its heap is full."""
CONNECTION_WINDOW = 2**20
"""What may be on its way to Envoy over one HTTP/2 connection."""
REFUSED_PER_S = 10
"""How many refused requests a second are written to `refused.log`; all are counted."""
MAX_HEADERS = 100
ANSWER_BYTES = 8 * 2**20
"""More than TorchServe's max_response_size, 6.5 MB."""
INFLATE_RATIO = 20
"""How much larger than it was sent a compressed message may be: what is inflated is in memory as a whole."""
IDLE_UNDER_PRESSURE = "5s"
"""How long a client that neither sends nor reads is waited for when memory is short."""
BUCKETS_US = [round(1000 * 1.15**i) for i in range(-8, 84)]
"""Upper bounds of the histogram of durations, 15 % apart: from 0.3 ms to 2 minutes."""
GRPC_STATUS = {413: "8", 504: "4"}
"""HTTP status → gRPC status, where Envoy's own mapping differs: RESOURCE_EXHAUSTED and DEADLINE_EXCEEDED."""
REQUEST_ID = f"%REQUEST_HEADER(x-request-id):{MAX_REQUEST_ID}%"

_FILTERS = f"{TYPES}extensions.filters.http."
_HEAP = "envoy.resource_monitors.fixed_heap"
_LISTENER_HTTP = f"{TYPES}extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"


def bootstrap(door: FrontDoor, folder: Path, logs: Path, key_set: str, max_body: int) -> Config:
    """The bootstrap configuration. Envoy reads from `folder` and writes to `logs`; `max_body` is in bytes."""
    return {
        "admin": {"address": {"pipe": {"path": ADMIN, "mode": 0o600}}},
        "node": {"id": "front-door", "cluster": "torchserve-dag"},
        "dynamic_resources": {"cds_config": _from_file(folder / CLUSTERS)},
        "static_resources": {
            "clusters": [_admin_cluster()],
            "listeners": [_listener(door, folder, logs, key_set, max_body), _metrics_listener(door)],
        },
        "stats_flush_interval": "0.5s",  # histograms lag behind by up to this interval
        "stats_config": {
            "histogram_bucket_settings": [
                {"match": {"contains": "given_up_ms"}, "buckets": [bound / 1000 for bound in BUCKETS_US]},
                {"match": {"contains": "tries"}, "buckets": BUCKETS_US},
            ],
        },
        "overload_manager": _overload(door.limits),
    }


def _from_file(path: Path) -> Config:
    return {
        "resource_api_version": "V3",
        "path_config_source": {"path": str(path), "watched_directory": {"path": str(path.parent)}},
    }


def _listener(door: FrontDoor, folder: Path, logs: Path, key_set: str, max_body: int) -> Config:
    certificate = {"name": "certificate", "sds_config": _from_file(folder / CERTIFICATE)}
    tls = {
        "@type": f"{TYPES}extensions.transport_sockets.tls.v3.DownstreamTlsContext",
        "common_tls_context": {
            "alpn_protocols": ["h2", "http/1.1"],
            "tls_params": {"tls_minimum_protocol_version": "TLSv1_2"},
            "tls_certificate_sds_secret_configs": [certificate],
        },
    }
    http = {"name": "http", "typed_config": _http(door.limits, folder, logs, key_set, max_body)}
    return {
        "name": "front_door",
        "address": _listening(door.listen),
        "per_connection_buffer_limit_bytes": UNREAD_BYTES,
        "filter_chains": [
            {
                "filters": [http],
                "transport_socket": {"name": "tls", "typed_config": tls},
                "transport_socket_connect_timeout": f"{door.limits.headers_s}s",
            }
        ],
    }


def _http(limits: Limits, folder: Path, logs: Path, key_set: str, max_body: int) -> Config:
    return {
        "@type": _LISTENER_HTTP,
        "stat_prefix": "front_door",
        "server_name": "torchserve-dag",
        "use_remote_address": True,
        "normalize_path": True,
        "merge_slashes": True,
        "path_with_escaped_slashes_action": "REJECT_REQUEST",
        "max_request_headers_kb": limits.headers_kib,
        "request_headers_timeout": f"{limits.headers_s}s",
        "request_timeout": f"{limits.body_s}s",
        "drain_timeout": "1s",
        "common_http_protocol_options": {
            "idle_timeout": f"{limits.idle_s}s",
            "max_headers_count": MAX_HEADERS,
            "headers_with_underscores_action": "REJECT_REQUEST",
        },
        "http_protocol_options": {"accept_http_10": True, "default_host_for_http_10": "localhost"},
        "http2_protocol_options": {
            "max_concurrent_streams": limits.streams,
            "initial_stream_window_size": UNREAD_BYTES,  # of both directions: Envoy has one number
            "initial_connection_window_size": CONNECTION_WINDOW,
            # An invalid request ends alone: the connection may be a load balancer's, with others' requests.
            "override_stream_error_on_invalid_http_message": True,
        },
        "request_id_extension": {
            "typed_config": {
                "@type": f"{TYPES}extensions.request_id.uuid.v3.UuidRequestIdConfig",
                "pack_trace_reason": False,  # else a digit of a client's own UUID is changed
            }
        },
        # A client may choose its request's id, to send feedback later; otherwise Envoy generates one.
        "preserve_external_request_id": True,
        "always_set_request_id_in_response": True,
        "early_header_mutation_extensions": [_without_internal_headers()],
        "rds": {"route_config_name": "routes", "config_source": _from_file(folder / ROUTES)},
        "http_filters": _filters(folder, key_set, max_body),
        "access_log": _logs(folder, logs),
        "local_reply_config": _local_replies(limits, max_body),
    }


def _without_internal_headers() -> Config:
    """No client says what the front door says, or asks a worker for what TorchServe's management asks it."""
    ours = [f"x-door-{name}" for name in ("model", "version", "rest", "token", "first", "inflated")]
    removed = [{"remove": name} for name in (*ours, "describe", "explain")]
    return {
        "name": "envoy.http.early_header_mutation.header_mutation",
        "typed_config": {
            "@type": f"{TYPES}extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation",
            "mutations": removed,
        },
    }


def _filters(folder: Path, key_set: str, max_body: int) -> list[Config]:
    """The HTTP filters, in the order in which a request passes them."""
    provider = {
        "issuer": ISSUER,
        "local_jwks": {"inline_string": key_set},
        "require_expiration": True,
        "forward": False,
        "payload_in_metadata": "token",
        "claim_to_headers": [{"header_name": TOKEN, "claim_name": "sub"}],
        # The scheme's case is the client's choice (RFC 9110, 11.1); Envoy compares it letter by letter.
        "from_headers": [
            {"name": "authorization", "value_prefix": f"{scheme} "} for scheme in ("Bearer", "bearer", "BEARER")
        ],
    }
    needs_token = {"match": {"prefix": "/"}, "requires": {"provider_name": "tokens"}}
    return [
        {
            # Answers from what Envoy's own health check found last: nothing of the client's reaches TorchServe.
            "name": "ping",
            "typed_config": {
                "@type": f"{_FILTERS}health_check.v3.HealthCheck",
                "pass_through_mode": False,
                "cluster_min_healthy_percentages": {HEALTH: {"value": 100}},
                "headers": _PING,
            },
        },
        {
            "name": "envoy.filters.http.jwt_authn",
            "typed_config": {
                "@type": f"{_FILTERS}jwt_authn.v3.JwtAuthentication",
                "providers": {"tokens": provider},
                "rules": [needs_token],
            },
        },
        {
            "name": TOKENS_FILTER,
            "config_discovery": {
                "config_source": _from_file(folder / ACCEPTED),
                "type_urls": [f"{TYPES}{TOKENS_KIND}"],
            },
        },
        {
            "name": "envoy.filters.http.local_ratelimit",
            "typed_config": {"@type": f"{_FILTERS}local_ratelimit.v3.LocalRateLimit", "stat_prefix": "front_door"},
        },
        {
            "name": "admitted",  # from here on the request belongs to a token, and to the log of requests
            "typed_config": {
                "@type": f"{_FILTERS}set_metadata.v3.Config",
                "metadata": [{"metadata_namespace": "door", "value": {"admitted": True}}],
            },
        },
        {
            # Reads a body whose length is too large to its end, keeps nothing, and only then answers: a client that is
            # still sending sees a broken connection or stream instead of the answer.
            # (The filter has no cluster to find healthy, and answers 503; the local replies make that 413.)
            "name": "too_large",
            "typed_config": {
                "@type": f"{_FILTERS}health_check.v3.HealthCheck",
                "pass_through_mode": False,
                "cluster_min_healthy_percentages": {"none": {"value": 100}},
                "headers": [_too_large(max_body)],
            },
        },
        {
            # TorchServe gets complete requests only: a slow client occupies no worker.
            "name": "envoy.filters.http.buffer",
            # (Lua reads unary answers over gRPC as a whole, within the same limit.)
            "typed_config": {
                "@type": f"{_FILTERS}buffer.v3.Buffer",
                "max_request_bytes": max(max_body, ANSWER_BYTES),
            },
        },
        {
            "name": "envoy.filters.http.json_to_metadata",
            "disabled": True,  # except for /feedback
            "typed_config": {
                "@type": f"{_FILTERS}json_to_metadata.v3.JsonToMetadata",
                "request_rules": {"rules": [_feedback_field(key) for key in ("request_id", "score")]},
            },
        },
        {"name": UNPACK, "disabled": True, "typed_config": _lua("unpack.lua", MAX_BODY=max_body, RATIO=INFLATE_RATIO)},
        {
            "name": INFLATE,
            "disabled": True,  # except for calls over gRPC
            "typed_config": {
                "@type": f"{_FILTERS}decompressor.v3.Decompressor",
                "decompressor_library": {
                    "name": "gzip",
                    "typed_config": {
                        "@type": f"{TYPES}extensions.compression.gzip.decompressor.v3.Gzip",
                        "window_bits": 15,
                        "chunk_size": 65_536,
                        "max_inflate_ratio": INFLATE_RATIO,
                    },
                },
                "request_direction_config": {
                    "common_config": {"ignore_no_transform_header": True},
                    "advertise_accept_encoding": False,
                },
                "response_direction_config": {
                    "common_config": {"enabled": {"default_value": False, "runtime_key": "front_door.never"}}
                },
            },
        },
        {"name": "request", "typed_config": _lua("request.lua")},
        {"name": "envoy.filters.http.router", "typed_config": _router()},
    ]


_PING = [
    {"name": ":path", "string_match": {"safe_regex": {"regex": r"/ping(\?.*)?"}}},
    {"name": ":method", "string_match": {"safe_regex": {"regex": "GET|HEAD"}}},
]
"""The requests for the server's health, which need no token."""


def _too_large(max_body: int) -> Config:
    return {"name": "content-length", "range_match": {"start": max_body + 1, "end": 2**62}}


def _lua(name: str, **numbers: int) -> Config:
    known = "".join(f"local {name} = {number}\n" for name, number in numbers.items())
    return {"@type": f"{_FILTERS}lua.v3.Lua", "default_source_code": {"inline_string": known + script(name)}}


def _feedback_field(key: str) -> Config:
    return {"selectors": [{"key": key}], "on_present": {"metadata_namespace": "feedback", "key": key}}


def _router() -> Config:
    """The router, which counts and times every attempt, including those that a fallback replaced.

    Durations are those of the version's own answers and failures. A client's mistake (4xx) is answered at once, and
    would make a version look fast; a client that gave up has waited, and how long is a histogram of its own.
    """
    tags = [
        {"name": "version", "value_format": "%UPSTREAM_CLUSTER_RAW%"},
        {"name": "route", "value_format": "%ROUTE_NAME%"},
    ]
    outcome = [
        *tags,
        {"name": "status", "value_format": "%RESPONSE_CODE%"},
        {"name": "flags", "value_format": "%RESPONSE_FLAGS%"},
    ]
    counter = {"stat": {"name": "count", "tags": outcome}, "value_fixed": 1}
    duration = "%COMMON_DURATION(US_TX_BEG:US_RX_END:us)%"
    answered = {"stat": {"name": "us", "tags": tags}, "unit": "Microseconds", "value_format": duration}
    waited = {"stat": {"name": "given_up_ms", "tags": outcome}, "unit": "Milliseconds", "value_format": "%DURATION%"}
    return {
        "@type": f"{_FILTERS}router.v3.Router",
        "suppress_envoy_headers": True,
        "upstream_log": [
            _stats(counters=[counter]),
            {"filter": _any(_status(399, "LE"), _status(500, "GE")), **_stats(histograms=[answered])},
            {"filter": _any(_status(0), _status(408)), **_stats(histograms=[waited])},
        ],
    }


def _stats(**what: list[Config]) -> Config:
    kind = f"{TYPES}extensions.access_loggers.stats.v3.Config"
    return {
        "name": "envoy.access_loggers.stats",
        "typed_config": {"@type": kind, "stats_scope": {"prefix": "tries"}, **what},
    }


def _logs(folder: Path, logs: Path) -> list[Config]:
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
        "token": "%DYNAMIC_METADATA(envoy.filters.http.jwt_authn:token:sub)%",
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
        "token": "%DYNAMIC_METADATA(envoy.filters.http.jwt_authn:token:sub)%",
    }
    is_feedback = {"header_filter": {"header": {"name": ":path", "string_match": {"exact": "/feedback"}}}}
    refused = [_admitted(so=False), {"not_health_check_filter": {}}]
    count = {
        "stat": {"name": "count", "tags": [{"name": "status", "value_format": "%RESPONSE_CODE%"}]},
        "value_fixed": 1,
    }
    counted = {
        "name": "envoy.access_loggers.stats",
        "typed_config": {
            "@type": f"{TYPES}extensions.access_loggers.stats.v3.Config",
            "stats_scope": {"prefix": "refused"},
            "counters": [count],
        },
    }
    return [
        {"filter": _admitted(so=True), **_file_log(logs / REQUESTS_LOG, request)},
        {"filter": _all(is_feedback, _status(202)), **_file_log(logs / FEEDBACK_LOG, feedback)},
        {"filter": _all(*refused), **counted},
        {"filter": _all(*refused, _sampled(folder)), **_file_log(logs / REFUSED_LOG, common)},
    ]


def _admitted(*, so: bool) -> Config:
    """Whether the token and its rate limit let a request pass."""
    matcher = {"filter": "door", "path": [{"key": "admitted"}], "value": {"bool_match": so}}
    return {"metadata_filter": {"matcher": matcher, "match_if_key_not_found": not so}}


def _sampled(folder: Path) -> Config:
    return {
        "extension_filter": {
            "name": "envoy.access_loggers.extension_filters.process_ratelimit",
            "typed_config": {
                "@type": f"{TYPES}extensions.access_loggers.filters.process_ratelimit.v3.ProcessRateLimitFilter",
                "dynamic_config": {"resource_name": "refused", "config_source": _from_file(folder / SAMPLING)},
            },
        }
    }


def sampling() -> list[Config]:
    """What SAMPLING holds: Envoy takes the rate of its log from a file only."""
    bucket = {
        "@type": f"{TYPES}type.v3.TokenBucket",
        "max_tokens": REFUSED_PER_S,
        "tokens_per_fill": REFUSED_PER_S,
        "fill_interval": "1s",
    }
    return [{"@type": f"{TYPES}service.discovery.v3.Resource", "name": "refused", "version": "1", "resource": bucket}]


def _status(code: int, op: str = "EQ") -> Config:
    value = {"default_value": code, "runtime_key": "front_door.status"}
    return {"status_code_filter": {"comparison": {"op": op, "value": value}}}


def _any(*filters: Config) -> Config:
    return {"or_filter": {"filters": list(filters)}}


def _all(*filters: Config) -> Config:
    return {"and_filter": {"filters": list(filters)}}


def _file_log(path: Path, fields: Config) -> Config:
    return {
        "name": "envoy.access_loggers.file",
        "typed_config": {
            "@type": f"{TYPES}extensions.access_loggers.file.v3.FileAccessLog",
            "path": str(path),
            "log_format": {"json_format": fields},
        },
    }


def _local_replies(limits: Limits, max_body: int) -> Config:
    """The front door's own answers, in TorchServe's JSON format; over gRPC the message alone."""
    why = "%RESPONSE_CODE_DETAILS%"
    seconds = f"its headers within {limits.headers_s:g} s, all of it within {limits.body_s:g} s"
    too_large = f"The body is larger than the {max_body:,} bytes that the server accepts (its max_request_size)."
    sentences = {
        400: ("BadRequestException", f"This is no request that the front door understands ({why})."),
        401: ("InvalidKeyException", "A valid token is needed, as Authorization: Bearer TOKEN (%LOCAL_REPLY_BODY%)."),
        403: ("InvalidKeyException", "This token was revoked: ask for another."),
        404: ("ResourceNotFoundException", f"There is nothing here ({why}): ask /predictions/NAME."),
        408: ("RequestTimeout", f"The request did not come in time: {seconds}."),
        413: ("TooLarge", too_large),
        429: ("Overloaded", "This token exceeds its requests per second; try later."),
        431: (
            "HeadersTooLarge",
            f"The headers are larger than {limits.headers_kib} KiB together, or more than {MAX_HEADERS}.",
        ),
        502: ("InternalError", f"The server's answer could not be read ({why})."),
        503: ("Overloaded", "No server can answer now; try later (%LOCAL_REPLY_BODY%)."),
        504: ("DeadlineExceeded", "There was no answer in time."),
    }
    upgrade = {
        "or_filter": {
            "filters": [
                {"header_filter": {"header": {"name": "upgrade", "present_match": True}}},
                {"header_filter": {"header": {"name": ":method", "string_match": {"exact": "CONNECT"}}}},
            ]
        }
    }
    ping = _all(*({"header_filter": {"header": match}} for match in _PING))
    length = _all({"header_filter": {"header": _too_large(max_body)}}, {"response_flag_filter": {"flags": ["LH"]}})
    refused = {"filter": "refused", "path": [{"key": "type"}], "value": {"present_match": True}}
    message, kind = "%DYNAMIC_METADATA(refused:message)%", "%DYNAMIC_METADATA(refused:type)%"
    mappers = [
        {"filter": _all(ping, _status(200)), **_body({"status": "Healthy"})},
        {"filter": _all(ping, _status(503)), **_body({"status": "Unhealthy"})},
        {
            "filter": {"metadata_filter": {"matcher": refused, "match_if_key_not_found": False}},
            **_body(_failure(kind, message)),
        },
        {"filter": length, "status_code": 413, **_body(_failure("TooLarge", too_large))},
        {
            "filter": _all(upgrade, _status(403)),
            "status_code": 501,
            **_body(
                _failure("NotImplemented", "No connection can be upgraded or tunnelled here: send a plain request.")
            ),
        },
    ]
    # What http1_server_abort_dispatch refuses is 500, and nothing else of Envoy's own is, but for an answer too large.
    later = [_overwrite("retry-after", "1")]
    failed = _failure("Overloaded", f"The front door could not pass this request on; try later ({why}).")
    mappers.append({"filter": _status(500), "status_code": 503, "headers_to_add": later, **_body(failed)})
    grpc = {"header_filter": {"header": {"name": "content-type", "string_match": {"prefix": "application/grpc"}}}}
    for status, (kind, message) in sentences.items():
        headers = later if status == 503 else []  # noqa: PLR2004 (429 has its own)
        as_grpc = [_overwrite("grpc-status", GRPC_STATUS[status])] if status in GRPC_STATUS else []
        as_text = {"body_format_override": {"text_format_source": {"inline_string": message}}}
        mappers.append({"filter": _all(_status(status), grpc), "headers_to_add": [*headers, *as_grpc], **as_text})
        mappers.append({"filter": _status(status), "headers_to_add": headers, **_body(_failure(kind, message))})
    return {"mappers": mappers}


def _failure(kind: str, message: str) -> Config:
    return {"code": "%RESPONSE_CODE%", "type": kind, "message": message, "request_id": REQUEST_ID}


def _body(fields: Config) -> Config:
    return {"body_format_override": {"json_format": fields}}


def _overwrite(name: str, value: str) -> Config:
    return {"header": {"key": name, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}


def _listening(address: str) -> Config:
    host, port = host_and_port(address)
    both = {"ipv4_compat": True} if host == "::" else {}  # as other servers do: `::` is every address of the machine
    return {"socket_address": {"address": host, "port_value": port, **both}}


def _metrics_listener(door: FrontDoor) -> Config:
    """A listener for Envoy's Prometheus page, and nothing else of the admin interface."""
    route = {
        "match": {"path": "/metrics"},
        "route": {"cluster": "admin", "prefix_rewrite": "/stats/prometheus", "timeout": "10s"},
    }
    http = {
        "@type": _LISTENER_HTTP,
        "stat_prefix": "metrics",
        "route_config": {"virtual_hosts": [{"name": "metrics", "domains": ["*"], "routes": [route]}]},
        "http_filters": [
            {"name": "envoy.filters.http.router", "typed_config": {"@type": f"{_FILTERS}router.v3.Router"}}
        ],
    }
    return {
        "name": "metrics",
        "address": _listening(door.metrics),
        "filter_chains": [{"filters": [{"name": "http", "typed_config": http}]}],
    }


def _admin_cluster() -> Config:
    endpoint = {"endpoint": {"address": {"pipe": {"path": ADMIN}}}}
    return {
        "name": "admin",
        "type": "STATIC",
        "connect_timeout": "1s",
        "load_assignment": {"cluster_name": "admin", "endpoints": [{"lb_endpoints": [endpoint]}]},
    }


def connections(limits: Limits) -> int:
    """How many connections of clients the front door takes: the files that are left to it may be fewer."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(limits.connections, max(files - SPARE_FILES, files // 2))


def _overload(limits: Limits) -> Config:
    heap = {
        "name": _HEAP,
        "typed_config": {
            "@type": f"{TYPES}extensions.resource_monitors.fixed_heap.v3.FixedHeapConfig",
            "max_heap_size_bytes": HEAP_BYTES,
        },
    }
    count = {
        "name": "envoy.resource_monitors.global_downstream_max_connections",
        "typed_config": {
            "@type": f"{TYPES}extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
            "max_active_downstream_connections": connections(limits),
        },
    }
    idle = {
        "@type": f"{TYPES}config.overload.v3.ScaleTimersOverloadActionConfig",
        "timer_scale_factors": [
            {"timer": f"HTTP_DOWNSTREAM_{timer}", "min_timeout": IDLE_UNDER_PRESSURE}
            for timer in ("CONNECTION_IDLE", "STREAM_IDLE", "STREAM_FLUSH")
        ],
    }
    return {
        "refresh_interval": "0.1s",
        "resource_monitors": [heap, count],
        # Streams of HTTP/2 are reset by what they hold, the largest first; HTTP/1 connections that go on sending are
        # closed, and those that neither send nor read are closed sooner. Only then new requests are refused.
        "buffer_factory_config": {"minimum_account_to_track_power_of_two": TRACKED_POWER},
        "actions": [
            _at("shrink_heap", 0.6),
            {**_from("reduce_timeouts", 0.6, 0.65), "typed_config": idle},
            _from("reset_high_memory_stream", 0.7, 0.9),
            _at("disable_http_keepalive", 0.9),
            _at("stop_accepting_requests", 0.95),
        ],
        "loadshed_points": [_at("http1_server_abort_dispatch", 0.85, "load_shed_points")],
    }


def _at(action: str, part: float, kind: str = "overload_actions") -> Config:
    trigger = {"name": _HEAP, "threshold": {"value": part}}
    return {"name": f"envoy.{kind}.{action}", "triggers": [trigger]}


def _from(action: str, begins: float, whole: float) -> Config:
    trigger = {"name": _HEAP, "scaled": {"scaling_threshold": begins, "saturation_threshold": whole}}
    return {"name": f"envoy.overload_actions.{action}", "triggers": [trigger]}
