"""What Envoy may use of the machine, and what it gives up first where that is short."""

from __future__ import annotations

import resource

from torchserve_dag.front_door.backend import Resource
from torchserve_dag.front_door.envoy_config import TYPES
from torchserve_dag.front_door.settings import Limits

HEAP_BYTES = 2 * 2**30
"""What Envoy may use: from 70 % of it the largest streams are reset, and near it nothing new is taken."""
TRACKED_POWER = 18
"""Streams that hold 2^18 bytes (256 KiB) or more are counted by size, and may be reset."""
SPARE_FILES = 1024
"""File descriptors reserved for connections to TorchServe and for logs."""
IDLE_UNDER_PRESSURE = {"CONNECTION_IDLE": "1s", "STREAM_FLUSH": "1s", "STREAM_IDLE": "5s"}
"""How long a client that neither sends nor reads is waited for when memory is short: without a request in progress
(over HTTP/1.1, also one whose answer is here as a whole), with such an answer over HTTP/2, with a request."""

_HEAP = "envoy.resource_monitors.fixed_heap"


def connections(limits: Limits) -> int:
    """How many connections of clients the front door takes: the files that are left to it may be fewer."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(limits.connections, max(files - SPARE_FILES, files // 2))


def overload_manager(limits: Limits) -> Resource:
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
            {"timer": f"HTTP_DOWNSTREAM_{timer}", "min_timeout": least} for timer, least in IDLE_UNDER_PRESSURE.items()
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


def _at(action: str, part: float, kind: str = "overload_actions") -> Resource:
    trigger = {"name": _HEAP, "threshold": {"value": part}}
    return {"name": f"envoy.{kind}.{action}", "triggers": [trigger]}


def _from(action: str, begins: float, whole: float) -> Resource:
    trigger = {"name": _HEAP, "scaled": {"scaling_threshold": begins, "saturation_threshold": whole}}
    return {"name": f"envoy.overload_actions.{action}", "triggers": [trigger]}
