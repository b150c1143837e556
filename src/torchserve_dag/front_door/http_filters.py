"""The HTTP filters that each request to the front door passes, from `/ping` to the router."""

from __future__ import annotations

from pathlib import Path

from torchserve_dag.front_door.access_logs import any_of, has_status, stats
from torchserve_dag.front_door.backend import Resource
from torchserve_dag.front_door.dynamic_files import ACCEPTED, from_file
from torchserve_dag.front_door.envoy_config import (
    GRPC,
    HEALTH,
    HEALTH_CHECK,
    INFLATE,
    TOKENS_FILTER,
    TOKENS_KIND,
    TYPES,
    UNPACK,
    script,
)
from torchserve_dag.front_door.tokens import ISSUER
from torchserve_dag.runtime.data.options import TOKEN

ANSWER_BYTES = 8 * 2**20
"""More than TorchServe's max_response_size, 6.5 MB."""
INFLATE_RATIO = 20
"""How much larger than it was sent a compressed message may be: what is inflated is in memory as a whole."""

FILTERS = f"{TYPES}extensions.filters.http."

GRPC_BRIDGE = {
    "name": "envoy.filters.http.grpc_http1_reverse_bridge",
    "typed_config": {
        "@type": f"{FILTERS}grpc_http1_reverse_bridge.v3.FilterConfig",
        # Also the type of Envoy's own answers over gRPC: the filter makes failures of answers of any other.
        "content_type": "application/grpc",
        "withhold_grpc_frames": False,
    },
}
"""Lets a server that speaks HTTP/1.1 answer calls over gRPC: it adds the trailer with the status OK to each answer."""

PING = [
    {"name": ":path", "string_match": {"safe_regex": {"regex": r"/ping(\?.*)?"}}},
    {"name": ":method", "string_match": {"safe_regex": {"regex": "GET|HEAD"}}},
]
"""The requests for the server's health, which need no token."""


def http_filters(admission: list[Resource], max_body: int, *, direct: bool) -> list[Resource]:
    """The HTTP filters, in the order in which a request passes them. `admission`: those that check its token."""
    return [
        {
            # Answers from what Envoy's own health check found last: nothing of the client's reaches the host.
            "name": "ping",
            "typed_config": {
                "@type": f"{FILTERS}health_check.v3.HealthCheck",
                "pass_through_mode": False,
                "cluster_min_healthy_percentages": {HEALTH: {"value": 100}},
                "headers": PING,
            },
        },
        *admission,
        {
            "name": "admitted",  # from here on the request belongs to a token, and to the log of requests
            "typed_config": {
                "@type": f"{FILTERS}set_metadata.v3.Config",
                "metadata": [{"metadata_namespace": "door", "value": {"admitted": True}}],
            },
        },
        {
            # Reads a body whose length is too large to its end, keeps nothing, and only then answers: a client that is
            # still sending sees a broken connection or stream instead of the answer.
            # (The filter has no cluster to find healthy, and answers 503; the local replies make that 413.)
            "name": "too_large",
            "typed_config": {
                "@type": f"{FILTERS}health_check.v3.HealthCheck",
                "pass_through_mode": False,
                "cluster_min_healthy_percentages": {"none": {"value": 100}},
                "headers": [too_large(max_body)],
            },
        },
        {
            # TorchServe gets complete requests only: a slow client occupies no worker.
            "name": "envoy.filters.http.buffer",
            # (Lua reads unary answers over gRPC as a whole, within the same limit.)
            "typed_config": {
                "@type": f"{FILTERS}buffer.v3.Buffer",
                "max_request_bytes": max(max_body, ANSWER_BYTES),
            },
        },
        {
            "name": "envoy.filters.http.json_to_metadata",
            "disabled": True,  # except for /feedback
            "typed_config": {
                "@type": f"{FILTERS}json_to_metadata.v3.JsonToMetadata",
                "request_rules": {"rules": [_feedback_field(key) for key in ("request_id", "score")]},
            },
        },
        {"name": UNPACK, "disabled": True, "typed_config": _lua("unpack.lua", MAX_BODY=max_body, RATIO=INFLATE_RATIO)},
        {
            "name": INFLATE,
            "disabled": True,  # except for calls over gRPC
            "typed_config": {
                "@type": f"{FILTERS}decompressor.v3.Decompressor",
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
        *([GRPC_BRIDGE] if direct else []),
        {"name": "envoy.filters.http.router", "typed_config": _router()},
    ]


def tokens_filters(folder: Path, key_set: str) -> list[Resource]:
    """Admits whoever has a token that was issued, as often as its rate allows."""
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
            "name": "envoy.filters.http.jwt_authn",
            "typed_config": {
                "@type": f"{FILTERS}jwt_authn.v3.JwtAuthentication",
                "providers": {"tokens": provider},
                "rules": [needs_token],
            },
        },
        {
            "name": TOKENS_FILTER,
            "config_discovery": {
                "config_source": from_file(folder / ACCEPTED),
                "type_urls": [f"{TYPES}{TOKENS_KIND}"],
            },
        },
        {
            "name": "envoy.filters.http.local_ratelimit",
            "typed_config": {"@type": f"{FILTERS}local_ratelimit.v3.LocalRateLimit", "stat_prefix": "front_door"},
        },
    ]


def key_filters(key: str) -> list[Resource]:
    """Admits whoever has the key of the host's own ports, as TorchServe does; `Ping` needs none."""
    has_key = {"header": {"name": "authorization", "string_match": {"exact": f"Bearer {key}"}}}
    health = [{"url_path": {"path": {"exact": path}}} for path in (f"{GRPC}Ping", HEALTH_CHECK)]
    policies = {
        "key": {"permissions": [{"any": True}], "principals": [has_key]},
        "health": {"permissions": health, "principals": [{"any": True}]},
    }
    rules = {"action": "ALLOW", "policies": policies}
    return [{"name": "key", "typed_config": {"@type": f"{TYPES}{TOKENS_KIND}", "rules": rules}}]


def too_large(max_body: int) -> Resource:
    return {"name": "content-length", "range_match": {"start": max_body + 1, "end": 2**62}}


def _lua(name: str, **numbers: int) -> Resource:
    known = "".join(f"local {name} = {number}\n" for name, number in numbers.items())
    return {"@type": f"{FILTERS}lua.v3.Lua", "default_source_code": {"inline_string": known + script(name)}}


def _feedback_field(key: str) -> Resource:
    return {"selectors": [{"key": key}], "on_present": {"metadata_namespace": "feedback", "key": key}}


def _router() -> Resource:
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
        "@type": f"{FILTERS}router.v3.Router",
        "suppress_envoy_headers": True,
        "upstream_log": [
            stats("tries", counters=[counter]),
            {"filter": any_of(has_status(399, "LE"), has_status(500, "GE")), **stats("tries", histograms=[answered])},
            {"filter": any_of(has_status(0), has_status(408)), **stats("tries", histograms=[waited])},
        ],
    }
