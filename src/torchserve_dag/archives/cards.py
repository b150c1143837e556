"""The sha256 of weights, written into the cards that name them; a file's other lines and comments stay as they are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from torchserve_dag.archives import atomic
from torchserve_dag.runtime.data.source import CheckError, Problem, Source
from torchserve_dag.runtime.project.folders import Project, is_below
from torchserve_dag.runtime.project.handler_file import HandlerFile
from torchserve_dag.runtime.project.weight_files import sha256
from torchserve_dag.runtime.project.weight_sources import local_path


@dataclass(frozen=True, slots=True)
class Updated:
    """A card whose hash was missing, or not that of the weights on this machine."""

    file: str
    """The handler's YAML file."""
    weights: str
    sha256: str


def update(project: Project, handlers: Iterable[Source[HandlerFile]]) -> list[Updated]:
    """Write the sha256 of the weights that are here into the handlers' cards, where it differs or is missing.

    Raises CheckError where a file cannot be edited.
    """
    updated = []
    for source in {source.path: source for source in handlers}.values():  # several nodes may run one handler
        for i, weights in enumerate(source.value.card.weights):
            path = project.weights / weights.file
            if weights.fetch_from and not path.exists():
                path = local_path(weights.fetch_from) or path
            if not is_below(weights.file) or not path.exists():
                continue  # `build` will refuse it, with the reason
            digest = sha256(path)
            if digest != weights.sha256:
                _write(source.path, i, digest)
                updated.append(Updated(str(source.path), weights.file, digest))
    return updated


def _write(path: Path, number: int, digest: str) -> None:
    text = path.read_text("utf-8")
    data = yaml.safe_load(text)
    data["card"]["weights"][number]["sha256"] = digest
    edited = _edited(text, number, digest)
    try:
        same = yaml.safe_load(edited) == data
    except yaml.YAMLError:
        same = False
    if not same:  # an anchor or a merge key is where the hash belongs
        what = "the card's weights are written with anchors, which cannot be edited"
        raise CheckError([Problem(str(path), 1, what, f"write sha256: {digest} there")])
    atomic.write_text(path, edited)


def _edited(text: str, number: int, digest: str) -> str:
    """`text` with the sha256 of the card's weights `number` replaced, or added after `licence`."""
    card = _value(yaml.compose(text, Loader=yaml.SafeLoader), "card")
    weights = _value(card, "weights").value[number]
    keys = {key.value: (key, value) for key, value in weights.value}
    if "sha256" in keys:
        value = keys["sha256"][1]
        blank = "" if value.value else " "  # `sha256:` with no value, as a person may leave it
        return text[: value.start_mark.index] + blank + digest + text[value.end_mark.index :]
    key, value = keys.get("licence") or keys["file"]
    if weights.flow_style:
        at = value.end_mark.index
        return f"{text[:at]}, sha256: {digest}{text[at:]}"
    at = text.find("\n", value.end_mark.index if value.style not in {"|", ">"} else value.end_mark.index - 1)
    at = len(text) if at < 0 else at
    return f"{text[:at]}\n{' ' * key.start_mark.column}sha256: {digest}{text[at:]}"


def _value(node: Any, key: str) -> Any:
    return next(value for name, value in node.value if name.value == key)
