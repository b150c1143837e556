"""Envoy's routes, with the limits of tokens; words that its configuration has in common. The clusters: clusters.py."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from importlib.resources import files

from torchserve_dag.clients.models import version_key
from torchserve_dag.front_door.backend import Backend, Resource, overwrite
from torchserve_dag.front_door.splits import ServedVersion, Split
from torchserve_dag.front_door.tokens import Token
from torchserve_dag.runtime.data.options import ARRIVED, CANCEL, CANCEL_KEY
from torchserve_dag.runtime.data.options import TOKEN as TOKEN_NAME

TYPES = "type.googleapis.com/envoy."
PROTOCOLS = ("rest", "grpc")
GUARDED, STANDS_IN = "?", "!"
"""Suffixes of cluster names: GUARDED for a version with a fallback; STANDS_IN for the fallback in place of an ejected
version, whose name follows."""
MODEL, VERSION = "x-door-model", "x-door-version"
"""The headers that request.lua sets."""
TOKENS_FILTER = "tokens"
"""The name of the filter that admits the tokens that are issued."""
TOKENS_KIND = "extensions.filters.http.rbac.v3.RBAC"
GRPC = "/org.pytorch.serve.grpc.inference.InferenceAPIsService/"
CALLS = ("Predictions", "StreamPredictions")
OPEN_INFERENCE = "/inference.GRPCInferenceService/"
"""The Open Inference Protocol over gRPC; over REST it is at `/v2`. Both are the direct host's only."""
MODEL_CALLS = ("ModelInfer", "ModelReady", "ModelMetadata")
_OVER_GRPC = f"({re.escape(GRPC)}|{re.escape(OPEN_INFERENCE)}).*"
TO_GATEWAY = "gateway"
"""The cluster of the gateway, which answers all below V1."""
V1 = "/v1"
FEEDBACK = "/feedback"
HOST = "host"
HEALTH = f"rest:{HOST}"
"""The cluster whose health `/ping` tells."""
_PLAIN = re.compile(r"[\w.~+-]+", re.ASCII)
"""Names that need no escaping in a path."""
_PREDICTS: Resource = {"name": ":method", "string_match": {"safe_regex": {"regex": "GET|POST|PUT"}}}
FROM_PORT = "x-keeper-port"
"""The header of management calls that came to a port, and not to the keeper's own socket."""
HEALTH_CHECK = "/grpc.health.v1.Health/Check"
UNPACK, INFLATE = "unpack", "inflate"
"""The filters that decompress messages over gRPC."""

GRACE_S = 5.0
"""Added to TorchServe's timeout, so that TorchServe's own error comes first."""
NOT_FOUND, UNIMPLEMENTED, UNAVAILABLE = "5", "12", "14"
"""Statuses of gRPC."""
WHOLE = 1_000_000
"""The sum of the integer weights of a model's clusters."""
UNDELIVERED: Resource = {
    "retry_on": "connect-failure,refused-stream,reset-before-request",
    "num_retries": 1,
    "retry_host_predicate": [
        {
            "name": "envoy.retry_host_predicates.previous_hosts",
            "typed_config": {"@type": f"{TYPES}extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"},
        }
    ],
    "host_selection_retry_max_attempts": 3,
}
"""Retry once, at another worker if there is one, if nobody can have received the request."""


