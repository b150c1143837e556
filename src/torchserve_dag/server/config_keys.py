"""The keys of `config.properties`: what `up` does with each, and which values it refuses before anything starts.

The keys are those of TorchServe 0.12.0 (`ConfigManager.java`), its last release.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from torchserve_dag.runtime.data.source import Problem
from torchserve_dag.server.properties import Property, entries

_PASSED = "passed on to TorchServe"
_AT_LOOPBACK = "where TorchServe listens: plain HTTP, at loopback only where there is a front door"


@dataclass(frozen=True, slots=True)
class Key:
    """What is done with a key."""

    what: str = _PASSED
    refuse: Callable[[str], str | None] = lambda _: None
    """Why a value is refused, and what to write instead; None for a good one."""


def _number(value: str) -> str | None:
    return None if value.isascii() and value.isdigit() else f'"{value}" is not a whole number'


def _switch(value: str) -> str | None:
    return None if value.lower() in {"true", "false"} else f'"{value}" is neither true nor false'


def _off(why: str) -> Callable[[str], str | None]:
    """Refuses every value but `false`."""
    return lambda value: _switch(value) or (why if value.lower() == "true" else None)


def _never(why: str) -> Callable[[str], str | None]:
    return lambda _: why


def _address(value: str) -> str | None:
    example = "write it like http://127.0.0.1:8080"
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError:
        return f'"{value}" is not an address with a port: {example}'
    if parts.scheme == "https":
        return "up starts TorchServe in plain HTTP: write http:// here, and name the certificate in front_door.yaml"
    if parts.scheme != "http" or not parts.hostname or not port:
        return f'"{value}" is not an address with a port: {example}'
    if ":" in parts.hostname:
        return f"TorchServe does not read addresses of IPv6: {example}"
    return None


def _host(value: str) -> str | None:
    return f"TorchServe does not read addresses of IPv6: write 127.0.0.1, not {value}" if ":" in value else None


_CORS = "it has no effect at the front door, where clients are: delete it, and let browsers ask a server of your own"
_NO_TLS = "up starts TorchServe in plain, behind the front door, which has TLS: delete it"
_OWN_LOG = "TorchServe writes it itself: delete it"

_ADDRESS, _HOST = Key(_AT_LOOPBACK, _address), Key(_AT_LOOPBACK, _host)
_PORT, _NUMBER, _SWITCH = Key(_AT_LOOPBACK, _number), Key(refuse=_number), Key(refuse=_switch)

KEYS: Mapping[str, Key] = {
    **dict.fromkeys(("inference_address", "management_address", "metrics_address"), _ADDRESS),
    **dict.fromkeys(("grpc_inference_address", "grpc_management_address"), _HOST),
    **dict.fromkeys(("grpc_inference_port", "grpc_management_port"), _PORT),
    "model_store": Key("the folder of archives; `up --store` overrides it. TorchServe serves from copies of them"),
    "load_models": Key("`all`, or the files of the store that may be served; `releases.yaml` decides among them"),
    "enable_model_api": Key("`up` turns it on, at loopback, for `serve` and `rollout`", _switch),
    "disable_token_authorization": Key(
        "only `false`", _off("every user of this machine could call all models: write false, or delete it")
    ),
    "token_expiration_min": Key("`up` makes it a year: a running server does not renew its tokens", _number),
    "enable_envvars_config": Key(
        "only `false`",
        _off("TS_ variables of the environment could open other addresses than these: write false, and set the keys"),
    ),
    **dict.fromkeys(
        ("cors_allowed_origin", "cors_allowed_methods", "cors_allowed_headers"), Key("refused", _never(_CORS))
    ),
    **dict.fromkeys(
        ("keystore", "keystore_pass", "keystore_type", "certificate_file", "private_key_file"),
        Key("refused", _never(_NO_TLS)),
    ),
    "enable_grpc_ssl": Key("only `false`", _off(_NO_TLS)),
    "model_snapshot": Key("refused", _never(_OWN_LOG)),
    **dict.fromkeys(
        (
            "default_workers_per_model", "default_response_timeout", "default_startup_timeout",
            "unregister_model_timeout", "job_queue_size", "max_request_size", "max_response_size",
            "limit_max_image_pixels", "number_of_gpu", "number_of_netty_threads", "netty_client_threads", "io_ratio",
            "initial_worker_port", "initial_distribution_port", "metric_time_interval",
            "grpc_inference_max_connection_age_ms", "grpc_inference_max_connection_age_grace_ms",
            "grpc_management_max_connection_age_ms", "grpc_management_max_connection_age_grace_ms",
        ),
        _NUMBER,
    ),
    **dict.fromkeys(
        (
            "install_py_dep_per_model", "decode_input_request", "prefer_direct_buffer", "use_native_io",
            "use_env_allowed_urls", "enable_metrics_api", "disable_system_metrics", "model_metrics_auto_detect",
            "async_logging", "debug", "cpu_launcher_enable", "ipex_enable", "ipex_gpu_enable",
        ),
        _SWITCH,
    ),
    **dict.fromkeys(
        (
            "allowed_urls", "models", "workflow_store", "metrics_config", "metrics_mode", "plugins_path",
            "cpp_log_config", "cpu_launcher_args", "python", "vmargs", "version", "default_service_handler",
            "service_envelope", "model_server_home", "blacklist_env_vars", "system_metrics_cmd",
            "ts_open_inference_protocol", "torchelastic_ts", "ts_header_key_sequence_id", "ts_request_sequence_id",
            "ts_header_key_sequence_start", "ts_request_sequence_start", "ts_header_key_sequence_end",
            "ts_request_sequence_end",
        ),
        Key(),
    ),
}  # fmt: skip
"""Every key that TorchServe reads."""


DIRECT: Mapping[str, str] = {
    **dict.fromkeys(
        ("inference_address", "management_address", "metrics_address"), "Envoy listens there, in plain, for REST"
    ),
    **dict.fromkeys(
        (
            "grpc_inference_address", "grpc_inference_port", "grpc_management_address", "grpc_management_port",
        ),
        "Envoy listens there, in plain, for gRPC",
    ),
    "model_store": "the folder of archives; `up --store` overrides it",
    "load_models": "`all`, or the files of the store that may be served",
    "enable_model_api": "`false`: the management ports register and unregister nothing; our own commands do",
    "default_workers_per_model": "for an archive that names no `minWorkers`",
    "default_response_timeout": "for an archive that names no `responseTimeout`, in seconds",
    "default_startup_timeout": "for an archive that names no `startupTimeout`, in seconds",
    "job_queue_size": "for an archive that names no `jobQueueSize`",
    "decode_input_request": "`true`: the handler of an unedited archive gets JSON and texts decoded",
    "max_request_size": "the largest body, in bytes; a larger one is refused with 413",
    "number_of_gpu": "how many GPUs the workers share",
}  # fmt: skip
"""What the direct host does with keys; it leaves out all others, which are TorchServe's own."""


def problems(path: Path) -> list[Problem]:
    """What `up` refuses in a properties file, with its line. Raises ServerError if the file cannot be read."""
    found, ports = [], dict[str, str]()
    for entry in entries(path):
        if why := _refused(entry):
            found.append(Problem(str(path), entry.line, f"{entry.key}: {why}"))
        elif port := _port_of(entry):
            if port in ports:
                found.append(Problem(str(path), entry.line, f"{entry.key}: {ports[port]} has port {port} already"))
            ports.setdefault(port, entry.key)
    return found


def _refused(entry: Property) -> str | None:
    key = KEYS.get(entry.key)
    if key:
        return key.refuse(entry.value)
    near = difflib.get_close_matches(entry.key, KEYS, 1)
    return f"TorchServe has no such key: {f'did you mean {near[0]}?' if near else 'delete it'}"


def _port_of(entry: Property) -> str | None:
    if entry.key.endswith("_port") and entry.key.startswith("grpc_"):
        return entry.value
    if entry.key.endswith("_address") and not entry.key.startswith("grpc_"):
        return str(urlsplit(entry.value).port)
    return None
