"""Edit a model's weights in `routes.yaml`; all other lines and comments stay as they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import yaml

from torchserve_dag.archives import atomic
from torchserve_dag.front_door.routes_file import FILE
from torchserve_dag.server.errors import ServerError


def write(root: Path, model: str, weights: Mapping[str, float]) -> None:
    """Raises ServerError if the edited file would differ in anything but these weights."""
    path = root / FILE
    atomic.write_text(path, changed(path.read_text("utf-8"), model, weights))


def check(root: Path, model: str) -> None:
    """Raises ServerError if `write` would fail."""
    changed((root / FILE).read_text("utf-8"), model, {"1.0": 1})


def changed(text: str, model: str, weights: Mapping[str, float]) -> str:
    """The file's text with the new weights."""
    refused = ServerError(f"{FILE} cannot be edited at versions: of {model}: write there what is served now.")
    try:
        versions = _value(_value(yaml.compose(text, Loader=yaml.SafeLoader), model), "versions")
        if not isinstance(versions, yaml.MappingNode) or not versions.value:
            raise refused
        end = versions.end_mark if versions.flow_style else versions.value[-1][1].end_mark
        shares = ", ".join(f"{json.dumps(version)}: {weight:g}" for version, weight in weights.items())
        after = f"{text[: versions.start_mark.index]}{{{shares}}}{text[end.index :]}"
        wanted = yaml.safe_load(text)
        wanted[model]["versions"] = dict(weights)
        same = yaml.safe_load(after) == wanted
    except yaml.YAMLError:
        raise refused from None
    if not same:
        raise refused
    return after


def _value(node: yaml.Node | None, key: str) -> yaml.Node | None:
    if not isinstance(node, yaml.MappingNode):
        return None
    return next((value for name, value in node.value if name.value == key), None)