def routes(
    served: Sequence[ServedVersion],
    splits: Sequence[Split],
    tokens: Sequence[Token],
    backend: Backend,
    requests_per_second: int,
    *,
    closed: bool = False,
) -> Resource:
    """Every route, with the rate limits of the tokens; if `closed`, every request is answered 503."""
    routes_list = [*(_closed() if closed else []), _connect(), *_health(backend), _feedback(), _v1(served)]
    for split in splits:
        versions = [one for one in served if one.model == split.model]
        for protocol in PROTOCOLS:
            to_versions = [*(_named(one, protocol) for one in versions), *_shared(split, versions, protocol)]
            if backend.direct and protocol == "rest" and TOKEN_NAME not in split.route.headers:
                routes_list += _by_path(split.model, to_versions)
            routes_list += to_versions
        known = ", ".join(_names(versions))
        message = f"There is no such version of {split.model}; it has {known}."
        match = _match(split.model)
        routes_list.append(_refusal(match, "ModelVersionNotFoundException", message))
    message = "There is no model of that name."
    routes_list.append(_refusal({"prefix": "/predictions/"}, "ModelNotFoundException", message))
    for name in CALLS:
        call = _refusal({"path": GRPC + name}, "ModelNotFoundException", message)
        # The filters of a request are chosen before its model is known, so by this route.
        call["typed_per_filter_config"] = {name: _enabled() for name in (UNPACK, INFLATE)}
        routes_list.append(call)
    routes_list += _open_inference() if backend.direct else []
    message = "There is nothing here: ask /predictions/NAME or /predictions/NAME/VERSION."
    routes_list.append(_refusal({"prefix": "/"}, "ResourceNotFoundException", message, grpc_status=UNIMPLEMENTED))
    host = {
        "name": "models",
        "domains": ["*"],
        "routes": routes_list,
        "request_headers_to_add": [overwrite(ARRIVED, "%START_TIME(%s%3f)%")],
        "typed_per_filter_config": {
            "envoy.filters.http.local_ratelimit": _rate_limits(tokens, requests_per_second),
        },
    }
    return {"@type": f"{TYPES}config.route.v3.RouteConfiguration", "name": "routes", "virtual_hosts": [host]}


def _names(versions: Iterable[ServedVersion]) -> list[str]:
    return sorted((one.version for one in versions), key=version_key)


def cluster_name(protocol: str, version: ServedVersion | str) -> str:
    """The name of a version's cluster."""
    return f"{protocol}:{version if isinstance(version, str) else version.name}"


def stat_name(cluster: str) -> str:
    """A cluster's name in Envoy's metrics, in which a dot separates names; `1.0` and `1_0` stay two."""
    return cluster.replace(".", "~").replace(":", "_")


def script(name: str) -> str:
    """The text of a Lua file in this folder."""
    return files(__package__).joinpath(name).read_text("utf-8")


def _match(model: str, protocol: str | None = None, version: str | None = None) -> Resource:
    headers: list[Resource] = [{"name": MODEL, "string_match": {"exact": model}}]
    if version:
        headers.append({"name": VERSION, "string_match": {"exact": version}})
    if protocol:
        path = {"safe_regex": {"regex": _OVER_GRPC}}
        headers.append({"name": ":path", "string_match": path, "invert_match": protocol == "rest"})
    return {"prefix": "/", "headers": headers}


def _by_path(model: str, to_versions: Iterable[Resource]) -> list[Resource]:
    """The same routes for requests whose path names the model letter by letter: they are routed without request.lua.

    The script takes a sixth of the time that Envoy has for a request. For TorchServe it writes what version.lua reads.
    Without it the route is chosen before a filter has named the token, so no such route may depend on the token.
    """
    found = []
    for route in to_versions:
        conditions = {one["name"]: one for one in route["match"]["headers"]}
        version = conditions.pop(VERSION).get("string_match", {}).get("exact")
        named = {MODEL: model, VERSION: version} if version else {MODEL: model}
        if "route" not in route or not all(map(_PLAIN.fullmatch, named.values())):
            continue
        path = "/".join(["/predictions", *named.values()])
        others = [one for name, one in conditions.items() if name not in {MODEL, ":path"}]
        found.append(
            {
                **route,
                "match": {"path_separated_prefix" if version else "path": path, "headers": [*others, _PREDICTS]},
                "request_headers_to_add": [overwrite(name, value) for name, value in named.items()],
                "typed_per_filter_config": {"request": _disabled()},
            }
        )
    return found


def _named(one: ServedVersion, protocol: str) -> Resource:
    """The route to a version that the request names, without a fallback."""
    action = {"cluster": cluster_name(protocol, one), "retry_policy": UNDELIVERED}
    action |= _limits(one.timeout_s, streams=one.streams)
    return {"name": one.name, "match": _match(one.model, protocol, one.version), "route": action}


