"""Envoy's static configuration: the front door's listener and that of its metrics; the direct host's own ports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torchserve_dag.front_door.access_logs import access_logs
from torchserve_dag.front_door.backend import GATEWAY, MODELS, Resource, overwrite
from torchserve_dag.front_door.dynamic_files import CERTIFICATE, CLUSTERS, ROUTES, from_file
from torchserve_dag.front_door.envoy_config import FROM_PORT, HOST, TO_GATEWAY, TYPES
from torchserve_dag.front_door.http_filters import FILTERS, GRPC_BRIDGE, http_filters, key_filters, tokens_filters
from torchserve_dag.front_door.local_replies import REVOKED, WRONG_KEY, Refusal, local_replies
from torchserve_dag.front_door.overload import overload_manager
from torchserve_dag.front_door.settings import MAX_HEADERS, FrontDoor, Limits
from torchserve_dag.server.ports import Addresses, host_and_port

ADMIN = "admin.sock"
"""The socket of the admin interface, relative to Envoy's working directory: an absolute path may be too long."""
UNREAD_BYTES = 64 * 2**20
"""What a client may leave unread of an answer. It is held here, where the largest stream can be reset, and not in
TorchServe, which keeps everything that Envoy does not take and ends when its heap is full."""
MANAGEMENT_S = 900
"""How long a management call may take, in seconds: it may wait until a model is loaded."""
GATEWAY_VERSIONS = 4
"""The gateway has room for the requests of so many versions at their limits."""
CONNECTION_WINDOW = 2**20
"""What may be on its way to Envoy over one HTTP/2 connection."""
BUCKETS_US = [round(1000 * 1.15**i) for i in range(-8, 84)]
"""Upper bounds of the histogram of durations, 15 % apart: from 0.3 ms to 2 minutes."""

_LISTENER_HTTP = f"{TYPES}extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"


@dataclass(frozen=True, slots=True)
class HostPorts:
    """The direct host's own ports, as TorchServe has them: plain, for who is on the machine and has the key."""

    where: Addresses
    key: str
    """The inference key of `key_file.json`; the keeper checks the management key."""
    access_log: bool = False
    """Whether requests to them are logged, as those to the front door always are."""


def bootstrap(
    door: FrontDoor,
    folder: Path,
    logs: Path,
    key_set: str,
    max_body: int,
    own: HostPorts | None = None,
    *,
    tls: bool = True,
) -> Resource:
    """The bootstrap configuration. Envoy reads from `folder` and writes to `logs`; `max_body` is in bytes.

    `own` are the ports of the direct host; without `tls` there are no others.
    """

    def http(admission: list[Resource], refusal: Refusal, *, logged: bool, trusted: bool = False) -> Resource:
        filters = http_filters(admission, max_body, direct=own is not None)
        replies = local_replies(door.limits, max_body, refusal)
        log = access_logs(folder, logs) if logged else []
        return _http(door.limits, folder, filters, replies, log, trusted=trusted)

    listeners = [_models_listener(http([], REVOKED, logged=True, trusted=True))]
    if tls:
        listeners += [
            _listener(door, folder, http(tokens_filters(folder, key_set), REVOKED, logged=True)),
            _metrics_listener(door),
        ]
    if own:
        config = http(key_filters(own.key), WRONG_KEY, logged=own.access_log)
        where = own.where
        listeners += [
            _plain_listener("inference", where.inference, config),
            _plain_listener("grpc_inference", where.grpc_inference, config),
            _plain_listener("management", where.management, _to_keeper("/")),
            _plain_listener("grpc_management", where.grpc_management, _to_keeper("/")),
            _plain_listener("host_metrics", where.metrics, _to_keeper("/metrics")),
        ]
    return {
        "admin": {"address": {"pipe": {"path": ADMIN, "mode": 0o600}}},
        "node": {"id": "front-door", "cluster": "torchserve-dag"},
        "dynamic_resources": {"cds_config": from_file(folder / CLUSTERS)},
        "static_resources": {"clusters": [_admin_cluster(), _gateway_cluster(door.limits)], "listeners": listeners},
        "stats_flush_interval": "0.5s",  # histograms lag behind by up to this interval
        "stats_config": {
            "histogram_bucket_settings": [
                {"match": {"contains": "given_up_ms"}, "buckets": [bound / 1000 for bound in BUCKETS_US]},
                {"match": {"contains": "tries"}, "buckets": BUCKETS_US},
            ],
        },
        "overload_manager": overload_manager(door.limits),
    }


