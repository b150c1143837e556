"""TorchServe's `config.properties`, the project's or the default: read, and written with the changes of `up`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torchserve_dag.archives import atomic
from torchserve_dag.server.errors import ServerError
from torchserve_dag.server.ports import Addresses, host_and_port
from torchserve_dag.server.shipped import shipped

PATHS = (
    "workflow_store", "metrics_config", "plugins_path", "cpp_log_config",
    "keystore", "private_key_file", "certificate_file",
)  # fmt: skip
"""Keys whose values are paths relative to the project; TorchServe runs in another folder."""

MAX_BODY = 26_214_400
"""The largest body in bytes, as in the default `config.properties`, where the project's names none."""

_LOGGING = "-Dlog4j.configurationFile="


def find(root: Path) -> Path:
    """The project's `config.properties`, or the default where it has none."""
    own = root / "config.properties"
    return own if own.is_file() else shipped("config.properties")


@dataclass(frozen=True, slots=True)
class Property:
    """A key and its value. The value of several lines is joined, as Java joins them."""

    key: str
    value: str
    line: int
    """The number of its first line, from 1."""
    text: str
    """Its lines, as they are written."""


def entries(path: Path) -> list[Property]:
    """The keys of a properties file, in their order. Raises ServerError."""
    return [entry for entry in _logical(_text(path)) if entry.key]


def read(path: Path) -> dict[str, str]:
    """The keys and values of a properties file. Raises ServerError."""
    return {entry.key: entry.value for entry in entries(path)}


def max_body(properties: Mapping[str, str]) -> int:
    """The largest body of a request, in bytes. Raises ServerError."""
    value = properties.get("max_request_size", str(MAX_BODY))
    if not (value.isascii() and value.isdigit()):
        raise ServerError(f'max_request_size of config.properties is "{value}": write a whole number of bytes.')
    return int(value)


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ServerError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None


def addresses(properties: Mapping[str, str]) -> Addresses:
    """The addresses in these properties."""
    default = Addresses()
    return Addresses(
        inference=properties.get("inference_address", default.inference),
        management=properties.get("management_address", default.management),
        metrics=properties.get("metrics_address", default.metrics),
        grpc_inference=_grpc(properties, "inference", default.grpc_inference),
        grpc_management=_grpc(properties, "management", default.grpc_management),
    )


def listening_at(where: Addresses) -> dict[str, str]:
    """The properties for these addresses."""
    inference, management = host_and_port(where.grpc_inference), host_and_port(where.grpc_management)
    # TorchServe's gRPC takes addresses only, no names.
    return {
        "inference_address": where.inference,
        "management_address": where.management,
        "metrics_address": where.metrics,
        "grpc_inference_address": inference[0],
        "grpc_inference_port": str(inference[1]),
        "grpc_management_address": management[0],
        "grpc_management_port": str(management[1]),
    }


def write(source: Path, target: Path, changes: Mapping[str, str]) -> None:
    """Write `source` to `target` with `changes`; relative paths are resolved against `source`'s folder."""
    before = read(source)
    absolute = {key: str((source.parent / before[key]).resolve()) for key in PATHS if key in before}
    after = {**absolute, **changes}
    lines = [f"# Written by torchserve-dag from {source}: edit that file."]
    lines += [entry.text for entry in _logical(_text(source)) if entry.key not in after]
    lines += [f"{key}={value}" for key, value in sorted(after.items())]
    atomic.write_private(target, "\n".join(lines) + "\n")
    _copy_logging(before.get("vmargs", ""), source.parent, target.parent)


def _copy_logging(vmargs: str, source: Path, target: Path) -> None:
    if source.samefile(target):
        return
    # Copied rather than named by an absolute path: TorchServe splits vmargs at blanks, which a path may contain.
    for argument in vmargs.split():
        name = Path(argument.removeprefix(_LOGGING))
        if argument.startswith(_LOGGING) and not name.is_absolute() and (source / name).is_file():
            atomic.write_private(target / name, (source / name).read_text("utf-8"))


def _logical(text: str) -> list[Property]:
    """Every key, and as entries without a key the lines between them. A backslash at a line's end joins the next."""
    logical: list[Property] = []
    lines = iter(enumerate(text.splitlines(), 1))
    for number, line in lines:
        joined, raw = line.strip(), [line]
        if joined.startswith(("#", "!")) or not joined:
            logical.append(Property("", "", number, line))
            continue
        while re.search(r"(?<!\\)(\\\\)*\\$", joined):
            _, more = next(lines, (0, ""))
            joined, raw = joined[:-1] + more.strip(), [*raw, more]
        key, _, value = joined.partition("=")
        logical.append(Property(key.strip(), value.strip(), number, "\n".join(raw)))
    return logical


def _grpc(properties: Mapping[str, str], name: str, default: str) -> str:
    host, port = host_and_port(default)
    return f"{properties.get(f'grpc_{name}_address', host)}:{properties.get(f'grpc_{name}_port', port)}"