def _shared(split: Split, versions: Sequence[ServedVersion], protocol: str) -> list[Resource]:
    """The routes to versions that rules or weights choose."""
    longest = max(one.timeout_s for one in versions) + (split.route.slow_s if split.fallback else 0)
    limits = _limits(longest, streams=any(one.streams for one in versions))
    unnamed = _match(split.model, protocol)
    unnamed["headers"].append({"name": VERSION, "present_match": False})
    routes_list = []
    for header, value, version in split.route.rules:
        match = {**unnamed, "headers": [*unnamed["headers"], {"name": header, "string_match": {"exact": value}}]}
        action = _action(split, protocol, [(version, 1)], limits)
        routes_list.append({"name": f"{split.model} {header}={value}", "match": match, "route": action})
    if not split.weights:
        message = f"The default version of {split.model} is not served: name one of {', '.join(_names(versions))}."
        return [*routes_list, _refusal(unnamed, "ModelVersionNotFoundException", message, UNAVAILABLE, "503")]
    action = _action(split, protocol, split.weights, limits)
    # A cancellation must reach the version that has the request: both carry the same key.
    keys = [{"header": {"header_name": name}} for name in (CANCEL_KEY, CANCEL)]
    sticky = split.route.sticky_header
    action["hash_policy"] = [*([{"header": {"header_name": sticky}, "terminal": True}] if sticky else []), *keys]
    action["request_mirror_policies"] = [
        {
            "cluster": cluster_name(protocol, f"{split.model}/{version}"),
            "runtime_fraction": {"default_value": {"numerator": round(percent * 10_000), "denominator": "MILLION"}},
        }
        for version, percent in split.route.shadow.items()
    ]
    routes_list.append({"name": split.model, "match": unnamed, "route": action})
    return routes_list


def _action(split: Split, protocol: str, weights: Iterable[tuple[str, float]], limits: Resource) -> Resource:
    clusters = [{"cluster_name": _target(split, protocol, one), "weight": part} for one, part in _parts(weights)]
    groups = [{"name": "first", "clusters": clusters}]
    if split.fallback:
        last = {"cluster_name": _target(split, protocol, split.fallback), "weight": 1}
        groups.append({"name": "fallback", "clusters": [last]})
    specifier = {
        "@type": f"{TYPES}extensions.router.cluster_specifiers.priority_group.v3.PriorityGroupClusterSpecifier",
        "priority_groups": groups,
        "use_hash_policy": True,
    }
    action: Resource = {
        "inline_cluster_specifier_plugin": {
            "extension": {"name": "envoy.router.cluster_specifier_plugin.priority_group", "typed_config": specifier}
        },
        **limits,
    }
    if not split.fallback:
        action["retry_policy"] = UNDELIVERED
    return action


def _target(split: Split, protocol: str, version: str) -> str:
    """The cluster that gets the requests of a version: the fallback's while the version is ejected."""
    if split.fallback and version in split.ejected:
        return cluster_name(protocol, f"{split.model}/{split.fallback}") + STANDS_IN + version
    return cluster_name(protocol, f"{split.model}/{version}") + (GUARDED if split.falls_back(version) else "")


def _parts(weights: Iterable[tuple[str, float]]) -> list[tuple[str, int]]:
    """Weights as integers with a fixed sum, so that the hash of a sticky user keeps its position."""
    weights = [(version, weight) for version, weight in weights if weight > 0]
    whole, parts, below, end = sum(weight for _, weight in weights), [], 0.0, 0
    for version, weight in weights:
        below += weight
        begin, end = end, round(WHOLE * below / whole)
        if end > begin:
            parts.append((version, end - begin))
    return parts


def _limits(timeout_s: float, *, streams: bool) -> Resource:
    """A stream may take as long as it goes on: its worker has a limit of its own."""
    whole = "0s" if streams else seconds(timeout_s + GRACE_S)
    return {"timeout": whole, "idle_timeout": seconds(timeout_s + 2 * GRACE_S)}


def seconds(value: float) -> str:
    """A duration as Envoy writes it."""
    return f"{value:.3f}s"


def _refusal(match: Resource, kind: str, message: str, grpc_status: str = NOT_FOUND, status: str = "404") -> Resource:
    """A route on which request.lua refuses, with that status over either protocol."""
    refused = {"type": kind, "message": message, "grpc_status": grpc_status, "status": status}
    return {
        "match": match,
        "metadata": {"filter_metadata": {"request": {"refused": refused}}},
        "direct_response": {"status": int(status)},
    }


