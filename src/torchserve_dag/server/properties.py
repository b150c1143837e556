"""TorchServe's `config.properties`, the project's or the default: read, and written with the changes of `up`."""

from __future__ import annotations

from collections.abc import Mapping
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

_LOGGING = "-Dlog4j.configurationFile="


def find(root: Path) -> Path:
    """The project's `config.properties`, or the default where it has none."""
    own = root / "config.properties"
    return own if own.is_file() else shipped("config.properties")


def read(path: Path) -> dict[str, str]:
    """The keys and values of a properties file. Raises ServerError."""
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise ServerError(f"{path} cannot be read: {error.strerror}.") from None
    return dict(pair for line in text.splitlines() if (pair := _pair(line)))


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
    lines += [line for line in source.read_text("utf-8").splitlines() if (_pair(line) or ("",))[0] not in after]
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


def _pair(line: str) -> tuple[str, str] | None:
    """A line's key and value, where TorchServe's parsers in Java and in Python agree."""
    line = line.strip()
    if line.startswith(("#", "!")) or "=" not in line:
        return None
    key, _, value = line.partition("=")
    return key.strip(), value.strip()


def _grpc(properties: Mapping[str, str], name: str, default: str) -> str:
    host, port = host_and_port(default)
    return f"{properties.get(f'grpc_{name}_address', host)}:{properties.get(f'grpc_{name}_port', port)}"