def _listener(door: FrontDoor, folder: Path, config: Resource) -> Resource:
    certificate = {"name": "certificate", "sds_config": from_file(folder / CERTIFICATE)}
    tls = {
        "@type": f"{TYPES}extensions.transport_sockets.tls.v3.DownstreamTlsContext",
        "common_tls_context": {
            "alpn_protocols": ["h2", "http/1.1"],
            "tls_params": {"tls_minimum_protocol_version": "TLSv1_2"},
            "tls_certificate_sds_secret_configs": [certificate],
        },
    }
    listener = _plain_listener("front_door", door.listen, config)
    listener["filter_chains"][0] |= {
        "transport_socket": {"name": "tls", "typed_config": tls},
        "transport_socket_connect_timeout": f"{door.limits.headers_s}s",
    }
    return listener


def _plain_listener(name: str, address: str, config: Resource) -> Resource:
    return {
        "name": name,
        "address": _listening(address),
        "traffic_direction": "INBOUND",
        "per_connection_buffer_limit_bytes": UNREAD_BYTES,
        "filter_chains": [{"filters": [{"name": "http", "typed_config": config}]}],
    }


def _models_listener(config: Resource) -> Resource:
    """Where the gateway calls models: a socket that the owner only may use. It goes on while the others drain."""
    return {
        "name": "models",
        "address": {"pipe": {"path": MODELS, "mode": 0o600}},
        "filter_chains": [{"filters": [{"name": "http", "typed_config": config}]}],
    }


def _to_keeper(path: str) -> Resource:
    """Passes on what begins with this path: the keeper of the direct host answers it."""
    route = {
        "match": {"prefix": path},
        "route": {"cluster": f"rest:{HOST}", "timeout": f"{MANAGEMENT_S}s"},
        "request_headers_to_add": [overwrite(FROM_PORT, "true")],
    }
    router = {"name": "envoy.filters.http.router", "typed_config": {"@type": f"{FILTERS}router.v3.Router"}}
    return {
        "@type": _LISTENER_HTTP,
        "stat_prefix": "management",
        "stream_idle_timeout": f"{MANAGEMENT_S}s",
        "route_config": {
            "virtual_hosts": [{"name": "keeper", "domains": ["*"], "routes": [route]}],
            "validate_clusters": False,  # the cluster is among those that change
        },
        "http_filters": [GRPC_BRIDGE, router],
    }


def _http(
    limits: Limits,
    folder: Path,
    filters: list[Resource],
    replies: Resource,
    logged: list[Resource],
    *,
    trusted: bool,
) -> Resource:
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
        "early_header_mutation_extensions": [_without_internal_headers(trusted=trusted)],
        "rds": {"route_config_name": "routes", "config_source": from_file(folder / ROUTES)},
        "http_filters": filters,
        "access_log": logged,
        "local_reply_config": replies,
    }


def _without_internal_headers(*, trusted: bool) -> Resource:
    """No client says what the front door says, or asks a worker for what TorchServe's management asks it.

    The gateway is `trusted` to say whose request it is.
    """
    names = ("model", "version", "rest", "first", "inflated", *(() if trusted else ("token",)))
    ours = [f"x-door-{name}" for name in names]
    removed = [{"remove": name} for name in (*ours, "describe", "explain")]
    return {
        "name": "envoy.http.early_header_mutation.header_mutation",
        "typed_config": {
            "@type": f"{TYPES}extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation",
            "mutations": removed,
        },
    }


def _listening(address: str) -> Resource:
    host, port = host_and_port(address)
    both = {"ipv4_compat": True} if host == "::" else {}  # as other servers do: `::` is every address of the machine
    return {"socket_address": {"address": host, "port_value": port, **both}}


def _metrics_listener(door: FrontDoor) -> Resource:
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
            {"name": "envoy.filters.http.router", "typed_config": {"@type": f"{FILTERS}router.v3.Router"}}
        ],
    }
    return {
        "name": "metrics",
        "address": _listening(door.metrics),
        "filter_chains": [{"filters": [{"name": "http", "typed_config": http}]}],
    }


def _admin_cluster() -> Resource:
    return _socket_cluster("admin", ADMIN)


def _gateway_cluster(limits: Limits) -> Resource:
    """The gateway, which passes requests for any version on: what is too much for one is refused there."""
    most = GATEWAY_VERSIONS * limits.requests
    bounds = {"max_connections": 2 * most, "max_pending_requests": most, "max_requests": most, "max_retries": most}
    return {**_socket_cluster(TO_GATEWAY, GATEWAY), "circuit_breakers": {"thresholds": [bounds]}}


def _socket_cluster(name: str, path: str) -> Resource:
    endpoint = {"endpoint": {"address": {"pipe": {"path": path}}}}
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "1s",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [endpoint]}]},
    }
