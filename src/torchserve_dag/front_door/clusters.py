"""Envoy's clusters: one for each version and protocol, with its workers or TorchServe as endpoints."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from urllib.parse import quote

from torchserve_dag.front_door.backend import Backend, Resource, overwrite
from torchserve_dag.front_door.envoy_config import (
    GUARDED,
    HOST,
    PROTOCOLS,
    STANDS_IN,
    TYPES,
    cluster_name,
    script,
    seconds,
    stat_name,
)
from torchserve_dag.front_door.settings import Limits
from torchserve_dag.front_door.splits import ServedVersion, Split
from torchserve_dag.runtime.data.media import FORM_AS_SENT

EJECT_AFTER = 10
"""Consecutive failures after which a version that has a fallback is ejected for EJECT_S seconds."""
EJECT_S = 5


def clusters(
    served: Iterable[ServedVersion],
    splits: Sequence[Split],
    backend: Backend,
    limits: Limits,
    resting: Collection[tuple[str, str]] = (),
) -> list[Resource]:
    """A cluster for each version and protocol.

    Those of the models and versions that are `resting` have no address, and so answer 503 at once.
    """
    by_model = {split.model: split for split in splits}
    resources = []
    for one in served:
        split = by_model.get(one.model)
        for protocol in PROTOCOLS:
            own = [_version_cluster(one, protocol, backend, limits)]
            if split and split.falls_back(one.version):
                own.append(_guarded_cluster(one, protocol, backend, limits, split))
            if split and one.version == split.fallback:
                own += [
                    _version_cluster(one, protocol, backend, limits, STANDS_IN + out, stands_in_for=out)
                    for out in sorted(split.ejected)
                ]
            if (one.model, one.version) in resting:
                for cluster in own:
                    cluster["load_assignment"]["endpoints"] = []
            resources += own
    resources += [_cluster(f"{protocol}:{HOST}", protocol, backend, limits.requests, None) for protocol in PROTOCOLS]
    resources[-2]["health_checks"] = [_health_check(backend)]
    return resources


def _cluster(name: str, protocol: str, backend: Backend, requests: int, version: str | None) -> Resource:
    http2 = protocol == "grpc" and not backend.direct
    options: Resource = {"http2_protocol_options": {}} if http2 else {"http_protocol_options": {}}
    return {
        "@type": f"{TYPES}config.cluster.v3.Cluster",
        "name": name,
        "alt_stat_name": stat_name(name),
        "type": "STATIC",
        "connect_timeout": "1s",
        "lb_policy": "LEAST_REQUEST",
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": endpoints}] if (endpoints := backend.endpoints(protocol, version)) else [],
        },
        # More connections than requests, so that over HTTP/1.1 too one request too many is refused instead of waiting.
        "circuit_breakers": {
            "thresholds": [
                {
                    "max_connections": 2 * requests,
                    "max_pending_requests": requests,
                    "max_requests": requests,
                    "max_retries": requests,
                }
            ]
        },
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": f"{TYPES}extensions.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": options,
            }
        },
    }


def _version_cluster(
    one: ServedVersion,
    protocol: str,
    backend: Backend,
    limits: Limits,
    suffix: str = "",
    stands_in_for: str | None = None,
) -> Resource:
    # The gateway reads no more of a stream than its client takes.
    requests = limits.streamed if one.streams and not one.language else limits.requests
    cluster = _cluster(cluster_name(protocol, one) + suffix, protocol, backend, requests, one.name)
    options = cluster["typed_extension_protocol_options"]["envoy.extensions.upstreams.http.v3.HttpProtocolOptions"]
    writes = _names_version(one, stands_in_for) if backend.direct else _writes_version(one, backend, stands_in_for)
    options["http_filters"] = [
        {"name": "version", "typed_config": writes},
        {
            "name": "envoy.filters.http.upstream_codec",
            "typed_config": {"@type": f"{TYPES}extensions.filters.http.upstream_codec.v3.UpstreamCodec"},
        },
    ]
    return cluster


def _guarded_cluster(one: ServedVersion, protocol: str, backend: Backend, limits: Limits, split: Split) -> Resource:
    """The cluster of a version with a fallback: if the version fails or is slow, Envoy retries at the fallback."""
    cluster = _version_cluster(one, protocol, backend, limits, GUARDED)
    options = cluster["typed_extension_protocol_options"]["envoy.extensions.upstreams.http.v3.HttpProtocolOptions"]
    options["retry_policy"] = {
        "retry_on": "5xx,reset,connect-failure,refused-stream",
        "num_retries": 1,
        "refresh_cluster_on_retry": True,
        "retry_back_off": {"base_interval": "0.001s", "max_interval": "0.002s"},
    }
    # Complete answers only. A route's per-attempt timeout would apply to the fallback too.
    if not one.streams:
        options["common_http_protocol_options"] = {"max_stream_duration": seconds(split.route.slow_s)}
    # A host alone still gets requests after its ejection (Envoy's panic threshold), until the keeper moves the share of
    # its version to the fallback.
    cluster["outlier_detection"] = {
        "consecutive_5xx": EJECT_AFTER,
        "interval": "1s",
        "base_ejection_time": f"{EJECT_S}s",
        "max_ejection_time": f"{EJECT_S}s",
        "max_ejection_percent": 100,
        "enforcing_success_rate": 0,
    }
    return cluster


def _names_version(one: ServedVersion, stands_in_for: str | None) -> Resource:
    """The filter that names the version in requests to the direct host's workers, and in their answers."""
    first = {"header": {"key": "x-door-first", "value": stands_in_for or one.version}, "append_action": "ADD_IF_ABSENT"}
    return {
        "@type": f"{TYPES}extensions.filters.http.header_mutation.v3.HeaderMutation",
        "mutations": {
            "request_mutations": [{"append": first}],
            # Envoy itself writes the request's id into the answer.
            "response_mutations": [{"append": overwrite("x-model-version", one.version)}, {"remove": "x-request-id"}],
        },
    }


def _writes_version(one: ServedVersion, backend: Backend, stands_in_for: str | None) -> Resource:
    """The filter that writes the version into requests for TorchServe, which serves them all at one address."""
    known = {
        "NAME": one.model,
        "VERSION": one.version,
        "PATH": f"/predictions/{quote(one.model, safe='')}/{quote(one.version, safe='')}",
        "MEANT": stands_in_for or one.version,
        "TOKEN": f"Bearer {backend.token}",
        "FORM_AS_SENT": FORM_AS_SENT,
    }
    lines = [f"local {name} = {json.dumps(value)}" for name, value in known.items()]
    lines.append(f"local OURS = {str(one.ours).lower()}")
    text = "\n".join([*lines, script("failure.lua"), script("version.lua")])
    return {
        "@type": f"{TYPES}extensions.filters.http.lua.v3.Lua",
        "default_source_code": {"inline_string": text},
    }


def _health_check(backend: Backend) -> Resource:
    """Envoy asks the host for its health once a second, whoever asks Envoy."""
    return {
        "timeout": "5s",
        "interval": "1s",
        "no_traffic_interval": "1s",
        "unhealthy_threshold": 3 if backend.direct else 1,  # a keeper that was killed is back within a second
        "healthy_threshold": 1,
        "http_health_check": {"path": "/ping", "request_headers_to_add": backend.authorization},
    }
