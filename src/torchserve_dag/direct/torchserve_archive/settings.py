"""What an archive's manifest and its `model-config.yaml` say, as TorchServe 0.12.0 reads them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from torchserve_dag.runtime.compat.archive import MANIFEST
from torchserve_dag.runtime.data import unzip

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ArchiveSettings:
    """The defaults are TorchServe's own."""

    name: str
    version: str
    handler: str
    """The module that is loaded; `MODULE:FUNCTION` for another function than `handle`."""
    requirements: str | None
    """The archive's file with the packages that it needs."""
    on_cpu: bool
    """Whether the model stays on the CPU of a machine that has a GPU."""
    batch: int = 1
    """The most requests of a batch."""
    delay_s: float = 0.1
    """How long the first request of a batch waits for others."""
    queue: int = 100
    """How many requests wait at most; one more is refused."""
    timeout_s: float = 120
    """How long a batch may take. So no request may take longer."""


def read_settings(folder: Path) -> ArchiveSettings:
    """Raises ValueError for an archive that cannot be read, or that needs what the direct host does not have."""
    manifest = _mapping(folder, MANIFEST, json.loads)
    model = manifest.get("model")
    if not isinstance(model, Mapping):
        raise ValueError(f'{MANIFEST} names no "model".')  # noqa: TRY004 (what is wrong is a file)
    name, version, handler = (_text(model, key) for key in ("modelName", "modelVersion", "handler"))
    file = model.get("configFile")
    config = _mapping(folder, str(file), yaml.safe_load) if file else {}
    if why := _needs(manifest, model, config):
        raise ValueError(f"{name} {version} has {why}, which the direct host does not do: let TorchServe serve it.")
    if config.get("useJobTicket") is True:
        logger.warning("%s %s: useJobTicket has no effect here: requests wait in the queue", name, version)
    numbers = {
        "batch": _whole(config, "batchSize"),
        "delay_s": _whole(config, "maxBatchDelay") / 1000,
        "queue": _whole(config, "jobQueueSize") or _of_all("TS_JOB_QUEUE_SIZE"),
        "timeout_s": _whole(config, "responseTimeout") or _of_all("TS_DEFAULT_RESPONSE_TIMEOUT"),
    }
    given: dict[str, Any] = {key: number for key, number in numbers.items() if number}
    on_cpu = config.get("deviceType") == "cpu"
    return ArchiveSettings(name, version, handler, model.get("requirementsFile"), on_cpu, **given)


def _of_all(name: str) -> int:
    """A setting of the server, in the environment as TorchServe has it; 0 if there is none."""
    value = os.environ.get(name, "")
    return int(value) if value.isdigit() else 0


def _mapping(folder: Path, name: str, parse: Any) -> Mapping[str, Any]:
    """A file of the archive. Raises ValueError."""
    try:
        path = unzip.inside(folder, name)
        content = parse(path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"{folder} holds no {name} that can be read: {error.strerror or error}.") from None
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{name} cannot be read: {error}") from None
    if content is None:  # an empty file of YAML
        return {}
    if not isinstance(content, Mapping):
        raise ValueError(f"{name} is not a mapping.")  # noqa: TRY004 (what is wrong is a file)
    return content


def _text(model: Mapping[str, Any], key: str) -> str:
    value = model.get(key)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{MANIFEST} names no model.{key}.")
    return value


def _needs(manifest: Mapping[str, Any], model: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    """What an archive needs that only TorchServe has: other ways to hand over requests, and to start workers."""
    for key in ("asyncCommunication", "continuousBatching", "sequenceBatching"):
        if config.get(key) is True:
            return f"{key}: true in its {model['configFile']}"
    if config.get("parallelType") and (config.get("torchrun") or config.get("parallelLevel")):
        return f"parallelType: {config['parallelType']} in its {model['configFile']}"
    if manifest.get("runtime") == "LSP":
        return 'the runtime "LSP", which is C++, in its manifest'
    if model.get("envelope"):
        return f'the envelope "{model["envelope"]}" in its manifest'
    return None


def _whole(config: Mapping[str, Any], key: str) -> int:
    """A number over 0; for any other value 0, and TorchServe's default then applies, as it does there."""
    value = config.get(key, 0)
    if type(value) is not int or value < 0:
        logger.warning('%s: "%s" is not a whole number, and the default applies', key, value)
        return 0
    return value
