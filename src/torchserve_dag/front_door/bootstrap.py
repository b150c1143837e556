"""Envoy's static configuration: listeners, HTTP filters, access logs, overload limits."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

from torchserve_dag.front_door.envoy_config import TOKEN_NAME, TOKENS_FILTER, TOKENS_KIND, TYPES, script
from torchserve_dag.front_door.settings import FrontDoor, Limits
from torchserve_dag.front_door.tokens import ISSUER
from torchserve_dag.server.ports import host_and_port

Config = dict[str, Any]

ADMIN = "admin.sock"
"""The socket of the admin interface, relative to Envoy's working directory: an absolute path may be too long."""
ROUTES, CLUSTERS, CERTIFICATE = "routes.json", "clusters.json", "certificate.json"
ACCEPTED = "accepted_tokens.json"
"""Apart from the routes, so that a revocation waits for nothing else."""
REQUESTS_LOG, FEEDBACK_LOG = "requests.log", "feedback.log"

HEAP_BYTES = 2 * 2**30
"""The heap size at which Envoy starts to refuse requests."""
SPARE_FILES = 1024
"""File descriptors reserved for connections to TorchServe and for logs."""
STREAM_WINDOW = 256 * 2**10
BUCKETS_US = [round(1000 * 1.15**i) for i in range(-8, 84)]
"""Upper bounds of the histogram of durations, 15 % apart: from 0.3 ms to 2 minutes."""
GRPC_STATUS = {413: "8", 504: "4"}
"""HTTP status → gRPC status, where Envoy's own mapping differs: RESOURCE_EXHAUSTED and DEADLINE_EXCEEDED."""
REQUEST_ID = "%REQUEST_HEADER(x-request-id)%"

_FILTERS = f"{TYPES}extensions.filters.http."
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
            "histogram_bucket_settings": [{"match": {"contains": "tries"}, "buckets": BUCKETS_US}],
        },
        "overload_manager": _overload(door.limits),
    }


def _from_file(path: Path) -> Config:
    return {
        "resource_api_version": "V3",
        "path_config_source": {"path": str(path), "watched_directory": {"path": str(path.parent)}},
    }


def _listener(door: FrontDoor, folder: Path, logs: Path, key_set: str, max_body: int) -> Config:
    host, port = host_and_port(door.listen)
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
        "address": {"socket_address": {"address": host, "port_value": port}},
        "per_connection_buffer_limit_bytes": 128 * 2**10,
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
            "max_headers_count": 100,
            "headers_with_underscores_action": "REJECT_REQUEST",
        },
        "http2_protocol_options": {
            "max_concurrent_streams": limits.streams,
            "initial_stream_window_size": STREAM_WINDOW,
            "initial_connection_window_size": 4 * STREAM_WINDOW,
        },
        # A client may choose its request's id, to send feedback later; otherwise Envoy generates one.
        "preserve_external_request_id": True,
        "always_set_request_id_in_response": True,
        "early_header_mutation_extensions": [_without_internal_headers()],
        "rds": {"route_config_name": "routes", "config_source": _from_file(folder / ROUTES)},
        "http_filters": _filters(folder, key_set, max_body),
        "access_log": _logs(logs),
        "local_reply_config": _local_replies(),
    }


