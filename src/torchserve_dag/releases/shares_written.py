"""A model's weights written into `routes.yaml`; its other lines and comments stay as they are."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from torchserve_dag.front_door.routes_file import FILE
from torchserve_dag.server.errors import ServerError


def write(root: Path, model: str, weights: Mapping[str, float]) -> None:
    """Raises ServerError where the file has no `versions:` of the model on a line of its own."""
    path = root / FILE
    lines = path.read_text("utf-8").splitlines()
    start = next((i for i, line in enumerate(lines) if re.match(rf"[\"']?{re.escape(model)}[\"']?:", line)), None)
    at = None if start is None else _versions_of(lines, start)
    if at is None:
        raise ServerError(f"{path} has no line versions: of {model}: write there what is served now.")
    indent = lines[at][: len(lines[at]) - len(lines[at].lstrip())]
    end = at + 1
    while end < len(lines) and _deeper(lines[end], indent):  # versions that have a line each
        end += 1
    comment = re.search(r"(\s+#.*)$", lines[at])
    shares = ", ".join(f"{json.dumps(version)}: {weight:g}" for version, weight in weights.items())
    lines[at:end] = [f"{indent}versions: {{{shares}}}{comment[1] if comment else ''}"]
    part = path.with_name(f".{path.name}.part")
    part.write_text("\n".join(lines) + "\n", "utf-8")
    part.replace(path)


def _versions_of(lines: list[str], start: int) -> int | None:
    for i in range(start + 1, len(lines)):
        if lines[i].strip() and not lines[i].startswith((" ", "#")):
            return None
        if re.match(r"\s+versions:", lines[i]):
            return i
    return None


def _deeper(line: str, indent: str) -> bool:
    return bool(line.strip()) and line.startswith(indent + " ")