def _connect() -> Resource:
    """A route for CONNECT, which has no path: without one it would pass the filters to the end, and wait there."""
    return {"name": "connect", "match": {"connect_matcher": {}}, "direct_response": {"status": 501}}


def _enabled() -> Resource:
    return {"@type": f"{TYPES}config.route.v3.FilterConfig", "config": {}}


def _disabled() -> Resource:
    return {"@type": f"{TYPES}config.route.v3.FilterConfig", "disabled": True}


def _closed() -> list[Resource]:
    """A route that answers 503 while the host starts: TorchServe would refuse requests, or let them wait."""
    answer = {"status": 503, "body": {"inline_string": "the models are starting"}}
    return [{"name": "closed", "match": {"prefix": "/"}, "direct_response": answer}]


def _health(backend: Backend) -> list[Resource]:
    """The routes of calls over gRPC for the host's health."""
    paths = [f"{GRPC}Ping", *([HEALTH_CHECK] if backend.direct else [])]
    return [
        {
            "name": "ping",
            "match": {"path": path},
            "route": {"cluster": f"grpc:{HOST}", "timeout": "10s"},
            "request_headers_to_add": backend.authorization,
        }
        for path in paths
    ]


def _open_inference() -> list[Resource]:
    """The routes of calls that name no served model, which the keeper answers."""
    over_grpc = {"cluster": f"grpc:{HOST}", "timeout": "10s"}
    models = [
        {
            "match": {"path": OPEN_INFERENCE + name},
            "route": over_grpc,
            "typed_per_filter_config": {name: _enabled() for name in (UNPACK, INFLATE)},  # as for CALLS
        }
        for name in MODEL_CALLS
    ]
    rest = {"match": {"path_separated_prefix": "/v2"}, "route": {"cluster": f"rest:{HOST}", "timeout": "10s"}}
    return [*models, {"match": {"prefix": OPEN_INFERENCE}, "route": over_grpc}, rest]


def _v1(served: Sequence[ServedVersion]) -> Resource:
    """The route of OpenAI's API. Each answer may take as long as it goes on."""
    longest = max((one.timeout_s for one in served if one.language), default=0.0)
    idle = seconds(longest + 3 * GRACE_S)
    return {
        "name": "v1",
        "match": {"path_separated_prefix": V1},
        "route": {"cluster": TO_GATEWAY, "timeout": "0s", "idle_timeout": idle, "retry_policy": UNDELIVERED},
        "typed_per_filter_config": {"request": _disabled()},
    }


def _feedback() -> Resource:
    """The route for feedback: request.lua answers it, and the access log keeps it."""
    return {
        "name": "feedback",
        "match": {"path": FEEDBACK},
        "direct_response": {"status": 405},
        "typed_per_filter_config": {"envoy.filters.http.json_to_metadata": _enabled()},
    }


def _rate_limits(tokens: Sequence[Token], requests_per_second: int) -> Resource:
    """A token bucket for each token, with the capacity of one second, refilled ten times a second.

    Each is listed by name: Envoy discards buckets that it creates dynamically when there are many.
    """
    own = [
        {
            "entries": [{"key": "token", "value": token.name}],
            "token_bucket": _bucket(token.requests_per_second or requests_per_second),
        }
        for token in tokens
    ]
    always: Resource = {"default_value": {"numerator": 100, "denominator": "HUNDRED"}}
    return {
        "@type": f"{TYPES}extensions.filters.http.local_ratelimit.v3.LocalRateLimit",
        "stat_prefix": "front_door",
        "token_bucket": _bucket(1_000_000),
        "always_consume_default_token_bucket": False,
        "filter_enabled": always,
        "filter_enforced": always,
        "rate_limited_as_resource_exhausted": True,
        "rate_limits": [{"actions": [{"request_headers": {"header_name": TOKEN_NAME, "descriptor_key": "token"}}]}],
        "descriptors": own,
        "response_headers_to_add": [{"header": {"key": "retry-after", "value": "1"}}],
    }


def _bucket(per_second: int) -> Resource:
    tenth = max(1, per_second // 10)
    interval = "0.1s" if per_second >= 10 else f"{1 / per_second:.3f}s"  # noqa: PLR2004
    return {"max_tokens": max(1, per_second), "tokens_per_fill": tenth, "fill_interval": interval}