def _without_internal_headers() -> Config:
    removed = [{"remove": f"x-door-{name}"} for name in ("model", "version", "rest", "token", "first")]
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
        "claim_to_headers": [{"header_name": TOKEN_NAME, "claim_name": "sub"}],
    }
    needs_token = {"match": {"prefix": "/"}, "requires": {"provider_name": "tokens"}}
    return [
        {
            "name": "envoy.filters.http.health_check",
            "typed_config": {
                "@type": f"{_FILTERS}health_check.v3.HealthCheck",
                "pass_through_mode": True,
                "cache_time": "1s",
                "headers": [{"name": ":path", "string_match": {"exact": "/ping"}}],
            },
        },
        {
            "name": "envoy.filters.http.jwt_authn",
            "typed_config": {
                "@type": f"{_FILTERS}jwt_authn.v3.JwtAuthentication",
                "providers": {"tokens": provider},
                "rules": [{"match": {"path": "/ping"}}, needs_token],
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
            # TorchServe gets complete requests only: a slow client occupies no worker.
            "name": "envoy.filters.http.buffer",
            "typed_config": {"@type": f"{_FILTERS}buffer.v3.Buffer", "max_request_bytes": max_body},
        },
        {
            "name": "envoy.filters.http.json_to_metadata",
            "disabled": True,  # except for /feedback
            "typed_config": {
                "@type": f"{_FILTERS}json_to_metadata.v3.JsonToMetadata",
                "request_rules": {"rules": [_feedback_field(key) for key in ("request_id", "score")]},
            },
        },
        {
            "name": "request",
            "typed_config": {
                "@type": f"{_FILTERS}lua.v3.Lua",
                "default_source_code": {"inline_string": script("request.lua")},
            },
        },
        {"name": "envoy.filters.http.router", "typed_config": _router()},
    ]


def _feedback_field(key: str) -> Config:
    return {"selectors": [{"key": key}], "on_present": {"metadata_namespace": "feedback", "key": key}}


def _router() -> Config:
    """The router, which counts and times every attempt, including those that a fallback replaced."""
    tags = [
        {"name": "version", "value_format": "%UPSTREAM_CLUSTER_RAW%"},
        {"name": "route", "value_format": "%ROUTE_NAME%"},
    ]
    counter = {
        "stat": {
            "name": "count",
            "tags": [
                *tags,
                {"name": "status", "value_format": "%RESPONSE_CODE%"},
                {"name": "flags", "value_format": "%RESPONSE_FLAGS%"},
            ],
        },
        "value_fixed": 1,
    }
    duration = "%COMMON_DURATION(US_TX_BEG:US_RX_END:us)%"
    histogram = {"stat": {"name": "us", "tags": tags}, "unit": "Microseconds", "value_format": duration}
    stats = {
        "@type": f"{TYPES}extensions.access_loggers.stats.v3.Config",
        "stats_scope": {"prefix": "tries"},
        "counters": [counter],
        "histograms": [histogram],
    }
    return {
        "@type": f"{_FILTERS}router.v3.Router",
        "suppress_envoy_headers": True,
        "upstream_log": [{"name": "envoy.access_loggers.stats", "typed_config": stats}],
    }


def _logs(folder: Path) -> list[Config]:
    """A line of JSON for each request; feedback has a log file of its own."""
    request = {
        "time": "%START_TIME%",
        "request_id": REQUEST_ID,
        "model": "%REQUEST_HEADER(x-door-model)%",
        "version": "%RESPONSE_HEADER(x-model-version)%",
        "first": "%REQUEST_HEADER(x-door-first)%",
        "route": "%ROUTE_NAME%",
        "protocol": "%PROTOCOL%",
        "method": "%REQUEST_HEADER(:method)%",
        "path": "%PATH(NQ)%",
        "status": "%RESPONSE_CODE%",
        "grpc_status": "%GRPC_STATUS_NUMBER%",
        "grpc_failure": "%DYNAMIC_METADATA(door:failure)%",
        "duration_ms": "%DURATION%",
        "tries": "%UPSTREAM_REQUEST_ATTEMPT_COUNT%",
        "cancels": "%REQUEST_HEADER(x-cancel)%",
        "received_bytes": "%BYTES_RECEIVED%",
        "sent_bytes": "%BYTES_SENT%",
        "token": "%DYNAMIC_METADATA(envoy.filters.http.jwt_authn:token:sub)%",
        "client": "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%",
        "traceparent": "%REQUEST_HEADER(traceparent)%",
        "flags": "%RESPONSE_FLAGS%",
        "details": "%RESPONSE_CODE_DETAILS%",
    }
    feedback = {
        "time": "%START_TIME%",
        "request_id": "%DYNAMIC_METADATA(feedback:request_id)%",
        "score": "%DYNAMIC_METADATA(feedback:score)%",
        "token": "%DYNAMIC_METADATA(envoy.filters.http.jwt_authn:token:sub)%",
    }
    accepted = {
        "and_filter": {
            "filters": [
                {"header_filter": {"header": {"name": ":path", "string_match": {"exact": "/feedback"}}}},
                {
                    "status_code_filter": {
                        "comparison": {"op": "EQ", "value": {"default_value": 202, "runtime_key": "feedback.status"}}
                    }
                },
            ]
        }
    }
    return [
        _file_log(folder / REQUESTS_LOG, request),
        {"filter": accepted, **_file_log(folder / FEEDBACK_LOG, feedback)},
    ]


def _file_log(path: Path, fields: Config) -> Config:
    return {
        "name": "envoy.access_loggers.file",
        "typed_config": {
            "@type": f"{TYPES}extensions.access_loggers.file.v3.FileAccessLog",
            "path": str(path),
            "log_format": {"json_format": fields},
        },
    }


def _local_replies() -> Config:
    """The front door's own errors, in TorchServe's JSON format; over gRPC the message alone."""
    grpc = {"header_filter": {"header": {"name": "content-type", "string_match": {"prefix": "application/grpc"}}}}
    sentences = {
        401: ("InvalidKeyException", "A valid token is needed, as Authorization: Bearer TOKEN (%LOCAL_REPLY_BODY%)."),
        403: ("InvalidKeyException", "This token was revoked: ask for another."),
        413: ("TooLarge", "The body is larger than the server accepts."),
        429: ("Overloaded", "This token exceeds its requests per second; try later."),
        503: ("Overloaded", "No server can answer now; try later (%LOCAL_REPLY_BODY%)."),
        504: ("DeadlineExceeded", "There was no answer in time."),
    }
    mappers = []
    for status, (kind, message) in sentences.items():
        code = {
            "status_code_filter": {
                "comparison": {"op": "EQ", "value": {"default_value": status, "runtime_key": "front_door.status"}}
            }
        }
        body = {"code": "%RESPONSE_CODE%", "type": kind, "message": message, "request_id": REQUEST_ID}
        as_text = {"text_format_source": {"inline_string": message}}
        in_grpc: Config = {"filter": {"and_filter": {"filters": [code, grpc]}}, "body_format_override": as_text}
        if status in GRPC_STATUS:
            header = {"key": "grpc-status", "value": GRPC_STATUS[status]}
            in_grpc["headers_to_add"] = [{"header": header, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}]
        mappers.append(in_grpc)
        mappers.append({"filter": code, "body_format_override": {"json_format": body}})
    return {"mappers": mappers}


def _metrics_listener(door: FrontDoor) -> Config:
    """A listener for Envoy's Prometheus page, and nothing else of the admin interface."""
    host, port = host_and_port(door.metrics)
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
        "address": {"socket_address": {"address": host, "port_value": port}},
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


def _overload(limits: Limits) -> Config:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    connections = min(limits.connections, max(1, files - SPARE_FILES))
    heap = {
        "name": "envoy.resource_monitors.fixed_heap",
        "typed_config": {
            "@type": f"{TYPES}extensions.resource_monitors.fixed_heap.v3.FixedHeapConfig",
            "max_heap_size_bytes": HEAP_BYTES,
        },
    }
    count = {
        "name": "envoy.resource_monitors.global_downstream_max_connections",
        "typed_config": {
            "@type": f"{TYPES}extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
            "max_active_downstream_connections": connections,
        },
    }
    return {
        "refresh_interval": "0.25s",
        "resource_monitors": [heap, count],
        "actions": [
            _at("shrink_heap", 0.85),
            _at("disable_http_keepalive", 0.9),
            _at("stop_accepting_requests", 0.95),
        ],
    }


def _at(action: str, part: float) -> Config:
    trigger = {"name": "envoy.resource_monitors.fixed_heap", "threshold": {"value": part}}
    return {"name": f"envoy.overload_actions.{action}", "triggers": [trigger]}
